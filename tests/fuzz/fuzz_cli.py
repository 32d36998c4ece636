"""Random mutations of command lines, pipeline files and data files, and what becomes of them.

    python tests/fuzz/fuzz_cli.py --count 2000 --seed 0 --folder /tmp/fuzz

Every outcome falls into one class: "done", "usage" (exit code 2), "our error" (3), "resources" (4), "other exception"
(1, or a traceback), "too slow". The last two must be 0. Inputs of these two are printed with their number and seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner

from mediator_peft.cli.app import app

testing._get_command = functools.cache(get_command)  # making the commands costs three times as much as most of them

SECONDS = 60
BAD = ("other exception", "too slow")
_CLASSES = {0: "done", 2: "usage", 3: "our error", 4: "resources"}

PIPELINE = """\
build:
  base: base
  experts: {math: math, code: code}
  output: new
  config: {density: 0.5, routed_layers: all, encoding: sign, router: gaussian, seed: 3}
  workers: 1
  max_memory: 8GiB
calibrate:
  data: {math: math.jsonl, code: code.jsonl}
  text_column: prompt
  match: exact
  batch_size: 4
eval:
  data: {math: math.jsonl}
  max_new_tokens: 2
  only_routed: true
  report: results
"""

COMMANDS = [
    ["plan", "--base", "base", "--expert", "math=math", "--density", "0.5", "--json"],
    ["build", "--base", "base", "--expert", "math=math", "--output", "new", "--routed-layers", "0,2", "--dry-run"],
    ["build", "--base", "base", "--expert", "math=math", "--output", "new", "--encoding", "int8", "--seed", "3"],
    ["fit-router", "out", "--data", "math=math.jsonl", "--data", "code=code.jsonl", "--match", "exact"],
    ["generate", "out", "a prompt", "--max-new-tokens", "2", "--json"],
    ["generate", "out", "--file", "math.jsonl", "--expert", "math", "--max-new-tokens", "2"],
    ["eval", "out", "--data", "math=math.jsonl", "--max-new-tokens", "2", "--report", "results", "--only-routed"],
    ["inspect", "out", "--json"],
    ["verify", "out", "--against", "math=math", "--no-logits"],
    ["run", "all.yaml", "--set", "build.config.density=0.1", "--only", "build", "--dry-run"],
    ["merge", "--method", "ties", "--base", "base", "--expert", "math=math", "--output", "new", "--seed", "1"],
    ["merge", "--base", "base", "--expert", "math=math", "--merge-parameter", "density=0.1", "--output", "new"],
    ["condense", "out", "--min-cosine", "0.3", "--residual-density", "0.05", "--dry-run"],
    ["measure", "math", "--prompts", "math.jsonl", "--statistic", "gram", "--output", "new.safetensors"],
    ["search", "map", "--base", "base", "--expert", "math=math", "--data", "math=math.jsonl", "--output", "new"],
    ["bench", "out", "--prompt-tokens", "4", "--context", "4", "--batch-size", "2", "--rounds", "1"],
    ["bench", "out", "--routes", "math.jsonl", "--json"],
    ["verify", "out", "--accept"],
    ["methods", "--json"],
    ["env", "--json"],
    ["fit-scales", "out", "--expert", "math=math", "--data", "math=math.jsonl", "--steps", "1", "--batch-size", "2"],
    ["build", "--base", "base", "--expert", "math=math", "--output", "new", "--always", "more=code:0.5"],
    [
        "build",
        "--base",
        "base",
        "--expert",
        "math=math",
        "--expert",
        "code=code",
        "--output",
        "new",
        "--families",
        "0.1",
    ],
    [
        "merge",
        "--merge-method",
        "weighted",
        "--base",
        "base",
        "--expert",
        "math=math",
        "--merge-data",
        "x.json",
        "--output",
        "new",
    ],
]

# What stands in place of a part of a command line, or of a value.
ODD_TEXTS = [
    *("", " ", "-", "--", "=", "a=", "=a", "a=b=c", "0", "-1", "1e999", "nan", "inf", "9" * 5000, str(2**64)),
    *(
        "[/b]",
        "[red]",
        ":smile:",
        "\0",
        "\ud800",
        "ü" * 300,
        "a/../b",
        "/dev/null",
        "~nobody-here/x",
        "%s",
        "{}",
        "null",
    ),
    *("out", "base", "math", "math.jsonl", "all.yaml", "true", "auto", "meta", "cuda", "mps", "x" * 5000, "None"),
]
ODD_NODES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.5, 10**30, 2**64, 1e308, float("nan"), float("inf"), float("-inf")),
    *([], {}, [[]], [None], {"": 1}, {"a": {"b": []}}, ["a", "a"], {"base": 1}, ["math.jsonl"], [1, 2, 3]),
]
ODD_BYTES = [
    *(b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"'", b"{", b"}", b"[", b"]", b":", b"&a ", b"*a", b"<<: *a", b"- "),
    *(b"!!python/name:os.system ", b"1e999", b".nan", b"9" * 5000, b"[" * 3000, b"{a: " * 200, b"\\ud800", b"null"),
    *(b"\xef\xbb\xbf", b"true", b"-1", b"0", b"2020-13-45", b"? ", b"|\n", b"\t", b"%YAML 9", b"---\n", b"0x", b"1_0"),
]


def with_odd_value(draw: random.Random) -> list[str]:
    """A command line whose form is right, with one or two values that are odd."""
    parts = list(draw.choice(COMMANDS))
    places = [number for number in range(1, len(parts)) if not parts[number].startswith("--")] or [0]
    for place in draw.sample(places, min(len(places), draw.randint(1, 2))):
        name, equals, value = parts[place].partition("=")
        odd = draw.choice([draw.choice(ODD_TEXTS), value + draw.choice(ODD_TEXTS), str(draw.randint(-3, 300))])
        parts[place] = name + equals + odd if equals and draw.random() < 0.7 else odd
    if draw.random() < 0.3:
        parts += ["--device", draw.choice(ODD_TEXTS)]
    return parts


def with_odd_node(data: object, draw: random.Random) -> object:
    """The same mappings and lists, with one or two nodes that are odd, gone, or under another name."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.randint(1, 2)):
        places: list[tuple[Any, Any]] = []
        nodes = [data]
        while nodes:
            node = nodes.pop()
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                nodes.append(node[key])
        if not places:
            return data
        node, key = draw.choice(places)
        way = draw.randrange(5)
        if way == 0 and isinstance(node, dict):
            node[draw.choice(ODD_TEXTS)] = node.pop(key)
        elif way == 1:
            del node[key]
        else:
            node[key] = draw.choice([*ODD_NODES, *ODD_TEXTS])
    return data


