"""Kills ``run``, ``eval``, ``condense``, ``fit-scales`` and ``measure`` at random moments, and looks at what is left:
always old or new, and whole.

    python tests/stress/kill_commands.py --kills 100 --seed 0

Commands run in forked children, whose file operations are slowed down so that many kills fall between two of them.
After each kill: the output is absent, built, or built and fitted, with the bytes of an undisturbed run; the router's
files belong together; each file of the report is absent, old or new, and whole. Then the same command is run again;
now and then it is left to its end, which must have the bytes of the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints

from mediator_peft.checkpoints.replacing import finish_replacing

PIPELINE = """
build:
  base: base
  experts: {math: math, code: code}
  output: out
  config: {density: 0.5, routed_layers: all}
calibrate:
  data: {math: math.jsonl, code: code.jsonl}
eval:
  data: {math: math.jsonl, code: code.jsonl}
  max_new_tokens: 2
  report: results
"""
# The checksums are those of the router, too.
ROUTER_FILES = ("mediator/adapter_model.safetensors", "mediator/adapter_config.json", "mediator/checksums.json")
# Tell the time, or are made again from the same data by other code.
VOLATILE = ("report.json", "results.png", "routing.png", "README.md")
PAUSE = 0.01


def prepare(folder: Path) -> None:
    """Checkpoints, data files and the pipeline."""
    write_tiny_checkpoints(folder, ["base", "math", "code"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(folder / "base")
    for expert, start in (("math", "7 + "), ("code", "def f")):
        lines = [{"prompt": start + "x" * number, "answer": "7"} for number in range(8)]
        (folder / f"{expert}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "all.yaml").write_text(PIPELINE)


def start(arguments: list[str]) -> int:
    """A child that runs a command with slow file operations; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        for module, name in ((os, "replace"), (os, "rename"), (shutil, "copymode"), (Path, "write_text")):
            setattr(module, name, slowed(getattr(module, name)))
        from mediator_peft.cli.app import app

        app(arguments, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def slowed(function):
    """The same function, with a pause before and after."""

    def slow(*arguments, **settings):
        time.sleep(PAUSE)
        result = function(*arguments, **settings)
        time.sleep(PAUSE)
        return result

    return slow


def finish(child: int) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a command that was run again failed, exit status {os.waitstatus_to_exitcode(status)}")


def digests(folder: Path) -> dict[str, str]:
    """Relative path → checksum of every file but volatile ones."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and path.name not in VOLATILE:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Expected:
    """Undisturbed runs: what is built, and what is fitted."""

    def __init__(self, folder: Path) -> None:
        finish(start(["run", "all.yaml", "--only", "build"]))
        self.built = digests(folder / "out")
        shutil.copytree(folder / "out", folder / "built")
        finish(start(["run", "all.yaml"]))
        self.fitted = digests(folder / "out")
        self.results = report_in(folder / "results")


def scores(path: Path) -> object:
    """What ``results.json`` says, seconds aside: those of answers, and those and the memory of the build."""
    content = json.loads(path.read_text())
    content["comparison"].pop("runtime")
    for system in content["systems"]:
        for task in system["tasks"].values():
            task.pop("seconds")
    return content


def state_of_output(folder: Path, expected: Expected) -> str:
    """``absent``, ``built``, ``fitted``; anything else names what is wrong."""
    found = digests(folder / "out")
    if not found:
        return "absent"
    for name, digest in expected.built.items():
        if name not in ROUTER_FILES and name != "mediator/pipeline.yaml" and found.get(name) != digest:
            return f"WRONG: {name} differs from what was built"
    pairs = [tuple(known[name] for name in ROUTER_FILES) for known in (expected.built, expected.fitted)]
    pair = tuple(found.get(name, "") for name in ROUTER_FILES)
    if pair not in pairs:
        return "WRONG: weights and configuration of the router do not belong together"
    return "built" if pair == pairs[0] and pairs[0] != pairs[1] else "fitted"


def state_of_report(folder: Path, whole: list[object]) -> str:
    """``absent`` or ``whole``, all files of one run; anything else names what is wrong."""
    finish_replacing(folder)  # what the next command does first
    if not (folder / "results.json").exists():
        return "WRONG: answers without results" if (folder / "answers.json").exists() else "absent"
    try:
        found = report_in(folder)
    except (OSError, ValueError) as fault:
        return f"WRONG: {fault}"
    return "whole" if found in whole else "WRONG: results and answers that no run has"


def report_in(folder: Path) -> object:
    """What the files of a report say together, seconds aside."""
    return scores(folder / "results.json"), json.loads((folder / "answers.json").read_text())


def kill_run(folder: Path, expected: Expected, kills: int, moments: random.Random, duration: float) -> Counter[str]:
    """Kill ``run`` again and again; state → number."""
    states: Counter[str] = Counter()
    clear(folder)
    for number in range(kills):
        # From nothing, from a finished build, or from what the last kill left.
        way = moments.randrange(3)
        if way < 2:
            clear(folder)
        if way == 1:
            shutil.copytree(folder / "built", folder / "out")
        child = start(["run", "all.yaml"])
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states[f"output {state_of_output(folder, expected)}"] += 1
        states[f"report {state_of_report(folder / 'results', [expected.results])}"] += 1
        if number % 10 == 9:
            finish(start(["run", "all.yaml"]))
            same = digests(folder / "out") == expected.fitted
            left = [path.name for path in (*folder.rglob(".*partial*"), *folder.rglob(".*.journal"))]
            states["run again: same bytes" if same else "WRONG: run again gives other bytes"] += 1
            states["run again: nothing left behind" if not left else f"left behind: {sorted(set(left))}"] += 1
            print(f"run, after {number + 1} kills: {dict(states)}", flush=True)
    clear(folder)
    return states


def clear(folder: Path) -> None:
    """Take away what ``run`` writes."""
    for name in ("out", ".out.partial", ".out.journal", "results"):
        shutil.rmtree(folder / name, ignore_errors=True)


def kill_eval(folder: Path, kills: int, moments: random.Random) -> Counter[str]:
    """Kill ``eval`` again and again over an older report of other settings; state → number."""
    commands = []
    for tokens in ("2", "3"):
        data = [f"--data={name}={name}.jsonl" for name in ("math", "code")]
        commands.append(["eval", "out", *data, "--report", "results", "--max-new-tokens", tokens])
    whole = []
    began = time.perf_counter()
    for command in commands:
        finish(start(command))
        whole.append(report_in(folder / "results"))
    duration = (time.perf_counter() - began) / 2
    states: Counter[str] = Counter()
    for number in range(kills):
        child = start(commands[number % 2])
        # Most of the writing is at the end.
        time.sleep(moments.uniform(0, duration) if number % 3 else moments.uniform(0.7, 1.0) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states[f"report {state_of_report(folder / 'results', whole)}"] += 1
        if number % 10 == 9:
            print(f"eval, after {number + 1} kills: {dict(states)}", flush=True)
    finish(start(commands[0]))
    states["eval again: whole" if report_in(folder / "results") == whole[0] else "WRONG: at the end"] += 1
    left = [path.name for path in (folder / "results").iterdir() if path.name.startswith(".")]
    states["eval again: nothing left behind" if not left else f"WRONG: left behind {left}"] += 1
    return states


# Command → what it changes, how that is made before, and the command.
CHANGES = {
    "condense": (
        "shared",
        ["build", "--base=base", "--expert=a=math", "--expert=b=math", "--expert=c=code", "--output=shared",
         "--routed-layers=all"],
        ["condense", "shared"],
    ),
    "fit-scales": (
        "scaled",
        ["build", "--base=base", "--expert=math=math", "--expert=code=code", "--output=scaled", "--routed-layers=all"],
        ["fit-scales", "scaled", "--expert=math=math", "--data=math=math.jsonl", "--steps=3", "--batch-size=4"],
    ),
    "measure": (
        "side",
        None,
        ["measure", "base", "--prompts=math.jsonl", "--memory=16KiB", "--output=side/math.safetensors"],
    ),
}  # fmt: skip


def kill_change(folder: Path, name: str, kills: int, moments: random.Random) -> Counter[str]:
    """Kill a command that changes an output, or writes a file, again and again; state → number."""
    place, making, command = CHANGES[name]
    target, before = folder / place, folder / f"{place}-before"

    def reset() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, target)

    if making is not None:
        finish(start(making))
        shutil.copytree(target, before)
    began = time.perf_counter()
    old = visible(target)
    finish(start(command))
    new, duration = visible(target), time.perf_counter() - began
    if old == new:
        raise SystemExit(f"{name} changes nothing here, so that no kill can be seen")
    states: Counter[str] = Counter()
    is_due = False
    for number in range(kills):
        reset()
        child = start(command)
        # Most of the writing is at the end.
        time.sleep(moments.uniform(0, duration) if number % 3 else moments.uniform(0.7, 1.0) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finish_replacing(target / "mediator")  # what the next command does first
        found = visible(target)
        wrong = sorted(path for path in {*found, *new} if found.get(path) not in (old.get(path), new.get(path)))
        states["old" if found == old else "new" if found == new else f"WRONG: {wrong or 'mixed'}"] += 1
        is_due = is_due or number % 10 == 0
        if is_due and found == old:  # what is left of the killed one is there
            is_due = False
            finish(start(command))
            states["run again: same bytes" if visible(target) == new else "WRONG: run again gives other bytes"] += 1
            left = [path.name for path in target.rglob(".*")]
            states["run again: nothing left behind" if not left else f"WRONG: left behind {left}"] += 1
        if number % 10 == 9:
            print(f"{name}, after {number + 1} kills: {dict(states)}", flush=True)
    return states


def visible(folder: Path) -> dict[str, str]:
    """:func:`digests` without hidden files and what is in hidden folders."""
    return {path: digest for path, digest in digests(folder).items() if not f"/{path}".count("/.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=("run", "eval", *CHANGES), help="kill this command alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        os.chdir(folder)
        prepare(folder)
        # Imports and compiled loops are ready before the first child.
        import matplotlib.figure  # noqa: F401

        import mediator_peft.tuner.loading  # noqa: F401

        states = {}
        for name in CHANGES:
            if options.only in (None, name):
                states[name] = kill_change(folder, name, options.kills, moments)
        if options.only in CHANGES:
            report(states)
            os.chdir("/")
            return
        finish(start(["run", "all.yaml"]))
        clear(folder)
        expected = Expected(folder)
        clear(folder)
        began = time.perf_counter()
        finish(start(["run", "all.yaml"]))
        duration = time.perf_counter() - began
        print(f"one run takes {duration:.1f} s", flush=True)
        if options.only in (None, "run"):
            states["run"] = kill_run(folder, expected, options.kills, moments, duration)
            finish(start(["run", "all.yaml"]))
        if options.only in (None, "eval"):
            states["eval"] = kill_eval(folder, options.kills, moments)
        report(states)
        os.chdir("/")


def report(states: dict[str, Counter[str]]) -> None:
    """Print all states; one that is wrong ends the script with exit status 1."""
    for command, counts in states.items():
        for state, count in sorted(counts.items()):
            print(f"{command}: {state}: {count}")
    if any("WRONG" in state for counts in states.values() for state in counts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
