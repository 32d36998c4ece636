"""Names in files against names in the model: what is read is what transformers loads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from mediator_peft.checkpoints.folders import FolderCheckpoint
from mediator_peft.checkpoints.name_mapping import named_as_in_model
from mediator_peft.checkpoints.tensor_inventory import outline_of
from mediator_peft.storage import to_tensor
from tests.architectures import tiny_architecture, tiny_config


def gemma3():
    config = tiny_config("gemma3")
    assert isinstance(config, Gemma3Config)
    return Gemma3ForConditionalGeneration(config)


def without_prefix(folder):
    """As the original files of GPT-2 and BLOOM are: names of the body alone."""
    path = folder / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def with_buffers(folder):
    """Former versions of transformers saved GPT-2's causal masks."""
    without_prefix(folder)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path, metadata={"format": "pt"})


KINDS = {
    "gpt2": (lambda: tiny_architecture("gpt2"), with_buffers),
    "bloom": (lambda: tiny_architecture("bloom"), without_prefix),
    "gpt_neox": (lambda: tiny_architecture("gpt_neox"), None),
    "gemma3": (gemma3, None),
    "mixtral": (lambda: tiny_architecture("mixtral"), None),
    "qwen3_moe": (lambda: tiny_architecture("qwen3_moe"), None),
    "deepseek_v3": (lambda: tiny_architecture("deepseek_v3"), None),
    "jamba": (lambda: tiny_architecture("jamba"), None),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """Name, folder, and the state of the model that transformers loads from it."""
    make, change = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make()
    model.save_pretrained(folder)
    if change is not None:
        change(folder)
    return request.param, folder, type(model).from_pretrained(folder).state_dict()


def test_each_tensor_is_what_transformers_loads(kind):
    name, folder, state = kind
    stored = FolderCheckpoint(folder, "base")
    outline = outline_of(stored)
    assert stored.tensors.keys() != state.keys() - outline.tied, f"setup: the files of {name} have the model's names"
    checkpoint = named_as_in_model(stored, outline)
    assert checkpoint.tensors.keys() - outline.tied == state.keys() - outline.tied
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(state[name].shape)
        assert torch.equal(checkpoint.tensor(name), state[name]), name
        if len(state[name]) > 2:
            assert torch.equal(to_tensor(checkpoint.read_rows(name, 1, 3)), state[name][1:3])


def test_one_group_is_held_at_a_time(tmp_path):
    tiny_architecture("mixtral").save_pretrained(tmp_path)
    stored = FolderCheckpoint(tmp_path, "base")
    checkpoint = named_as_in_model(stored, outline_of(stored))
    read = []
    plain = stored.read
    stored.read = lambda name: read.append(name) or plain(name)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    for start in range(4):
        checkpoint.read_rows(fused, start, start + 1)
    assert len(read) == len(set(read)) == 8  # two matrices for each of four experts, each read once
    assert checkpoint.held_bytes(fused) == 2 * checkpoint.tensor(fused).nbytes
    checkpoint.read_rows("model.norm.weight", 0, 4)
    assert checkpoint.held_bytes("model.norm.weight") == 0
    checkpoint.read_rows(fused, 0, 1)
    assert len(read) == 16, "the group was held although another tensor was read"


def test_names_of_the_model_are_left_alone(tmp_path):
    model = tiny_architecture("mixtral")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = FolderCheckpoint(tmp_path, "base")
    assert named_as_in_model(stored, outline_of(stored)) is stored


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_common_decoders_have_no_other_names(kind):
    """The short way asks transformers nothing: it must have no renamings for them but those of former versions."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind))
    assert not get_model_conversion_mapping(model, add_legacy=False)
