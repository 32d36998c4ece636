"""Malformed input as a user meets it: the command ends with 3 and a message, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mediator_peft.cli.app import app

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MATRIX = "model.layers.1.mlp.up_proj.weight"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
ENTRY = {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}
DEEP = b"[" * 100_000


@pytest.fixture
def folder(pristine, tmp_path):
    for name in ("base", "math", "code"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def refused(arguments, folder, message, code=3):
    """Run a command that must be refused; the folder is as it was."""
    before = sorted(folder.iterdir())
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(shown.exception, SystemExit), repr(shown.exception)
    assert shown.exit_code == code, shown.stderr
    said = " ".join(shown.stderr.split())
    assert message in said
    assert "Traceback" not in said
    assert sorted(folder.iterdir()) == before
    return said


def inputs(folder):
    return ["--base", folder / "base", "--expert", f"math={folder / 'math'}", "--expert", f"code={folder / 'code'}"]


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return put(WEIGHTS, struct.pack("<Q", len(text)) + text + b"\0" * 64)


def tensor(value):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, MATRIX: value(tensors[MATRIX]).contiguous()}, folder / WEIGHTS)

    return change


def settings(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def shards(first_lacks=(), listed=lambda name: "b.safetensors" if name == MATRIX else "a.safetensors", second=True):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        save_file({name: tensors[name] for name in tensors if name not in first_lacks}, folder / "a.safetensors")
        if second:
            save_file({MATRIX: tensors[MATRIX]}, folder / "b.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: listed(name) for name in tensors}}))

    return change


def index(content):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_bytes(content)

    return change


def replaced(name, make):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def lora(tensors=None, rank_of_b=2, outputs=32, module=MODULE, raw=None, **changes):
    def change(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
        (folder / "adapter_config.json").write_bytes(json.dumps(content).encode() if raw is None else raw)
        pair = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(outputs, rank_of_b)}
        save_file(pair if tensors is None else tensors, folder / "adapter_model.safetensors")

    return change


# What is done to a checkpoint → what the message must say.
CHECKPOINTS = {
    "overlapping tensors": (header({"a": ENTRY, "b": ENTRY}), "lacks tensors"),
    "unknown dtype": (header({MATRIX: {**ENTRY, "dtype": "Q3"}}), "no plain floating point"),
    "lengths that are words": (header({MATRIX: {**ENTRY, "shape": ["x", 8]}}), "malformed"),
    "half a row": (header({MATRIX: {**ENTRY, "shape": [4.5, 8]}}), "lacks tensors"),
    "an endless length": (header(b'{"a":{"dtype":"BF16","shape":[1e999],"data_offsets":[0,64]}}'), "malformed"),
    "absurd lengths": (header({MATRIX: {**ENTRY, "shape": [1 << 62, 1 << 62]}}), "offsets"),
    "header too deep": (header(DEEP), "no JSON"),
    "header in no encoding": (header(b'{"\xff":1}'), "no JSON"),
    "a file without tensors": (put(WEIGHTS, struct.pack("<Q", 2) + b"{}"), "lacks tensors"),
    "plain weights said to be quantised": (
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "has a quantization_config",
    ),
    "no rows": (tensor(lambda matrix: matrix[:0]), "other shapes"),
    "a number for a matrix": (tensor(lambda matrix: matrix[0, 0]), "other shapes"),
    "a vector for a matrix": (tensor(torch.flatten), "other shapes"),
    "a tensor in two shards": (shards(), "b.safetensors has tensors that a.safetensors has as well"),
    "a shard without its tensor": (shards((MATRIX,), lambda _: "a.safetensors", second=False), "lacks tensors"),
    "index maps nothing": (index(b'{"weight_map": {}}'), "lacks tensors"),
    "index maps a list": (index(b'{"weight_map": ["a"]}'), "index.json is damaged"),
    "index maps to numbers": (index(b'{"weight_map": {"a": 1}}'), "index.json is damaged"),
    "index is binary": (index(b"\xff\xfe"), "index.json is damaged"),
    "index is too deep": (index(DEEP), "index.json is damaged"),
    "index leaves by the root": (index(b'{"weight_map": {"a": "/etc/passwd"}}'), "outside"),
    "a folder for a file": (replaced(WEIGHTS, Path.mkdir), "no model.safetensors"),
    "a link to itself": (replaced(WEIGHTS, lambda path: path.symlink_to(path.name)), "no model.safetensors"),
    "a link to nothing": (replaced(WEIGHTS, lambda path: path.symlink_to("nowhere")), "no model.safetensors"),
    "a file for the folder": (lambda folder: replaced(folder.name, Path.touch)(folder.parent), "no folder"),
    "a folder that links to itself": (
        lambda folder: replaced(folder.name, lambda path: path.symlink_to(path.name))(folder.parent),
        "no folder",
    ),
    "nothing in the folder": (lambda folder: replaced(folder.name, Path.mkdir)(folder.parent), "no model.safetensors"),
    "a folder for the config": (replaced("config.json", Path.mkdir), "config.json"),
    "config is a list": (put("config.json", b"[]"), "config.json cannot be read"),
    "config is null": (put("config.json", b"null"), "config.json cannot be read"),
    "config is binary": (put("config.json", b"\xff\xfe\x00"), "config.json cannot be read"),
    "config is too deep": (put("config.json", DEEP), "config.json cannot be read"),
    "config is empty": (put("config.json", b""), "config.json"),
    "model type is a list": (settings(model_type=["llama"]), "config.json cannot be read"),
    "number of blocks is a word": (settings(num_hidden_layers="three"), "config.json cannot be read"),
    "a block more": (settings(num_hidden_layers=4), "num_hidden_layers"),
    "no heads": (settings(num_attention_heads=0), "config.json cannot be read"),
    "heads do not divide": (settings(num_attention_heads=5), "config.json cannot be read"),
    "vocabulary without a size": (settings(vocab_size=None), "config.json cannot be read"),
    "hidden size is missing": (settings(hidden_size=None), "config.json cannot be read"),
    "rope is a word": (settings(rope_parameters="x"), "config.json cannot be read"),
    "kinds of layers are a number": (settings(layer_types=5), "config.json cannot be read"),
    "another activation": (settings(hidden_act="gelu"), "hidden_act"),
    "an encoder": (settings(model_type="bert", architectures=["BertModel"]), "model_type"),
}

LORAS = {
    "layer beyond the model": (lora(module=MODULE.replace("0", "9")), "no such layer"),
    "factors of two ranks": (lora(rank_of_b=3), "do not fit together"),
    "rank other than said": (lora(r=4), "have rank 2, adapter_config.json says 4"),
    "rank other than its pattern says": (lora(rank_pattern={"q_proj": 8}), "have rank 2"),
    "outputs missing": (lora(outputs=31), "the base has"),
    "one factor alone": (lora({f"{MODULE}.lora_B.weight": torch.ones(32, 2)}), "missing"),
    "factors are numbers": (
        lora({f"{MODULE}.lora_{part}.weight": torch.tensor(1.0) for part in "AB"}),
        "do not fit together",
    ),
    "factors of whole numbers": (
        lora({f"{MODULE}.lora_{part}.weight": torch.ones(32, 32, dtype=torch.int8) for part in "AB"}),
        "no plain floating point",
    ),
    "unknown tensor": (lora({"base_model.model.x.lora_Q.weight": torch.ones(2, 2)}), "not known of LoRA"),
    "another kind of adapter": (lora(peft_type="IA3"), "cannot be folded"),
    "DoRA": (lora(use_dora=True), "DoRA"),
    "rank 0": (lora(r=0), "r must be a whole number"),
    "rank is a word": (lora(r="two"), "r must be a whole number"),
    "no alpha": (lora(lora_alpha=None), "lora_alpha must be a number"),
    "alpha is no number": (lora(raw=b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'), "lora_alpha must be"),
    "patterns are a list": (lora(rank_pattern=[1]), "rank_pattern must be pairs"),
    "a pattern that is none": (lora(alpha_pattern={"(": 3}), "cannot be read"),
    "config is no JSON": (lora(raw=b"{"), "adapter_config.json cannot be read"),
    "config is a list": (lora(raw=b"[]"), "cannot be folded"),
    "config is too deep": (lora(raw=DEEP), "adapter_config.json cannot be read"),
}


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize("kind", [*CHECKPOINTS, *(f"LoRA: {kind}" for kind in LORAS)])
def test_a_broken_expert_ends_the_command(command, kind, folder):
    damage, message = CHECKPOINTS[kind] if kind in CHECKPOINTS else LORAS[kind.removeprefix("LoRA: ")]
    damage(folder / "math")
    said = refused([command, *inputs(folder), "--output", folder / "out"], folder, message)
    assert "expert 'math'" in said


@pytest.mark.parametrize("kind", ["a tensor in two shards", "config is null", "no heads", "index is too deep"])
def test_a_broken_base_ends_the_command(kind, folder):
    damage, message = CHECKPOINTS[kind]
    damage(folder / "base")
    refused(["build", *inputs(folder), "--output", folder / "out"], folder, message)


TOKENIZERS = {
    "no JSON": b"{",
    "too deep": DEEP,
    "vocabulary is a number": b'{"model": {"vocab": 5}}',
    "pairs that are none": b'{"model": {"vocab": [1, 2]}}',
    "ids are words": b'{"model": {"vocab": {"a": "b"}}}',
    "added tokens are a word": b'{"model": {"vocab": {"a": 0}}, "added_tokens": "x"}',
    "an added token without id": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}',
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_compared_does_not_hinder(kind, folder):
    (folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "math" / "tokenizer.json").write_bytes(TOKENIZERS[kind])
    planned = CliRunner().invoke(app, [str(part) for part in ["plan", *inputs(folder)]])
    assert planned.exit_code == 0, repr(planned.exception)


BLOCKS = [{"block": block, "routed": True, "density": 0.2} for block in range(3)]
PLANS = {
    "a block too many": ({"blocks": [*BLOCKS, {**BLOCKS[0], "block": 9}]}, "it names [0, 1, 2, 9]"),
    "a block twice": ({"blocks": [*BLOCKS, BLOCKS[0]]}, "it names [0, 0, 1, 2]"),
    "density above 1": ({"blocks": [{**BLOCKS[0], "density": 2}, *BLOCKS[1:]]}, "density must be in"),
    "density is no number": ({"blocks": [{**BLOCKS[0], "density": float("nan")}, *BLOCKS[1:]]}, "density must be in"),
    "density is a list": ({"blocks": [{**BLOCKS[0], "density": [1]}, *BLOCKS[1:]]}, "density must be in"),
    "a block is a number": ({"blocks": [1, *BLOCKS[1:]]}, "no object"),
    "a typing error": ({"blocks": BLOCKS, "blcks": 1}, "Did you mean 'blocks'"),
    "blocks are a word": ({"blocks": "x"}, "list 'blocks'"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_wrong_plan_ends_the_command(kind, folder):
    content, message = PLANS[kind]
    (folder / "plan.json").write_text(json.dumps({"plan_version": 1, **content}))
    plan = ["--plan", folder / "plan.json"]
    refused(["build", *inputs(folder), "--output", folder / "out", *plan], folder, message)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", DEEP], ids=["empty", "binary", "too deep"])
def test_a_plan_that_cannot_be_read_ends_the_command(content, folder):
    (folder / "plan.json").write_bytes(content)
    plan = ["--plan", folder / "plan.json"]
    refused(["build", *inputs(folder), "--output", folder / "out", *plan], folder, "cannot be read")


BUILD = {"base": "base", "experts": {"math": "math"}, "output": "out"}
PIPELINES = {
    "section": ({"evel": {}}, "Did you mean 'eval'"),
    "key of build": ({"build": {**BUILD, "otput": 1}}, "Did you mean 'output'"),
    "key of calibrate": ({"calibrate": {"data": {"math": "x"}, "batchsize": 1}}, "Did you mean 'batch_size'"),
    "key of eval": ({"eval": {"data": {"math": "x"}, "mach": 1}}, "Did you mean 'match'"),
    "key that a build writes": ({"build": {**BUILD, "config": {"num_blocks": 3}}}, "unknown key of build.config"),
    "experts are a list": ({"build": {**BUILD, "experts": ["a"]}}, "build.experts must be pairs"),
    "an expert is a number": ({"build": {**BUILD, "experts": {"math": 5}}}, "build.experts.math must be a path"),
    "output is a number": ({"build": {**BUILD, "output": 5}}, "build.output must be text"),
    "plan is a list": ({"build": {**BUILD, "plan": [1]}}, "build.plan must be text"),
    "report is a list": ({"eval": {"data": {"math": "x"}, "report": [1]}}, "eval.report must be text"),
    "data is nothing": ({"calibrate": {"data": {"math": None}}}, "calibrate.data.math must be a path"),
    "data that is not there": ({"calibrate": {"data": {"math": "x"}}}, "calibrate.data.math: no file 'x'"),
    "targets are a number": ({"build": {**BUILD, "config": {"target_modules": 5}}}, "target_modules must be"),
    "encoding is a list": ({"build": {**BUILD, "config": {"encoding": ["sign"]}}}, "encoding must be a name"),
    "a sparsifier is a list": ({"build": {**BUILD, "config": {"sparsifier": ["svd"]}}}, "sparsifier must be a name"),
    "seed is a word": ({"build": {**BUILD, "config": {"seed": "x"}}}, "seed must be a whole number"),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_wrong_pipeline_ends_the_command(kind, folder):
    content, message = PIPELINES[kind]
    (folder / "all.yaml").write_text(yaml.safe_dump({"build": BUILD, **content}))
    refused(["run", folder / "all.yaml"], folder, message)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"[" * 5000, b"a: !!python/object/apply:os.system [ls]"])
def test_a_pipeline_that_cannot_be_read_ends_the_command(content, folder):
    (folder / "all.yaml").write_bytes(content)
    refused(["run", folder / "all.yaml"], folder, "cannot be read")


ARGUMENTS = {
    "output is a file": (["--output", "file"], "exists"),
    "output is a link to itself": (["--output", "loop"], "exists"),
    "output is a link to nothing": (["--output", "nowhere"], "exists"),
    "output below a file": (["--output", "file/out"], "cannot be written"),
    "output with a long name": (["--output", "x" * 300], "name too long"),
    "base with a long name": (["--base", "x" * 5000], "no path"),
    "a home that nobody has": (["--base", "~nobodys/x"], "no path"),
    "router beyond the model": (["--router-layer", "9"], "router_layer 9 is beyond"),
    "a negative seed": (["--seed", "-1"], "seed must be"),
    "a budget too small": (["--budget", "1B"], "too small"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_wrong_argument_ends_the_command(kind, folder, monkeypatch):
    arguments, message = ARGUMENTS[kind]
    (folder / "file").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("not there")
    monkeypatch.chdir(folder)
    refused(["build", *inputs(folder), "--output", "out", *arguments], folder, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_file_that_may_not_be_read_ends_the_command(folder):
    (folder / "math" / WEIGHTS).chmod(0)
    refused(["build", *inputs(folder), "--output", folder / "out"], folder, "expert 'math'")
