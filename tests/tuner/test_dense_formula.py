"""The routed model is the model with ``D + sum_k w_k S_k`` in its weights, for every architecture."""

import pytest
import torch
from reference import load, mixed_model
from tiny import ARCHITECTURES, random_prompts, tiny_model, write_tiny_checkpoints

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator

from .conftest import build

SOME = [
    arch if arch in ("llama", "gpt2", "gemma") else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES
]
"""All architectures, the others by slow tests."""

MIXES = [{"math": 1.0}, {"math": 0.3, "code": 0.6}, {"code": 0.5, "base": 0.5}, {}]


def built(tmp_path, arch, **settings):
    paths = build(tmp_path, arch, settings)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    return paths, model


@pytest.mark.parametrize("encoding", ["sign", "float"])
@pytest.mark.parametrize("arch", SOME)
@torch.no_grad()
def test_each_row_equals_its_own_dense_model(tmp_path, arch, encoding):
    paths, model = built(tmp_path, arch, density=0.3, encoding=encoding)
    prompts = random_prompts(len(MIXES))
    logits = model(input_ids=prompts, expert_weights=MIXES).logits
    with model.disable_adapter():
        backbone = model(input_ids=prompts).logits
    assert (logits[:-1] - backbone[:-1]).abs().amax(dim=(1, 2)).min() > 1e-2, "the adapter changes nothing"
    for row, mix in enumerate(MIXES):
        expected = mixed_model(paths, mix, density=0.3, encoding=encoding)(input_ids=prompts[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ["merged", "sparse", "dense"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_every_way_of_applying_deltas_gives_the_same(tmp_path, arch, execution):
    paths, model = built(tmp_path, arch, density=0.3)
    model.set_execution(execution)
    prompts = random_prompts(4)
    mixed = model(input_ids=prompts, expert_weights=MIXES).logits
    with model.use_experts({"math": 0.7, "code": 0.2}):
        uniform = model(input_ids=prompts).logits
    expected = mixed_model(paths, {"math": 0.7, "code": 0.2}, 0.3, "sign")(input_ids=prompts).logits
    torch.testing.assert_close(uniform, expected, rtol=1e-4, atol=1e-4)
    for row, mix in enumerate(MIXES):
        expected = mixed_model(paths, mix, 0.3, "sign")(input_ids=prompts[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_quantised_values_too_in_every_way_and_after_a_round_trip(tmp_path, encoding):
    pytest.importorskip("bitsandbytes")
    paths, model = built(tmp_path, "llama", density=0.3, encoding=encoding)
    prompts, mix = random_prompts(len(MIXES)), {"math": 0.7, "code": 0.2}
    expected = [mixed_model(paths, row, 0.3, encoding)(input_ids=prompts).logits for row in [*MIXES, mix]]
    assert (expected[0] - expected[-2]).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved", dtype=torch.float32)
    for each in (model, again):
        for execution in ("merged", "sparse", "dense", None):
            each.set_execution(execution)
            logits = each(input_ids=prompts, expert_weights=MIXES).logits
            for row in range(len(MIXES)):
                torch.testing.assert_close(logits[row], expected[row][row], rtol=1e-4, atol=1e-4)
            with each.use_experts(mix):
                torch.testing.assert_close(each(input_ids=prompts).logits, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("llama", "qwen2"))])
@torch.no_grad()
def test_low_rank_deltas_too_in_every_way_and_after_a_round_trip(tmp_path, arch):
    _, model = built(tmp_path, arch, sparsifier="svd", rank=5)
    prompts = random_prompts(len(MIXES))
    expected = []
    for row, mix in enumerate(MIXES):
        dense = load(tmp_path / "out")
        for name, layer in model.base_model.routed_layers().items():
            base = dense.get_submodule(name)
            for column, weight in mix.items():
                delta = layer.mediator_bank["default"].get(column)
                base.weight += weight * (delta.dense().T if arch == "gpt2" else delta.dense())
                if delta.bias is not None:
                    base.bias += weight * delta.bias
        expected.append(dense(input_ids=prompts[row : row + 1]).logits[0])
    with model.disable_adapter():
        assert (model(input_ids=prompts).logits[0] - expected[0]).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved", dtype=torch.float32)
    few, _ = load_mediator(tmp_path / "out", dtype=torch.float32, max_resident_experts=1)
    for each in (model, again, few):
        for execution in ("merged", "sparse", "dense", None):
            each.set_execution(execution)
            logits = each(input_ids=prompts, expert_weights=MIXES).logits
            with each.use_experts(MIXES[1]):
                uniform = each(input_ids=prompts[1:2]).logits[0]
            torch.testing.assert_close(uniform, expected[1], rtol=1e-4, atol=1e-4)
            for row in range(len(MIXES)):
                torch.testing.assert_close(logits[row], expected[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", SOME)
@torch.no_grad()
def test_zero_weights_give_the_backbone_bit_for_bit(tmp_path, arch):
    _, model = built(tmp_path, arch)
    prompts = random_prompts()
    plain = load(tmp_path / "out")(input_ids=prompts).logits
    changed = model(input_ids=prompts, expert_weights="math").logits
    assert not torch.equal(changed, plain)
    assert torch.equal(model(input_ids=prompts, expert_weights=torch.zeros(3)).logits, plain)
    with model.use_experts(None):
        assert torch.equal(model(input_ids=prompts).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=prompts).logits, plain)


@pytest.mark.parametrize("arch", SOME)
@torch.no_grad()
def test_density_one_gives_back_experts_and_base(tmp_path, arch):
    # Experts that differ from the base in targeted layers alone.
    only = ["_proj", "c_attn", "c_proj", "c_fc"]
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", arch=arch, only=only)
    experts = {name: path for name, path in paths.items() if name != "base"}
    config = MediatorConfig(density=1.0, encoding="float", routed_layers="all")
    build_mediator(paths["base"], experts, tmp_path / "out", config)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    prompts = random_prompts()
    for name, path in paths.items():
        expected = load(path)(input_ids=prompts).logits
        torch.testing.assert_close(model(input_ids=prompts, expert_weights=name).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_density_one_is_exact_for_bfloat16_checkpoints(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", dtype=torch.bfloat16, only=["_proj"])
    experts = {name: path for name, path in paths.items() if name != "base"}
    config = MediatorConfig(density=1.0, encoding="float", routed_layers="all")
    build_mediator(paths["base"], experts, tmp_path / "out", config)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.bfloat16)
    merged = model.merge_and_unload(expert_weights="math")
    expected = load(paths["math"]).state_dict()
    for name, tensor in merged.state_dict().items():
        if "_proj" in name:
            assert torch.equal(tensor.float(), expected[name]), name


@torch.no_grad()
def test_a_backbone_equal_to_the_base_works_too(tmp_path):
    paths, model = built(tmp_path, "llama", merge_method="base", density=0.3)
    prompts = random_prompts()
    base = load(paths["base"])(input_ids=prompts).logits
    torch.testing.assert_close(model(input_ids=prompts, expert_weights="base").logits, base)
    expected = mixed_model(paths, {"math": 1.0}, 0.3, "sign", method="base")(input_ids=prompts).logits
    got = model(input_ids=prompts, expert_weights="math").logits
    assert (got - base).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", SOME)
def test_in_memory_and_offline_builds_are_bit_equal(tmp_path, arch):
    paths, offline = built(tmp_path, arch, density=0.25)
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    in_memory = get_mediator_model(tiny_model(arch), MediatorConfig(density=0.25, experts=experts))
    ours, theirs = in_memory.state_dict(), offline.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def test_gradients_reach_the_expert_weights(tmp_path):
    _, model = built(tmp_path, "llama", density=0.3)
    prompts = random_prompts(2)
    weights = torch.tensor([[0.5, 0.2, 0.1], [0.0, 1.0, 0.0]], requires_grad=True)
    with torch.enable_grad():
        model(input_ids=prompts, expert_weights=weights).logits.square().mean().backward()
    step = 1e-3
    for row, column in [(0, 0), (0, 2), (1, 0), (1, 1)]:
        shift = torch.zeros_like(weights)
        shift[row, column] = step
        ahead = model(input_ids=prompts, expert_weights=weights.detach() + shift).logits.square().mean()
        behind = model(input_ids=prompts, expert_weights=weights.detach() - shift).logits.square().mean()
        slope = (ahead - behind) / (2 * step)
        torch.testing.assert_close(weights.grad[row, column], slope, rtol=2e-2, atol=1e-3)
