"""Malformed command lines and files: each ends in a message and an exit code, in bounded time, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints
from typer.testing import CliRunner

from mediator_peft.cli.app import app

SECONDS = 30
"""No case may take longer, on a busy machine."""

USAGE, BAD_INPUT = 2, 3


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@contextmanager
def bounded_time():
    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def refused(shown, code, *words):
    """A message with these words, the code, no results and no traceback."""
    said = " ".join(shown.stderr.split())
    assert shown.exit_code == code, (shown.exit_code, said[-600:], shown.exception)
    assert "Traceback" not in shown.stderr
    assert said
    assert "may be a fault of mediator_peft" not in said
    assert shown.stdout == ""
    plain = said.replace("│", " ")
    plain = " ".join(plain.split())
    for word in words:
        assert word in plain, plain[-600:]


def line(**record):
    return json.dumps(record) + "\n"


GOOD_LINES = "".join(line(prompt=f"prompt {'x' * number}", answer="7") for number in range(3))

# What a file of prompts may hold, and what is said of it.
LINES = {
    "empty": (b"", "holds no items"),
    "blank": (b"\n \n\n", "holds no items"),
    "no json": (b'{"prompt": "a"}\nnot json\n', "line 2: not JSON"),
    "cut short": (b'{"prompt": "a"}\n{"prompt": "b', "line 2: not JSON"),
    "huge integer": (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "line 1: not JSON (a number has too many digits"),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not JSON"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "lone surrogate": (rb'{"prompt": "a \ud800 b", "answer": "7"}', "half of a character"),
    "lone low surrogate": (rb'{"prompt": "\udc41", "answer": "7"}', "half of a character"),
    "latin-1": ('{"prompt": "für"}'.encode("latin-1"), "line 1: not UTF-8"),
    "latin-1 later": (b'{"prompt": "a"}\n' + '{"prompt": "für"}'.encode("latin-1"), "line 2: not UTF-8"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
    "binary": (bytes(range(256)) * 10, "not UTF-8"),
    "zeros": (bytes(4000), "not JSON"),
    "an array": (b'["a", "b"]', "a JSON object was expected, not list"),
    "a string": (b'"a"', "a JSON object was expected, not str"),
    "a number": (b"5", "not int"),
    "null": (b"null", "not NoneType"),
    "another column": (b'{"promt": "a"}', "Did you mean 'promt'"),
    "prompt is a number": (b'{"prompt": 5}', "must be a text that is not empty, got 5"),
    "prompt is null": (b'{"prompt": null}', "must be a text that is not empty, got None"),
    "prompt is a list": (b'{"prompt": ["a", "b"]}', "must be a text that is not empty"),
    "prompt is empty": (b'{"prompt": "  "}', "must be a text that is not empty"),
    "html": (b"<!DOCTYPE html><html>404</html>", "line 1: not JSON"),
    "csv": (b"prompt,expert\na,b\n", "line 1: not JSON"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "line 1: not JSON"),
}

TASK_LINES = {
    "match is a list": (b'{"prompt": "a", "answer": "b", "match": ["exact"]}', "'match' must be one of"),
    "match is a number": (b'{"prompt": "a", "answer": "b", "match": 1e400}', "'match' must be one of"),
    "match is unknown": (b'{"prompt": "a", "answer": "b", "match": "exat"}', "Did you mean 'exact'"),
    "no answer": (b'{"prompt": "a"}', "'answer'"),
    "answer is a number": (b'{"prompt": "a", "answer": 7}', "'answer' must be a text"),
    "answer has no number": (b'{"prompt": "a", "answer": "b", "match": "last_number"}', "holds no number"),
    "surrogate in the answer": (rb'{"prompt": "a", "answer": "\ud83d"}', "half of a character"),
}

PIPELINE = """
build:
  base: base
  experts: {math: math, code: code}
  output: new
calibrate:
  data: {math: math.jsonl, code: code.jsonl}
