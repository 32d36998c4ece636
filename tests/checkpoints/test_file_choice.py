"""Which files a checkpoint is read from: the same as transformers reads, for any mix of them."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mediator_peft import build_mediator
from mediator_peft.checkpoints.opening import Reading, open_checkpoint
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointError
from tests.tiny import tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
STATES = {name: tiny_model(seed=seed).state_dict() for seed, name in enumerate((SINGLE, INDEX, PICKLE, PICKLE_INDEX))}


def write(folder, kind):
    """One kind of weights; each has values of its own."""
    state = STATES[kind]
    half = len(state) // 2
    if kind == SINGLE:
        save_file(state, folder / SINGLE, metadata={"format": "pt"})
    elif kind == PICKLE:
        torch.save(state, folder / PICKLE)
    else:
        stem, ending = ("model", "safetensors") if kind == INDEX else ("pytorch_model", "bin")
        names = [f"{stem}-0000{number}-of-00002.{ending}" for number in (1, 2)]
        parts = dict(list(state.items())[:half]), dict(list(state.items())[half:])
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name, metadata={"format": "pt"}) if kind == INDEX else torch.save(
                part, folder / name
            )
        # The index gives every tensor to the wrong shard: what counts is where it lies.
        weight_map = {name: names[name in parts[0]] for name in state}
        (folder / kind).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def empty(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / SINGLE).unlink()
    return tmp_path / "model"


MIXES = [mix for count in (1, 2, 3, 4) for mix in itertools.combinations(STATES, count)]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_any_mix_of_files_is_read_as_transformers_reads_it(mix, empty):
    for kind in mix:
        write(empty, kind)
    loaded = AutoModelForCausalLM.from_pretrained(empty).state_dict()
    ours = open_checkpoint(str(empty), "model", Reading(allow_pickle=True))
    assert ours.tensors.keys() == loaded.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(ours.tensor(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_a_file_that_the_configuration_names_goes_first(named, empty):
    write(empty, SINGLE)
    save_file(STATES[PICKLE], empty / "other.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(STATES[PICKLE], "other.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (empty / "other.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps({**settings, "transformers_weights": named}))
    loaded = AutoModelForCausalLM.from_pretrained(empty).state_dict()
    ours = open_checkpoint(str(empty), "model")
    for name, tensor in loaded.items():
        torch.testing.assert_close(ours.tensor(name), tensor, rtol=0, atol=0)
    shutil.copytree(empty, empty.parent / "expert")
    build_mediator(empty, {"a": empty.parent / "expert"}, empty.parent / "out", MediatorSettings())
    built = AutoModelForCausalLM.from_pretrained(empty.parent / "out").state_dict()
    for name, tensor in loaded.items():
        torch.testing.assert_close(built[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("named", ["../x.safetensors", "pytorch_model.bin", "gone.safetensors"])
def test_a_named_file_that_cannot_be_used_is_refused(named, empty):
    settings = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps({**settings, "transformers_weights": named}))
    with pytest.raises(CheckpointError, match="names"):
        open_checkpoint(str(empty), "model")


def test_a_tensor_outside_of_the_index_that_the_model_has_not_is_passed_over(empty, tmp_path):
    write(empty, INDEX)
    shutil.copytree(empty, tmp_path / "expert")
    shard = tmp_path / "expert" / "model-00002-of-00002.safetensors"
    part = dict(list(STATES[INDEX].items())[len(STATES[INDEX]) // 2 :])
    save_file({**part, "value_head.weight": torch.randn(1, 32)}, shard, metadata={"format": "pt"})
    build_mediator(empty, {"a": tmp_path / "expert"}, tmp_path / "out", MediatorSettings())
    index = tmp_path / "expert" / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["value_head.weight"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="value_head"):
        build_mediator(empty, {"a": tmp_path / "expert"}, tmp_path / "out2", MediatorSettings())


def lfs(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:46657a\nsize 4932307584\n"
    for path in folder.glob("model*.safetensors"):
        path.write_bytes(pointer)


def custom_code(folder):
    settings = json.loads((folder / "config.json").read_text())
    custom = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps({**settings, **custom}))


def setting(**changes):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def only(*names):
    def change(folder):
        for path in folder.glob("model*"):
            path.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")

    return change


# What is wrong with a folder → what is said of it, once.
SAID = {
    "Git LFS pointers": (lfs, "Git LFS pointers"),
    "custom code": (custom_code, "asks for custom code"),
    "a byte order mark": (
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text(), encoding="utf-8-sig"),
        "config.json cannot be read",
    ),
    "2**64 layers": (setting(num_hidden_layers=2**64), "num_hidden_layers = 18446744073709551616"),
    "2**64 layers of a model that is not known by heart": (
        setting(num_hidden_layers=2**64, model_type="gemma"),
        "num_hidden_layers = 18446744073709551616",
    ),
    "labels without end": (setting(num_labels=10**10), "num_labels = 10000000000"),
    "layers in a part": (setting(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers = 1000000000"),
    "nesting without end": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 300 + "1" + "}" * 300),
        "64 levels of nesting",
    ),
    "lists without end": (
        lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 300 + "]" * 300 + "}"),
        "levels of nesting",
    ),
    "config is a pipe": (pipe("config.json"), "no config.json"),
    "weights are a pipe": (pipe("model-00001-of-00002.safetensors"), "are missing"),
    "index is a pipe": (pipe(INDEX), "no model.safetensors"),
    "GGUF": (only("model-Q4_K_M.gguf"), "holds GGUF files"),
    "Meta's files": (only("consolidated.00.pth"), "holds Meta's .pth files"),
    "DeepSpeed": (only("zero_to_fp32.py"), "zero_to_fp32.py makes weights"),
    "one folder deeper": (only("checkpoint-10/model.safetensors"), "weights in checkpoint-10"),
}


@pytest.mark.parametrize("kind", SAID)
def test_a_folder_that_cannot_be_read_says_why_once(kind, empty):
    write(empty, INDEX)
    damage, message = SAID[kind]
    damage(empty)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(empty), "expert 'a'")
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "model-00002-of-00002.safetensors", "the folder"])
def test_what_may_not_be_read_is_said_once(name, empty, monkeypatch):
    write(empty, SINGLE if name == SINGLE else INDEX)
    target = str(empty if name == "the folder" else empty / name)

    def deny(call):
        def denied(path, *arguments, **options):
            if str(path) == target or (name == "the folder" and str(path).startswith(target + os.sep)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **options)

        return denied

    monkeypatch.setattr("builtins.open", deny(open))
    monkeypatch.setattr("io.open", deny(open))
    if name == "the folder":
        monkeypatch.setattr(os, "stat", deny(os.stat))
    with pytest.raises(CheckpointError, match="ermission denied") as refused:
        open_checkpoint(str(empty), "expert 'a'")
    assert len(str(refused.value).splitlines()) == 1


def test_code_in_a_checkpoint_is_never_asked_about(empty, monkeypatch):
    write(empty, SINGLE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    setting(auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})(empty)
    (empty / "mine.py").write_text("raise SystemExit('code was run')")
    shutil.copytree(empty, empty.parent / "expert")
    build_mediator(empty, {"a": empty.parent / "expert"}, empty.parent / "out", MediatorSettings())
    assert "auto_map" not in json.loads((empty.parent / "out" / "config.json").read_text())
