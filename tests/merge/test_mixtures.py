"""Mixtures of experts: fused matrices are linear layers, gates are the base's unless they are named."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from tests.architectures import PROMPT, tiny_architecture

KINDS = {"mixtral": "mlp.gate", "gpt_oss": "mlp.router", "deepseek_v3": "mlp.gate"}


@pytest.fixture(scope="module", params=KINDS)
def trio(request, tmp_path_factory):
    """Name of the gate, folders and models of a base and two experts that differ in all their matrices."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_architecture(request.param)
    models = {"base": base, "math": deepcopy(base), "code": deepcopy(base)}
    for seed, (name, model) in enumerate(models.items()):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim >= 2 and name != "base":
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        model.save_pretrained(folder / name)
    return KINDS[request.param], {name: str(folder / name) for name in models}, models


def built(trio, tmp_path, **settings):
    _, paths, _ = trio
    experts = {name: path for name, path in paths.items() if name != "base"}
    settings = {"density": 1.0, "encoding": "float", "routed_layers": "all", **settings}
    report = build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(**settings))
    return report, AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()


def mean(models, name):
    return torch.stack([models[expert].state_dict()[name] for expert in ("math", "code")]).mean(dim=0)


def test_gates_are_the_bases_and_fused_matrices_of_the_backbone_are_the_average(trio, tmp_path):
    gate, _, models = trio
    report, backbone = built(trio, tmp_path)
    gates = [name for name in backbone if f".{gate}." in name]
    fused = [name for name, tensor in backbone.items() if tensor.ndim == 3]
    assert gates
    assert fused
    for name in gates:
        assert torch.equal(backbone[name], models["base"].state_dict()[name]), name
    for name in fused:
        torch.testing.assert_close(backbone[name], mean(models, name), atol=1e-5, rtol=0)
    notes = " ".join(report.notes)
    assert f"{len(fused)} fused tensors" in notes
    assert f"{len(gates)} tensors of the mixture of experts' gates" in notes


def test_gates_are_merged_when_named(trio, tmp_path):
    gate, _, models = trio
    _, backbone = built(trio, tmp_path, target_modules=["all-linear", gate])
    for name in (name for name in backbone if f".{gate}." in name):
        torch.testing.assert_close(backbone[name], mean(models, name), atol=1e-5, rtol=0)


def test_a_named_expert_is_base_plus_everything_that_is_routed(trio, tmp_path):
    """The dense formula: the expert's own linear layers and fused experts, the averaged rest, the base's gates."""
    _, _, models = trio
    built(trio, tmp_path)
    model, _ = load_mediator(tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    state, own, names = expected.state_dict(), models["math"].state_dict(), model.base_model.routed_layers()
    fused = {name.rpartition(".")[0] for name in names} & state.keys()
    assert fused == {name for name, tensor in state.items() if tensor.ndim == 3}
    wanted = [*fused, *(f"{name}_bias" for name in fused), *(f"{name}.weight" for name in names)]
    for name in state.keys() & set(wanted):
        state[name].copy_(own[name])
    with torch.no_grad():
        torch.testing.assert_close(
            model(PROMPT, expert_weights="math").logits, expected(PROMPT).logits, atol=1e-3, rtol=0
        )


def test_fused_experts_are_routed_where_they_are_named(trio, tmp_path):
    report, _ = built(trio, tmp_path, target_modules=["experts.down_proj"])
    config = json.loads((tmp_path / "out" / "mediator" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name.split(".")[-2] for name in config["routed_modules"]} == {"down_proj"}
    notes = " ".join(report.notes)
    assert "are merged as" in notes
    assert "not named in target_modules" in notes


def test_another_interface_is_averaged_and_the_report_says_why(tmp_path):
    base = tiny_architecture("llama4_text")
    for name in ("base", "math"):
        base.save_pretrained(tmp_path / name)
    report = build_mediator(tmp_path / "base", {"math": tmp_path / "math"}, tmp_path / "out", MediatorConfig())
    notes = " ".join(report.notes)
    assert "another interface" in notes
    assert "averaged and get no deltas" in notes
