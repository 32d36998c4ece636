"""Blocks, linear layers, mixtures of experts and towers of tiny models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mediator_peft.structure import find_structure, gates_named, reads_weight_of, select_layers
from tests.architectures import tiny_config


def skeleton(kind):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(kind))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "lfm2", "qwen3_5_text", "bamba", "falcon_h1"])
def test_a_convolution_is_no_mixture_of_experts(kind):
    model = skeleton(kind)
    structure = find_structure(model)
    assert any("conv" in name and parameter.ndim == 3 for name, parameter in model.named_parameters())
    assert not structure.fused
    assert not structure.gates
    assert {layer.block for layer in structure.layers} == set(range(structure.num_blocks))


GATES = {
    "mixtral": {"mlp.gate.weight"},
    "qwen3_moe": {"mlp.gate.weight"},
    "gpt_oss": {"mlp.router.weight", "mlp.router.bias"},
    "deepseek_v3": {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    "qwen2_moe": {"mlp.gate.weight"},
    "granitemoe": {"block_sparse_moe.router.weight"},
    "jamba": {"feed_forward.router.weight"},
}


@pytest.mark.parametrize("kind", GATES)
def test_fused_experts_and_gates(kind):
    model = skeleton(kind)
    structure = find_structure(model)
    three = {name for name, value in model.named_parameters() if value.ndim == 3 and "conv" not in name}
    assert set(structure.fused) == three
    assert {gate.split(".", structure.blocks.count(".") + 2)[-1] for gate in structure.gates} == GATES[kind]
    assert not structure.gates & {f"{layer.name}.weight" for layer in structure.layers}
    with_gates = ["all-linear", sorted(GATES[kind])[0].rpartition(".")[0]]
    assert gates_named(structure, with_gates) == structure.gates
    assert not gates_named(structure, None)
    assert not gates_named(structure, "all-linear")
    extra = {layer.name for layer in select_layers(structure, with_gates)} - {layer.name for layer in structure.layers}
    assert extra == {layer.name for layer in structure.gate_layers}


def test_only_the_language_model_of_a_multimodal_model_is_routed():
    structure = find_structure(skeleton("gemma3"))
    assert structure.blocks == "model.language_model.layers"
    names = {name.split(".")[1] for name in structure.towers}
    assert names == {"vision_tower", "multi_modal_projector"}
    assert all(layer.name.startswith("model.language_model.") for layer in structure.layers)


def test_a_subclass_of_linear_that_multiplies_is_a_linear_layer():
    assert find_structure(skeleton("falcon")).layers


def test_weights_that_are_read_past_the_layer():
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.mamba.modeling_mamba import MambaMixer

    assert reads_weight_of(MambaMixer, "dt_proj")
    assert not reads_weight_of(MambaMixer, "in_proj")
    assert not any(reads_weight_of(LlamaAttention, f"{part}_proj") for part in "qkvo")
    assert not any(reads_weight_of(LlamaMLP, f"{part}_proj") for part in ("gate", "up", "down"))
