"""Quantised checkpoints read as plain ones: against the quantiser's own library where it runs here, else against codes
that are written down by hand from the format's description."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationMethod

from mediator_peft import build_mediator, load_mediator, plan_mediator
from mediator_peft.checkpoints.opening import Reading, open_checkpoint
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointError
from mediator_peft.storage import to_tensor
from tests.tiny import random_prompts, write_tiny_checkpoints

WEIGHTS = "model.safetensors"
EXACT = MediatorSettings(density=1.0, encoding="float", routed_layers="all")


@pytest.fixture
def paths(tmp_path):
    return write_tiny_checkpoints(tmp_path / "in", only=["proj"])


def words(codes, bits=4):
    """Numbers along the last dimension, eight (of 4 bits) to a word, the first in the lowest bits."""
    rows, columns = codes.shape
    per_word = 32 // bits
    result = torch.zeros(rows, columns // per_word, dtype=torch.int64)
    for place in range(per_word):
        result |= codes[:, place::per_word].long() << (bits * place)
    return torch.where(result >= 2**31, result - 2**32, result).to(torch.int32)


def gptq(weight, bits=4, group=8, zero=7, act_order=True):
    """(codes' tensors, what they stand for): W[o, i] = s[g(i), o] * (q[i, o] - z[g(i), o])."""
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // group
    if act_order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    scales = torch.rand(inputs // group, outputs) * 0.02 + 0.01
    scales = scales.half()
    codes = (weight.T / scales.float()[groups] + zero).round().clamp(0, 2**bits - 1).int()
    stood_for = ((codes - zero).float() * scales.float()[groups]).T
    zeros = torch.full((inputs // group, outputs), zero - 1)
    return {
        "qweight": words(codes.T.contiguous(), bits).T.contiguous(), "qzeros": words(zeros, bits), "scales": scales,
        "g_idx": groups.int(),
    }, stood_for  # fmt: skip


def awq(weight, group=8, zero=7):
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // group
    scales = (torch.rand(inputs // group, outputs) * 0.02 + 0.01).half()
    codes = (weight.T / scales.float()[groups] + zero).round().clamp(0, 15).int()
    stood_for = ((codes - zero).float() * scales.float()[groups]).T

    def interleaved(numbers):
        # Of eight columns, the lowest bits hold the first, then the third, fifth, seventh, second, ...
        order = [8 * block + place for block in range(numbers.shape[1] // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        return words(numbers[:, order])

    zeros = torch.full((inputs // group, outputs), zero)
    return {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}, stood_for


def fp8_blocks(weight, size=16):
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // size), -(-columns // size)) * 0.01 + 0.001
    spread = scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread


def fp8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_tensor(weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int4_packed(weight, group=8):
    rows, columns = weight.shape
    scale = weight.reshape(rows, -1, group).abs().amax(2) / 7
    codes = (weight / scale.repeat_interleave(group, 1)).round().clamp(-8, 7).int()
    stood_for = codes.float() * scale.repeat_interleave(group, 1)
    packed = words(codes + 8)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}, stood_for


def bnb_8bit(weight):
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * largest[:, None] / 127


def bnb_4bit(quant_type, is_nested):
    functional = pytest.importorskip("bitsandbytes").functional

    def quantize(weight):
        # In rows of one block: on a CPU, the library is wrong where a block goes over the end of a row.
        rows = weight.reshape(-1, 64)
        codes, state = functional.quantize_4bit(rows, quant_type=quant_type, compress_statistics=is_nested)
        stood_for = functional.dequantize_4bit(codes, state).reshape(weight.shape)
        state.shape = weight.shape
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": codes, **parts}, stood_for

    return quantize


KINDS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "gptq, 8 bits, in order": (
        lambda weight: gptq(weight, 8, zero=128, act_order=False), {"quant_method": "gptq", "bits": 8, "group_size": 8},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
    "fp8 by blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "fp8 by uneven blocks": (
        lambda weight: fp8_blocks(weight, 20), {"quant_method": "fp8", "weight_block_size": [20, 20]},
    ),
    "fp8 by rows": (fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "fp8 by tensor": (fp8_tensor, {"quant_method": "fp8"}),
    "int8 by rows": (int8_rows, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "int4 packed": (int4_packed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "bitsandbytes int8": (bnb_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes nf4": (bnb_4bit("nf4", False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes nf4, nested": (bnb_4bit("nf4", True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes fp4": (bnb_4bit("fp4", False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}  # fmt: skip


def quantized(folder, kind):
    """Quantise the matrices of the blocks on disk; what they stand for, in the checkpoint's dtype."""
    torch.manual_seed(0)
    quantize, method = KINDS[kind]
    stored, stood_for = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if "_proj.weight" not in name:
            stored[name] = stood_for[name] = weight
            continue
        parts, stood_for[name] = quantize(weight)
        stored.update({f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()})
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / WEIGHTS, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": method}))
    return stood_for


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_as_what_they_stand_for(kind, paths):
    stood_for = quantized(paths["math"], kind)
    ours = open_checkpoint(str(paths["math"]), "expert 'math'", Reading(dequantize=True))
    assert ours.tensors.keys() == stood_for.keys()
    for name, expected in stood_for.items():
        assert ours.tensors[name].shape == tuple(expected.shape)
        torch.testing.assert_close(ours.tensor(name), expected, rtol=1e-6, atol=1e-7)
        groups = [(0, 2), (5, 6)] if expected.ndim > 1 else [(0, 2)]
        rows = torch.cat([expected[start:stop] for start, stop in groups])
        torch.testing.assert_close(to_tensor(ours.read_groups(name, groups)), rows, rtol=1e-6, atol=1e-7)
        assert ours.read_groups(name, []).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kind", ["gptq", "fp8 by blocks", "bitsandbytes nf4, nested"])
def test_a_build_takes_quantised_inputs_on_request_only(kind, paths, tmp_path):
    stood_for = quantized(paths["math"], kind)
    experts = {"math": paths["math"], "code": paths["code"]}
    with pytest.raises(CheckpointError, match="dequantize=True"):
        build_mediator(paths["base"], experts, tmp_path / "out", EXACT)
    assert not plan_mediator(paths["base"], experts, config=EXACT, dequantize=True).problems
    build_mediator(paths["base"], experts, tmp_path / "out", EXACT, dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "dequantize: true" in (tmp_path / "out" / "mediator" / "pipeline.yaml").read_text()
    model, _ = load_mediator(tmp_path / "out")
    expert = AutoModelForCausalLM.from_pretrained(paths["code"])
    expert.load_state_dict(stood_for)
    expected = expert(random_prompts()).logits
    ours = model(random_prompts(), expert_weights="math").logits
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_quantised_base_gives_a_plain_backbone(paths, tmp_path):
    quantized(paths["base"], "fp8 by rows")
    build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", EXACT, dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_mediator(tmp_path / "out")


@pytest.mark.parametrize(
    "method",
    [{"quant_method": "quip"}, {"quant_method": "gptq", "bits": 3}, {"quant_method": "awq", "version": "gemv"}, "x"],
    ids=str,
)
def test_codes_that_are_not_known_are_refused_by_name(method, paths):
    quantized(paths["math"], "fp8 by rows")
    settings = json.loads((paths["math"] / "config.json").read_text())
    (paths["math"] / "config.json").write_text(json.dumps({**settings, "quantization_config": method}))
    name = method["quant_method"] if isinstance(method, dict) else "unknown method"
    with pytest.raises(CheckpointError, match=f"(?i)cannot be dequantised here: {name}"):
        open_checkpoint(str(paths["math"]), "expert 'math'", Reading(dequantize=True))


def test_every_method_of_transformers_is_refused_by_name_or_dequantised_on_request(paths):
    settings = json.loads((paths["math"] / "config.json").read_text())
    readable = {"fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes"}
    assert readable < {method.value for method in QuantizationMethod}
    for method in QuantizationMethod:
        named = {**settings, "quantization_config": {"quant_method": method.value, "bits": 4}}
        (paths["math"] / "config.json").write_text(json.dumps(named))
        with pytest.raises(CheckpointError, match=rf"(?s)quantised.*{method.value}"):
            open_checkpoint(str(paths["math"]), "expert 'math'")
        if method.value in readable:
            open_checkpoint(str(paths["math"]), "expert 'math'", Reading(dequantize=True))
            continue
        with pytest.raises(CheckpointError, match=f"cannot be dequantised here: {method.value} is not among"):
            open_checkpoint(str(paths["math"]), "expert 'math'", Reading(dequantize=True))


def test_codes_without_their_scales_are_refused(paths, tmp_path):
    quantized(paths["math"], "fp8 by rows")
    tensors = load_file(paths["math"] / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.1.mlp.up_proj.weight_scale")}
    save_file(kept, paths["math"] / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", EXACT, dequantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
