"""CPU seconds and peak memory of a build, beside those of ``mergekit-yaml`` with TIES on the same checkpoints.

    python tests/benchmarks/bench_build.py --base BASE --expert A --expert B --runs 3 --mergekit VENV

``VENV`` is a virtual environment with mergekit 0.1.5 (``pip install mergekit==0.1.5``); without it only this library
is timed. Runs alternate, each in a process of its own, imports included; medians are printed. ``--curve`` times builds
with 2, 4, 8 and 16 experts as well (experts are used again under other names), ``--sizes`` with the first quarter,
half, ... of the blocks; both are drawn with ``--plot FILE``. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def build_command(base: str, experts: list[str], output: Path, options: argparse.Namespace) -> list[str]:
    """The command line of one build, as a user would write it."""
    named = [part for number, path in enumerate(experts) for part in ("--expert", f"e{number}={path}")]
    command = [sys.executable, "-m", "mediator_peft", "build", "--base", base, *named, "--output", str(output)]
    command += ["--workers", str(options.workers)]
    return command + (["--max-memory", options.max_memory] if options.max_memory else [])


def first_blocks(source: str, target: Path, share: float) -> None:
    """A checkpoint with the first blocks of another one only."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = number = max(1, round(share * config["num_hidden_layers"]))
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:number]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kept = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            _, _, rest = name.partition(".layers.")
            if not rest or int(rest.split(".")[0]) < number:
                kept[name] = tensor
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """CPU seconds against the number of experts and of parameters, side by side, with a straight line through each."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        x, y = np.array(points).T
        slope, start = np.polyfit(x, y, 1)
        axes.plot(x, y, "o", color="#0072b2", label="measured")
        axes.plot(x, slope * x + start, "-", color="#d55e00", label=f"{start:.1f} + {slope:.3g} x")
        axes.set(xlabel=label, ylabel="CPU seconds", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; CPU seconds, wall seconds and largest resident memory (MB) of it and its children."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # A process of its own, so that the largest memory of one command does not hide that of the next.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        started = time.perf_counter()
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {
            "cpu": used.ru_utime + used.ru_stime,
            "wall": time.perf_counter() - started,
            "peak_mb": used.ru_maxrss / 1024,
        }
        os.write(writer, json.dumps({**found, "code": code}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = json.loads(file.read())
    os.waitpid(child, 0)
    if found.pop("code"):
        raise SystemExit(f"failed: {' '.join(command[:3])} ...")
    return found


def ties_settings(base: str, experts: list[str]) -> str:
    """The same work for mergekit: TIES at density 0.2, bfloat16 out."""
    models = [{"model": path, "parameters": {"weight": 1.0, "density": 0.2}} for path in experts]
    return json.dumps({"models": models, "merge_method": "ties", "base_model": base, "dtype": "bfloat16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", action="append", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--max-memory", help="for our builds, e.g. 2GiB")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--folder", type=Path, help="where to write; must have room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        out = folder / "out"
        kinds = {"mediator_peft": build_command(options.base, options.expert, out, options)}
        if options.mergekit:
            (folder / "ties.yaml").write_text(ties_settings(options.base, options.expert), encoding="utf-8")
            command = [str(options.mergekit / "bin" / "mergekit-yaml"), str(folder / "ties.yaml"), str(folder / "mk")]
            kinds["mergekit ties"] = [*command, "--lazy-unpickle"]
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.runs):
            for kind, command in kinds.items():
                clear(folder)
                runs[kind].append(measure(command))
                print(f"  {kind:16}", runs[kind][-1], flush=True)
        for kind, found in runs.items():
            if found:
                medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
                print(f"{kind:16}", "  ".join(f"{key} {value:8.2f}" for key, value in medians.items()))
        draw_curves(folder, options)


def clear(folder: Path) -> None:
    """Delete what the last run wrote."""
    for name in ("out", "mk"):
        shutil.rmtree(folder / name, ignore_errors=True)


def draw_curves(folder: Path, options: argparse.Namespace) -> None:
    """Time builds of several sizes, as far as they were asked for."""
    curves: dict[str, list[tuple[float, float]]] = {}

    def time_one(curve: str, x: float, base: str, experts: list[str]) -> None:
        clear(folder)
        found = measure(build_command(base, experts, folder / "out", options))
        print(f"  {curve} {x:g}", found, flush=True)
        curves.setdefault(curve, []).append((x, found["cpu"]))

    for count in (2, 4, 8, 16) if options.curve else ():
        experts = [options.expert[number % len(options.expert)] for number in range(count)]
        time_one("experts", count, options.base, experts)
    for share in (0.25, 0.5, 0.75, 1.0) if options.sizes else ():
        parts = folder / "parts"
        for number, source in enumerate([options.base, *options.expert]):
            first_blocks(source, parts / str(number), share)
        size = sum(path.stat().st_size for path in (parts / "0").glob("*.safetensors")) / 2e6
        time_one(
            "million parameters", size, str(parts / "0"), [str(parts / str(k + 1)) for k in range(len(options.expert))]
        )
        shutil.rmtree(parts)
    if options.plot and curves:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
