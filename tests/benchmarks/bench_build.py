"""CPU seconds and peak memory of a build, beside those of ``mergekit-yaml`` with TIES on the same checkpoints.

    python tests/benchmarks/bench_build.py --base BASE --expert A --expert B --runs 3 --mergekit VENV

``VENV`` is a virtual environment with mergekit 0.1.5 (``pip install mergekit==0.1.5``); without it only this library
is timed. Runs alternate, each in a process of its own, imports included; medians are printed. ``--curve`` times builds
with 1, 2, 4, ... experts as well (experts are used again under other names). Let nothing else run meanwhile.
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

BUILD = """
import sys
from mediator_peft import MediatorConfig, build_mediator
output, workers, base, *experts = sys.argv[1:]
build_mediator(base, {f"e{k}": path for k, path in enumerate(experts)}, output, MediatorConfig(), workers=int(workers))
"""
IMPORT = "import mediator_peft"


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
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write; must have room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        ours = [sys.executable, "-c", BUILD, str(folder / "out"), str(options.workers), options.base]
        kinds = {"import only": [sys.executable, "-c", IMPORT], "mediator_peft": [*ours, *options.expert]}
        if options.mergekit:
            (folder / "ties.yaml").write_text(ties_settings(options.base, options.expert), encoding="utf-8")
            command = [str(options.mergekit / "bin" / "mergekit-yaml"), str(folder / "ties.yaml"), str(folder / "mk")]
            kinds["mergekit ties"] = [*command, "--lazy-unpickle"]
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.runs):
            for kind, command in kinds.items():
                for output in ("out", "mk"):
                    shutil.rmtree(folder / output, ignore_errors=True)
                runs[kind].append(measure(command))
        for kind, found in runs.items():
            medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
            print(f"{kind:16}", "  ".join(f"{key} {value:8.2f}" for key, value in medians.items()))
        for count in (1, 2, 4, 8, 16) if options.curve else ():
            shutil.rmtree(folder / "out", ignore_errors=True)
            experts = [options.expert[number % len(options.expert)] for number in range(count)]
            print(f"{count:3} experts", measure([*ours, *experts]))


if __name__ == "__main__":
    main()
