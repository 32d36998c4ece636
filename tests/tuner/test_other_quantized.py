"""Backbones quantised by whom we know nothing of: the layer is called as it is, and the deltas are added."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from reference import load
from tiny import random_prompts, write_tiny_checkpoints
from torch import nn

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.errors import UnsupportedError

MIXES = [{"math": 1.0}, {"math": 0.3, "code": 0.6}, {}]


class PackedLinear(nn.Module):
    """As GPTQ and AWQ have it: codes in buffers, and no attribute ``weight``."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))

    def numbers(self):
        return self.qweight.float() * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.numbers(), self.bias)


class CodedTensor(torch.Tensor):
    """As torchao and quanto have it: a parameter of a class of its own, which cannot be viewed flat."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.reshape, torch.Tensor.view):
            raise NotImplementedError("codes have one shape")
        if func is nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def packed(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(layer))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 8}
    return model


def coded(model):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            rounded = PackedLinear(layer).numbers()
            layer.weight = nn.Parameter(rounded.as_subclass(CodedTensor), requires_grad=False)
    return model


@pytest.fixture
def folders(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(density=0.3, routed_layers="all"))
    return {**paths, "out": tmp_path / "out"}


@pytest.mark.parametrize("quantize", [packed, coded])
@pytest.mark.parametrize("execution", [None, "merged", "sparse", "dense"])
@torch.no_grad()
def test_codes_plus_deltas(folders, quantize, execution):
    model = PeftModel.from_pretrained(quantize(load(folders["out"])), str(folders["out"] / "mediator")).eval()
    whole, _ = load_mediator(folders["out"], dtype=torch.float32)
    model.set_execution(execution)
    prompts = random_prompts(len(MIXES))
    found = model(prompts, expert_weights=MIXES).logits
    for row, mix in enumerate(MIXES):
        plain = load(folders["out"])
        state = plain.state_dict()
        for name, layer in whole.routed_layers().items():
            delta = layer.get_delta_weight("default", tuple(mix.items()))
            numbers = PackedLinear(plain.get_submodule(name)).numbers()
            state[f"{name}.weight"].copy_(numbers + delta)
        expected = plain(prompts[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=2e-4)
    with pytest.raises(UnsupportedError, match="quantised weight"):
        model.merge_adapter(expert_weights="math")
    with model.use_experts("math"):
        torch.testing.assert_close(model(prompts[:1]).logits[0], found[0], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_building_into_codes_that_cannot_be_written_is_refused(folders):
    base = coded(load(folders["base"]))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"build_mediator\(\)"):
        get_mediator_model(base, MediatorConfig(experts={name: str(folders[name]) for name in ("math", "code")}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@torch.no_grad()
def test_layers_of_another_library_need_no_word_in_the_configuration(folders, tmp_path):
    """As HQQ and others replace them in a model that was loaded plainly."""
    coded_model = packed(load(folders["out"]))
    del coded_model.config.quantization_config
    model = PeftModel.from_pretrained(coded_model, str(folders["out"] / "mediator")).eval()
    prompts = random_prompts(2)
    expected = model(prompts, expert_weights="math").logits
    assert not torch.equal(expected, model(prompts, expert_weights="base").logits)
    with pytest.raises(UnsupportedError, match="set_backbone"):
        model.save_pretrained(tmp_path / "saved")
    model.set_backbone(str(folders["out"]))
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(packed(load(folders["out"])), str(tmp_path / "saved")).eval()
    assert torch.equal(again(prompts, expert_weights="math").logits, expected)


@pytest.mark.parametrize(
    "kind", [NotImplementedError, ImportError, ValueError, RuntimeError, NameError, AttributeError]
)
def test_a_quantization_that_transformers_cannot_load_is_refused_by_name(folders, monkeypatch, kind):
    fault = kind("not available yet.")
    from transformers import LlamaForCausalLM

    class HqqConfig:
        pass

    def fail(*arguments, **options):
        raise fault

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(UnsupportedError, match=r"with HqqConfig here: not available yet\. Install"):
        load_mediator(folders["out"], quantization_config=HqqConfig())