eval:
  data: {math: math.jsonl}
"""

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)

# What a pipeline file may hold (None: no file), and what is said of it.
PIPELINES = {
    "no file": (None, "no file"),
    "empty": ("", "must hold the sections"),
    "a list": ("- build", "must hold the sections"),
    "a word": ("build", "must hold the sections"),
    "no yaml": ("build: [1, 2", "cannot be read"),
    "tab": ("build:\n\tbase: x", "cannot be read"),
    "null byte": ("build: \0", "cannot be read"),
    "python tag": ("build: !!python/object/apply:os.system ['true']", "cannot be read"),
    "aliases of aliases": (BOMB, "values with aliases written out"),
    "merge keys of merge keys": (MERGE_BOMB, "values with aliases written out"),
    "an alias in its anchor": ("build: &a [*a]", "within its own anchor"),
    "unknown alias": ("build: *a", "cannot be read"),
    "deep": ("[" * 5000 + "]" * 5000, "cannot be read"),
    "deep, within what is parsed": ("build: " + "[" * 200 + "]" * 200, "levels deep"),
    "huge integer": (PIPELINE + "  batch_size: " + "9" * 5000, "cannot be read"),
    "no date": ("build: 2020-99-99", "cannot be read"),
    "a key twice": (PIPELINE + "eval: {}", "comes twice"),
    "a key that is a number": ("1: 2", "a key must be a text"),
    "a key that is a list": ("? [a]\n: 2", "a key must be a text"),
    "an unknown section": (PIPELINE + "evl: {}", "Did you mean 'eval'"),
    "no build": ("calibrate: {data: {a: b}}", "section build is missing"),
    "build is a word": ("build: yes please", "section build is missing"),
    "no experts": ("build: {base: base, output: new}", "build.experts is missing"),
    "an expert without a path": ("build: {base: base, output: new, experts: {a: }}", "must be a path"),
    "an expert that is a list": ("build: {base: base, output: new, experts: {a: [b]}}", "must be a path"),
    "output is a number": (PIPELINE.replace("output: new", "output: 5"), "build.output must be text"),
    "batch size 0": (PIPELINE + "  batch_size: 0", "eval.batch_size must be a whole number from 1"),
    "negative batch size": (PIPELINE + "  batch_size: -3", "eval.batch_size must be a whole number from 1"),
    "huge batch size": (PIPELINE + "  batch_size: 1" + "0" * 30, "eval.batch_size must be a whole number from 1"),
    "batch size is a word": (PIPELINE + "  batch_size: many", "eval.batch_size must be a whole number from 1"),
    "batch size is true": (PIPELINE + "  batch_size: true", "eval.batch_size must be a whole number from 1"),
    "10^30 tokens": (PIPELINE + "  max_new_tokens: 1" + "0" * 30, "eval.max_new_tokens must be a whole number"),
    "0 tokens": (PIPELINE + "  max_new_tokens: 0", "eval.max_new_tokens must be a whole number"),
    "tokens are a word": (PIPELINE + "  max_new_tokens: few", "eval.max_new_tokens must be a whole number"),
    "workers": (PIPELINE.replace("output: new", "output: new\n  workers: 0"), "build.workers must be a whole number"),
    "a million workers": (PIPELINE.replace("output: new", "output: new\n  workers: 1000000"), "build.workers must be"),
    "memory": (PIPELINE.replace("output: new", "output: new\n  max_memory: much"), "max_memory"),
    "endless memory": (PIPELINE.replace("output: new", f"output: new\n  max_memory: '{'9' * 400}GB'"), "max_memory"),
    "experts in the config": (
        PIPELINE.replace("output: new", "output: new\n  config: {experts: {a: b}}"), "build.config.experts"),
    "config is a list": (PIPELINE.replace("output: new", "output: new\n  config: [a]"), "build.config must be pairs"),
    "config key": (PIPELINE.replace("output: new", "output: new\n  config: {densty: 1}"), "Did you mean 'density'"),
    "density is a list": (PIPELINE.replace("output: new", "output: new\n  config: {density: [1]}"), "density must"),
    "density is nan": (PIPELINE.replace("output: new", "output: new\n  config: {density: .nan}"), "density must"),
    "plan is no file": (PIPELINE.replace("output: new", "output: new\n  plan: none.json"), "none.json"),
    "dtype": (PIPELINE + "  dtype: float31", "dtype"),
    "device meta": (PIPELINE + "  device: meta", "'meta'"),
    "match": (PIPELINE + "  match: nope", "way to match 'nope'"),
    "raw is a word": (PIPELINE + "  raw: maybe", "eval.raw must be true or false"),
    "report is a file": (PIPELINE + "  report: math.jsonl", "is a file"),
    "report under a file": (PIPELINE + "  report: math.jsonl/report", "is a file"),
    "data is a list": (PIPELINE.replace("data: {math: math.jsonl}", "data: [math.jsonl]"), "eval.data must be pairs"),
    "data that is not there": (PIPELINE.replace("code.jsonl", "none.jsonl"), "calibrate.data.code"),
    "data with faults": (PIPELINE.replace("code.jsonl", "bad.jsonl"), "line 1: not JSON"),
    "data of another expert": (PIPELINE.replace("code: code.jsonl", "cron: code.jsonl"), "unknown expert 'cron'"),
    "an expert without data": (PIPELINE.replace(", code: code.jsonl", ""), "expert 'code' has no prompts"),
    "another column": (PIPELINE.replace("eval:", "  text_column: question\neval:"), "column 'question'"),
    "eval without calibrate": (PIPELINE.replace("calibrate:\n  data: {math: math.jsonl, code: code.jsonl}\n", ""),
                               "eval needs a fitted router"),
    "no base": (PIPELINE.replace("base: base", "base: nowhere/at-all/x"), "nowhere"),
    "a base without a tokenizer": (PIPELINE.replace("base: base", "base: math"), "has no tokenizer"),
    "output is a file": (PIPELINE.replace("output: new", "output: math.jsonl"), "exists"),
    "output under a file": (PIPELINE.replace("output: new", "output: math.jsonl/new"), "is a file"),
    "output is another folder": (PIPELINE.replace("output: new", "output: base"), "exists and is not"),
    "a surrogate": (PIPELINE.replace("output: new", r'output: "\ud800"'), "half of a character"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints, data files, and a built and fitted model in ``out``."""
    root = tmp_path_factory.mktemp("bad")
    write_tiny_checkpoints(root, ["base", "math", "code"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(root / "base")
    for expert, start in (("math", "7 + "), ("code", "def f")):
        lines = "".join(line(prompt=start + "x" * number, answer="7") for number in range(12))
        (root / f"{expert}.jsonl").write_text(lines)
    (root / "good.jsonl").write_text(GOOD_LINES)
    (root / "bad.jsonl").write_text("x")
    (root / "text.txt").write_text("a\nb\n")
    os.mkfifo(root / "pipe.jsonl")
    experts = [f"--expert={name}={root / name}" for name in ("math", "code")]
    assert run("build", "--base", root / "base", *experts, "--output", root / "out").exit_code == 0
    data = [f"--data={name}={root / name}.jsonl" for name in ("math", "code")]
    fitted = run("fit-router", root / "out", *data)
    assert fitted.exit_code == 0, fitted.stderr
    return root


@pytest.fixture(autouse=True)
def _nothing_is_loaded_twice(monkeypatch, root):
    monkeypatch.chdir(root)


def contents(root):
    return sorted(str(path) for path in root.rglob("*") if "damaged" not in path.parts)


@pytest.mark.parametrize("kind", LINES)
def test_a_file_of_prompts_is_refused_before_a_model_is_loaded(kind, root, tmp_path):
    data, message = LINES[kind]
    (tmp_path / "x.jsonl").write_bytes(data)
    with bounded_time():
        shown = run("fit-router", root / "out", "--data", f"math={tmp_path / 'x.jsonl'}", "--data", "code=good.jsonl")
    refused(shown, BAD_INPUT, message, "x.jsonl")
    assert "loading" not in shown.stderr


@pytest.mark.parametrize("kind", TASK_LINES)
def test_a_file_of_tasks_is_refused_before_a_model_is_loaded(kind, root, tmp_path):
    data, message = TASK_LINES[kind]
    (tmp_path / "x.jsonl").write_bytes(data)
    with bounded_time():
        shown = run("eval", root / "out", "--data", f"math={tmp_path / 'x.jsonl'}")
    refused(shown, BAD_INPUT, message, "x.jsonl", "line 1")
    assert "loading" not in shown.stderr


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_is_refused_before_anything_is_written(kind, root):
    text, message = PIPELINES[kind]
    path = root / "x.yaml"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    before = contents(root)
    with bounded_time():
        shown = run("run", path)
    refused(shown, BAD_INPUT, message)
    assert contents(root) == before


COMMAND_LINES = {
    "no such command": (USAGE, ["nonsense"], "No such command"),
    "no such option": (USAGE, ["inspect", "out", "--nonsense"], "No such option"),
    "build: nothing": (USAGE, ["build"], "Missing option"),
    "build: an expert without a name": (USAGE, ["build", "--base", "base", "--expert", "math", "--output", "new"],
                                        "NAME=PATH"),
    "build: a name twice": (USAGE, ["build", "--base=base", "--expert=a=math", "--expert=a=code", "--output=new"],
                            "twice"),
    "build: markup in a name": (BAD_INPUT, ["build", "--base=base", "--expert=[/red]=math", "--output=new"],
                                "[/red]"),
    "build: a seed of thousands of digits": (
        USAGE, ["build", "--base=base", "--expert=a=math", "--output=new", "--seed=" + "9" * 5000], "seed"),
    "build: density": (BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=new", "--density=nan"],
                       "density must"),
    "build: memory without end": (
        BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=new", f"--max-memory={'9' * 400}GB"],
        "max_memory"),
    "build: workers": (USAGE, ["build", "--base=base", "--expert=a=math", "--output=new", "--workers=1000000"],
                       "--workers"),
    "build: blocks": (BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=new", "--routed-layers=1,1"],
                      "routed_layers"),
    "build: a null byte in the path": (USAGE, ["build", "--base=base", "--expert=a=math", "--output=a\0b"], ""),
    "build: a name without end": (BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=" + "n" * 3000],
                                  "too long"),
    "build: nobody's home": (BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=~nobody-here/x"],
                             "home directory"),
    "build: output under a file": (BAD_INPUT, ["build", "--base=base", "--expert=a=math", "--output=math.jsonl/x"],
                                   "math.jsonl"),
    "plan: a plan that is a pipe": (BAD_INPUT, ["plan", "--base=base", "--expert=a=math", "--plan=pipe.jsonl"],
                                    "pipe.jsonl"),
    "plan: saved into a folder": (USAGE, ["plan", "--base=base", "--expert=a=math", "--save=base"], "is a folder"),
    "plan: saved under a file": (BAD_INPUT, ["plan", "--base=base", "--expert=a=math", "--save=math.jsonl/plan"],
                                 "is a file"),
    "fit-router: no data": (USAGE, ["fit-router", "out"], "--data"),
    "fit-router: deltas and data": (USAGE, ["fit-router", "out", "--from-deltas", "--data=math=good.jsonl"],
                                    "beside --from-deltas"),
    "fit-router: no name": (USAGE, ["fit-router", "out", "--data", "=x"], "NAME=PATH"),
    "fit-router: match": (USAGE, ["fit-router", "out", "--data=math=good.jsonl", "--match=nope"], "way to match"),
    "calibrate: match": (USAGE, ["calibrate", "out", "--data=math=good.jsonl", "--match=nope"], "way to match"),
    "fit-router: an expert without data": (BAD_INPUT, ["fit-router", "out", "--data=math=good.jsonl"],
                                           "'code' has no prompts"),
    "fit-router: an unknown expert": (BAD_INPUT, ["fit-router", "out", "--data=mth=good.jsonl"], "Did you mean 'math'"),
    "fit-router: a pipe": (BAD_INPUT, ["fit-router", "out", "--data=math=pipe.jsonl"], "is a pipe"),
    "fit-router: a folder": (BAD_INPUT, ["fit-router", "out", "--data=math=base"], "is a folder"),
    "fit-router: a device": (BAD_INPUT, ["fit-router", "out", "--data=math=/dev/zero"], "device"),
    "fit-router: no file": (BAD_INPUT, ["fit-router", "out", "--data=math=none.jsonl"], "no file"),
    "fit-router: a csv file": (BAD_INPUT, ["fit-router", "out", "--data=math=rows.csv"], "JSONL"),
    "fit-router: batch size 0": (USAGE, ["fit-router", "out", "--data=math=good.jsonl", "--batch-size=0"],
                                 "--batch-size"),
    "fit-router: no output": (BAD_INPUT, ["fit-router", "nowhere", "--data=math=good.jsonl"], "nowhere"),
    "fit-router: answered": (BAD_INPUT, ["fit-router", "out", "--data=math=good.jsonl", "--answered=bad.jsonl"],
                             "bad.jsonl"),
    "generate: nothing": (USAGE, ["generate", "out"], "PROMPT"),
    "generate: both": (USAGE, ["generate", "out", "x", "--file=text.txt"], "PROMPT"),
    "generate: an empty prompt": (USAGE, ["generate", "out", ""], "is empty"),
    "generate: a blank prompt": (USAGE, ["generate", "out", " \n"], "is empty"),
    "generate: a surrogate": (USAGE, ["generate", "out", "a\udc80b"], "half of a character"),
    "generate: beyond the context": (BAD_INPUT, ["generate", "out", "x" * 9000], "the prompt: more than 256 tokens"),
    "generate: 10^30 tokens": (USAGE, ["generate", "out", "x", f"--max-new-tokens={10**30}"], "--max-new-tokens"),
    "generate: 0 tokens": (USAGE, ["generate", "out", "x", "--max-new-tokens=0"], "--max-new-tokens"),
    "generate: batch size": (USAGE, ["generate", "out", "x", f"--batch-size={10**30}"], "--batch-size"),
    "generate: no device": (USAGE, ["generate", "out", "x", "--device=gpu"], "device"),
    "generate: device meta": (USAGE, ["generate", "out", "x", "--device=meta"], "--device"),
    "generate: an empty device": (USAGE, ["generate", "out", "x", "--device="], "--device"),
    "generate: device cuda:99": (USAGE, ["generate", "out", "x", "--device=cuda:99"], "--device"),
    "generate: dtype": (USAGE, ["generate", "out", "x", "--dtype=float31"], "--dtype"),
    "generate: quantize": (USAGE, ["generate", "out", "x", "--quantize=nf5"], "--quantize"),
    "generate: an unknown expert": (BAD_INPUT, ["generate", "out", "x", "--expert=maths"], "Did you mean 'math'"),
    "generate: markup as expert": (BAD_INPUT, ["generate", "out", "x", "--expert=[/b]"], "[/b]"),
    "generate: a pipe": (BAD_INPUT, ["generate", "out", "--file=pipe.jsonl"], "is a pipe"),
    "generate: no file": (BAD_INPUT, ["generate", "out", "--file=none.txt"], "no file"),
    "generate: a folder as file": (BAD_INPUT, ["generate", "out", "--file=base"], "is a folder"),
    "generate: a plain checkpoint": (BAD_INPUT, ["generate", "base", "x"], "no Mediator adapter"),
    "generate: no folder": (BAD_INPUT, ["generate", "no/such/folder", "x"], "no/such/folder"),
    "generate: a file as folder": (BAD_INPUT, ["generate", "math.jsonl", "x"], "math.jsonl"),
    "eval: no name": (USAGE, ["eval", "out", "--data", "good.jsonl"], "NAME=PATH"),
    "eval: match": (USAGE, ["eval", "out", "--data=math=good.jsonl", "--match=nope"], "way to match"),
    "eval: report is a file": (BAD_INPUT, ["eval", "out", "--data=math=good.jsonl", "--report=text.txt"], "is a file"),
    "eval: report under a file": (BAD_INPUT, ["eval", "out", "--data=math=good.jsonl", "--report=text.txt/a/b"],
                                  "is a file"),
    "eval: tokens": (USAGE, ["eval", "out", "--data=math=good.jsonl", "--max-new-tokens=-1"], "--max-new-tokens"),
    "inspect: nothing": (BAD_INPUT, ["inspect", "nowhere"], "no Mediator adapter"),
    "inspect: a checkpoint": (BAD_INPUT, ["inspect", "base"], "no Mediator adapter"),
    "inspect: a null byte": (USAGE, ["inspect", "a\0b"], ""),
    "inspect: the root folder": (BAD_INPUT, ["inspect", "/"], "no Mediator adapter"),
    "verify: a checkpoint": (BAD_INPUT, ["verify", "base"], "no Mediator adapter"),
    "verify: against no name": (USAGE, ["verify", "out", "--against", "math"], "NAME=PATH"),
    "verify: against an unknown name": (BAD_INPUT, ["verify", "out", "--against=cron=math"], "'cron'"),
    "verify: against nothing": (BAD_INPUT, ["verify", "out", "--against=math=/nowhere"], "/nowhere"),
    "bench: tokens": (USAGE, ["bench", "out", f"--prompt-tokens={10**30}"], "--prompt-tokens"),
    "bench: threads": (USAGE, ["bench", "out", "--threads=100000"], "--threads"),
    "bench: negative threads": (USAGE, ["bench", "out", "--threads=-1"], "--threads"),
    "bench: rounds": (USAGE, ["bench", "out", f"--rounds={10**9}"], "--rounds"),
    "bench: plot": (BAD_INPUT, ["bench", "out", "--plot=speed.doc"], "speed.doc"),
    "bench: plot under a file": (BAD_INPUT, ["bench", "out", "--plot=text.txt/speed.png"], "is a file"),
    "demo: into a file": (BAD_INPUT, ["demo", "--quick", "--output=text.txt"], "is a file"),
    "demo: under a file": (BAD_INPUT, ["demo", "--quick", "--output=text.txt/demo"], "is a file"),
    "demo: seed": (USAGE, ["demo", "--quick", f"--seed={10**30}"], "--seed"),
    "demo: device": (USAGE, ["demo", "--quick", "--device=meta", "--output=new"], "--device"),
    "run: a pipe": (BAD_INPUT, ["run", "pipe.jsonl"], "is a pipe"),
    "run: a folder": (BAD_INPUT, ["run", "base"], "is a folder"),
    "run: endless zeros": (BAD_INPUT, ["run", "/dev/zero"], "device"),
    "run: no setting": (USAGE, ["run", "good.yaml", "--set", "x"], "KEY=VALUE"),
    "run: no yaml": (USAGE, ["run", "good.yaml", "--set", "build.workers=["], "YAML"),
    "run: aliases": (USAGE, ["run", "good.yaml", "--set", "build.config=" + BOMB], "YAML"),
    "run: a setting of many parts": (BAD_INPUT, ["run", "good.yaml", "--set", "a" + ".a" * 50_000 + "=1"], "key"),
    "run: build is a number": (BAD_INPUT, ["run", "good.yaml", "--set", "build=5"], "build is missing"),
    "run: no step": (USAGE, ["run", "good.yaml", "--only=biuld"], "no step"),
    "run: eval before there is an output": (BAD_INPUT, ["run", "good.yaml", "--only=eval"], "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMMAND_LINES)
def test_a_command_line_is_refused(kind, root, monkeypatch):
    code, arguments, message = COMMAND_LINES[kind]
    (root / "good.yaml").write_text(PIPELINE)
    monkeypatch.setenv("COLUMNS", "200")
    before = contents(root)
    with bounded_time():
        shown = run(*arguments)
    refused(shown, code, message)
    assert contents(root) == before


def edit(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


ADAPTER, WEIGHTS = "mediator/adapter_config.json", "mediator/adapter_model.safetensors"


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def setting(name, value, file=ADAPTER):
    return lambda folder: edit(folder / file, lambda content: content.update({name: value}))


def replaced_by_pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


NESTED_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

# What may happen to an output: the change, and the commands that must refuse it.
DAMAGE = {
    "the adapter's config is empty": (write(ADAPTER, b""), "inspect verify generate"),
    "the adapter's config is a list": (write(ADAPTER, b"[]"), "inspect verify generate"),
    "the adapter's config is binary": (write(ADAPTER, bytes(range(256))), "inspect verify generate"),
    "the adapter's config is deep": (write(ADAPTER, b"[" * 100_000), "inspect verify generate"),
    "the adapter's config has a huge number": (
        write(ADAPTER, b'{"a": ' + b"9" * 5000 + b"}"), "inspect verify generate"),
    "density is a text": (setting("density", "much"), "inspect verify generate"),
    "expert names are a number": (setting("expert_names", 5), "inspect verify generate"),
    "routed modules are a number": (setting("routed_modules", 5), "verify generate"),
    "experts are a list": (setting("experts", ["a"]), "verify generate"),
    "the fingerprint is a list": (setting("backbone_fingerprint", [1]), "verify generate"),
    "the format is a text": (setting("format_version", "one"), "verify generate"),
    "the backbone is a number": (setting("base_model_name_or_path", 5), "inspect verify generate"),
    "the weights are a pipe": (replaced_by_pipe(WEIGHTS), "inspect verify generate"),
    "the backbone's weights are a pipe": (replaced_by_pipe("model.safetensors"), "inspect verify generate"),
    "the checksums are a pipe": (replaced_by_pipe("mediator/checksums.json"), "verify"),
    "the report is a pipe": (replaced_by_pipe("mediator/report/report.json"), "inspect"),
    "config.json is a pipe": (replaced_by_pipe("config.json"), "inspect verify generate"),
    "the checksums are a list": (write("mediator/checksums.json", b"[]"), "verify"),
    "the checksums are a number": (write("mediator/checksums.json", b"5"), "verify"),
    "the weights are empty": (write(WEIGHTS, b""), "inspect verify generate"),
    "the weights are text": (write(WEIGHTS, b"version https://git-lfs"), "inspect verify generate"),
    "config.json is empty": (write("config.json", b""), "verify generate"),
    "config.json is a list": (write("config.json", b"[]"), "verify generate"),
    "config.json is deep": (write("config.json", b"[" * 100_000), "verify generate"),
    "2**64 layers": (setting("num_hidden_layers", 2**64, "config.json"), "verify generate"),
    "a million layers": (setting("num_hidden_layers", 10**6, "config.json"), "verify generate"),
    "layers are a text": (setting("num_hidden_layers", "three", "config.json"), "verify generate"),
    "an unknown architecture": (setting("model_type", "no-such-model", "config.json"), "verify generate"),
    "the tokenizer is no json": (write("tokenizer.json", b"{"), "verify generate"),
    "the tokenizer is a list": (write("tokenizer.json", b"[]"), "verify generate"),
    "the tokenizer's config is a list": (write("tokenizer_config.json", b"[]"), "verify generate"),
    "a template that is no template": (write("chat_template.jinja", b"{% for %}"), "generate"),
    "a template that refuses": (write("chat_template.jinja", b"{{ raise_exception('no [/b] role') }}"), "generate"),
    "a template that divides by 0": (write("chat_template.jinja", b"{{ 1 // 0 }}"), "generate"),
    "a template of nested loops": (write("chat_template.jinja", NESTED_LOOPS.encode()), "generate"),
    "generation_config is a list": (write("generation_config.json", b"[]"), "verify generate"),
    "generation_config is cut": (write("generation_config.json", b'{"a":'), "verify generate"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "command"), [(kind, command) for kind, (_, commands) in DAMAGE.items() for command in commands.split()]
)
def test_a_damaged_output_is_refused(kind, command, root, tmp_path, monkeypatch):
    monkeypatch.setattr("mediator_peft.evaluation.prompts._TEMPLATE_SECONDS", 1)
    shutil.copytree(root / "out", tmp_path / "damaged")
    DAMAGE[kind][0](tmp_path / "damaged")
    more = {"generate": ["hello", "--max-new-tokens=2"]}.get(command, [])
    with bounded_time():
        shown = run(command, tmp_path / "damaged", *more)
    refused(shown, BAD_INPUT)


def test_the_table_has_a_hundred_and_fifty_cases():
    num_damaged = sum(len(commands.split()) for _, commands in DAMAGE.values())
    assert len(LINES) + len(TASK_LINES) + len(PIPELINES) + len(COMMAND_LINES) + num_damaged >= 150


def test_an_unexpected_error_is_short_and_says_how_to_see_more(root, monkeypatch):
    def fail(*arguments, **settings):
        raise ZeroDivisionError("of [/b] nothing")

    monkeypatch.setattr("mediator_peft.merge.offline.build_mediator", fail)
    command = ["build", "--base", "base", "--expert=math=math", "--output", "new"]
    shown = run(*command)
    assert shown.exit_code == 1
    assert "ZeroDivisionError: of [/b] nothing" in shown.stderr
    assert "--traceback" in shown.stderr
    assert "Traceback (most" not in shown.stderr
    for verbose in (run("--traceback", *command), run(*command, "--traceback")):
        assert verbose.exit_code == 1
        assert "Traceback (most" in verbose.stderr
    monkeypatch.setenv("MEDIATOR_PEFT_TRACEBACK", "1")
    assert "Traceback (most" in run(*command).stderr


def test_markup_in_a_task_name_is_printed_as_it_is(root):
    shown = run("eval", "out", "--data=[/red]:smile:=good.jsonl", "--max-new-tokens=2", "--only-routed")
    assert shown.exit_code == 0, shown.stderr
    assert "[/red]:smile:" in shown.stdout


def test_the_standard_input_is_bounded_and_must_be_text(root, monkeypatch):
    monkeypatch.setattr("mediator_peft.cli.generate._LONGEST_PROMPT", 1000)
    refused(run("generate", "out", "-", stdin="x" * 1001), BAD_INPUT, "1,000 characters")
    refused(run("generate", "out", "-", stdin=b"\xff\xfe"), BAD_INPUT, "UTF-8")
    refused(run("generate", "out", "-", stdin=""), USAGE, "is empty")


def test_no_command_is_slow_on_a_text_without_line_breaks(root, tmp_path, monkeypatch):
    monkeypatch.setattr("mediator_peft.data_files.LONGEST_LINE", 1000)
    path = Path(tmp_path / "long.jsonl")
    path.write_text("x" * 1001)
    started = time.perf_counter()
    refused(run("fit-router", "out", f"--data=math={path}"), BAD_INPUT, "longer than 1,000 bytes")
    assert time.perf_counter() - started < SECONDS