def mutated_command(draw: random.Random) -> list[str]:
    """A command line with one to three changes; never one that writes outside of the folder."""
    if draw.random() < 0.6:
        return with_odd_value(draw)
    parts = list(draw.choice(COMMANDS))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(1, len(parts)) if len(parts) > 1 else 0
        way = draw.randrange(5)
        if way == 0 and len(parts) > 1:
            del parts[place]
        elif way <= 1:
            parts.insert(place, draw.choice(ODD_TEXTS))
        elif way == 2:
            parts[place] = draw.choice(ODD_TEXTS)
        elif way == 3:
            parts.insert(place, parts[draw.randrange(len(parts))])
        else:
            name, equals, value = parts[place].partition("=")
            parts[place] = name + equals + draw.choice(ODD_TEXTS) if equals else value + draw.choice(ODD_TEXTS)
    return parts


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A file with one to four changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        stop = min(len(changed), place + draw.choice((0, 1, 1, 3, 10, 100)))
        way = draw.randrange(4)
        if way == 0:
            changed[place:stop] = draw.choice(ODD_BYTES)
        elif way == 1:
            changed[place:stop] = b""
        elif way == 2:
            changed[place:place] = changed[place:stop]
        else:
            changed[place:stop] = bytes(draw.randrange(256) for _ in range(stop - place))
    return bytes(changed)


def prepare(folder: Path) -> None:
    """Checkpoints, data files, a built and fitted model in ``out``."""
    write_tiny_checkpoints(folder, ["base", "math", "code"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(folder / "base")
    for expert, start in (("math", "7 + "), ("code", "def f")):
        lines = [{"prompt": start + "x" * number, "answer": "7", "match": "exact"} for number in range(4)]
        (folder / f"{expert}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "all.yaml").write_text(PIPELINE)
    experts = [f"--expert={name}={folder / name}" for name in ("math", "code")]
    data = [f"--data={name}={folder / name}.jsonl" for name in ("math", "code")]
    build = ["build", "--base", str(folder / "base"), *experts, "--output", str(folder / "out")]
    for command in (build, ["fit-router", str(folder / "out"), *data]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.stderr


@contextmanager
def time_bound(seconds: int) -> Iterator[None]:
    """Interrupt the block by a signal, after so many seconds of CPU, or thirty times as many of a clock.

    On a machine that others load, a command may get a small share of a core.
    """

    def stop(*_: object) -> None:
        raise TimeoutError

    timers = [(signal.SIGALRM, signal.ITIMER_REAL, 30 * seconds), (signal.SIGPROF, signal.ITIMER_PROF, seconds)]
    previous = [signal.signal(number, stop) for number, *_ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def signatures(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path → size and time of change, of all files below."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            state = os.lstat(path)
            found[os.path.relpath(path, folder)] = (state.st_size, state.st_mtime_ns)
    return found


def outcome(command: list[str]) -> tuple[str, str]:
    """The class of a command's end, and the end of what it said."""
    try:
        with time_bound(SECONDS):
            started = time.process_time()
            done = CliRunner().invoke(app, command, input="from the standard input")
    except TimeoutError:
        return "too slow", ""
    said = done.stderr[-400:]
    if isinstance(done.exception, TimeoutError) or time.process_time() - started >= SECONDS:
        return "too slow", said
    if "Traceback" in done.stderr or done.exit_code not in _CLASSES:
        return "other exception", f"{done.exception!r} {said}"
    return _CLASSES[done.exit_code], said


def fuzz(
    folder: Path, count: int, seed: int, say: Callable[[str], None] = print, first: int = 0
) -> dict[str, Counter[str]]:
    """Mutate ``count`` inputs in a folder that :func:`prepare` filled; kind of input → class → number.

    What a command has changed is put back before the next, so that each outcome depends on seed and number alone.
    """
    found: dict[str, Counter[str]] = {"command line": Counter(), "yaml": Counter(), "jsonl": Counter()}
    data = (folder / "math.jsonl").read_bytes()
    before = os.getcwd()
    whole = Path(tempfile.mkdtemp())
    shutil.copytree(folder, whole, dirs_exist_ok=True, symlinks=True)
    expected = signatures(folder)
    os.chdir(folder)
    try:
        for number in range(first, first + count):
            draw = random.Random(f"{seed} {number}")
            kind = draw.choice(list(found))
            if kind == "command line":
                command = mutated_command(draw)
            elif kind == "yaml":
                text = PIPELINE.encode()
                if draw.random() < 0.5:  # YAML reads JSON
                    text = json.dumps(with_odd_node(yaml.safe_load(text), draw)).encode()
                else:
                    text = mutated_bytes(text, draw)
                Path("x.yaml").write_bytes(text)
                command = ["run", "x.yaml", "--dry-run"] if draw.random() < 0.9 else ["run", "x.yaml"]
            else:
                if draw.random() < 0.5:
                    lines = with_odd_node([json.loads(line) for line in data.splitlines()], draw)
                    text = "".join(json.dumps(line) + "\n" for line in lines).encode()  # type: ignore[attr-defined]
                else:
                    text = mutated_bytes(data, draw)
                Path("x.jsonl").write_bytes(text)
                command = draw.choice(
                    [
                        ["fit-router", "out", "--data=math=x.jsonl", "--data=code=code.jsonl"],
                        ["eval", "out", "--data=math=x.jsonl", "--max-new-tokens=1", "--only-routed"],
                        ["generate", "out", "--file=x.jsonl", "--max-new-tokens=1"],
                    ]
                )
            result, said = outcome(command)
            found[kind][result] += 1
            if result in BAD:
                say(f"{result}: seed {seed}, number {number}, {kind}: {command!r:.300}\n    {said}")
            if signatures(folder) != expected:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                shutil.copytree(whole, folder, dirs_exist_ok=True, symlinks=True)
    finally:
        os.chdir(before)
        shutil.rmtree(whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        prepare(Path(name))
        found = fuzz(Path(name), options.count, options.seed, first=options.first)
    for kind, classes in found.items():
        print(f"{kind}: " + ", ".join(f"{name} {number}" for name, number in sorted(classes.items())))
    if any(classes[name] for classes in found.values() for name in BAD):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
