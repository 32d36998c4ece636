"""Few-bit factors with signs of the rest: near what they stand for, of the size that was meant, equal in all ways."""

from __future__ import annotations

import pytest
import torch

from mediator_peft import MediatorConfig, build_mediator, load_mediator, plan_mediator
from mediator_peft.bank.layer_bank import LayerBank, check_parts, from_disk
from mediator_peft.bank.packed_arrays import to_disk
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.checkpoints.adapter_sizes import read_adapter_info
from mediator_peft.errors import AdapterError
from mediator_peft.methods.encoding import ENCODINGS
from mediator_peft.methods.encoding.base import Precision
from mediator_peft.methods.encoding.factors_sign import (
    LEVELS,
    factor_rank,
    nearest_levels,
    pack_codes,
    unpack_codes,
)
from mediator_peft.methods.sparsifying.magnitude import largest_mask
from mediator_peft.storage import as_array, to_tensor
from tests.tiny import random_prompts, write_tiny_checkpoints


def packed(delta, density, rescale="projection"):
    return SparseDelta.from_dense(delta, largest_mask(delta, density), "factors_sign", Precision(rescale=rescale))


def test_codes_come_back():
    codes = torch.randint(0, 8, (7, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_codes(pack_codes(codes), 35), codes.flatten())
    assert len(pack_codes(codes)) == 3 * 5
    levels = torch.tensor(LEVELS)
    numbers = torch.linspace(-4, 4, 101)
    numbers = (numbers / numbers.square().mean().sqrt())[:, None]
    by_hand = (numbers - levels).abs().argmin(dim=1)
    assert torch.equal(nearest_levels(numbers)[:, 0], by_hand)


def test_a_product_of_levels_comes_back_but_for_few_entries():
    """A component whose vectors hold the levels as often as a Gaussian does is found as it is, to its size."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor(LEVELS)
    left, right = (levels[nearest_levels(torch.randn(size, 1, generator=generator))] for size in (256, 200))
    delta = 0.01 * left @ right.T
    found = packed(delta, 0.02).dense()
    assert float((found - delta).norm() / delta.norm()) < 0.05


def test_few_large_entries_are_told_by_signs():
    delta = 0.01 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    places = torch.randperm(128 * 128, generator=torch.Generator().manual_seed(1))[:160]
    delta.view(-1)[places] += 1.0
    found = packed(delta, 0.02, "mean").dense()
    assert float((found - delta).norm() / delta.norm()) < 0.4


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 48), (576, 192)])
@pytest.mark.parametrize("density", [0.02, 0.1, 1.0])
def test_all_ways_of_reading_agree(shape, density):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = packed(delta, density)
    dense = whole.dense()
    x = torch.randn(2, 3, shape[1])
    torch.testing.assert_close(whole.product(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    bank = LayerBank(shape, "factors_sign", has_bias=False)
    bank.put("a", whole)
    stored = {key: to_tensor(to_disk(key, as_array(tensor))) for key, tensor in bank.named_buffers()}
    again = LayerBank(shape, "factors_sign", has_bias=False)
    for key, tensor in stored.items():
        again.put_part(key, from_disk(key, tensor, shape))
    assert torch.equal(again.get("a").dense(), dense)
    assert torch.equal(packed(delta, density).dense(), dense)
    assert not packed(torch.zeros(shape), density).dense().any()


def test_damage_is_seen():
    whole = packed(torch.randn(64, 48, generator=torch.Generator().manual_seed(1)), 0.1)
    for part in ("left_codes", "right_codes", "signs", "scale"):
        bank = LayerBank((64, 48), "factors_sign", has_bias=False)
        bank.put("a", whole)
        bank.put_part(f"a:{part}", whole.parts[part][:-1])
        with pytest.raises(AdapterError, match="layer 'l', expert 'a'"):
            check_parts(bank, "l", {"a": 64 * 48})


@pytest.mark.parametrize("density", [0.02, 0.04, 0.1])
def test_bytes_are_what_was_predicted(density):
    delta = torch.randn(576, 576, generator=torch.Generator().manual_seed(1))
    size = packed(delta, density).num_bytes
    predicted = ENCODINGS["factors_sign"].total_bytes(delta.numel(), density * delta.numel())
    assert size == pytest.approx(predicted, rel=0.06)
    assert factor_rank((576, 576), 0.01) == 8
    assert factor_rank((4096, 4096), 0.01) == 61


@torch.no_grad()
def test_a_model_built_so_answers_in_every_way(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, ("base", "math", "code"))
    experts = {name: paths[name] for name in ("math", "code")}
    settings = MediatorConfig(encoding="factors_sign", density=0.3, routed_layers="all")
    assert plan_mediator(paths["base"], experts, config=settings).is_ok
    build_mediator(paths["base"], experts, tmp_path / "out", settings)
    assert read_adapter_info(tmp_path / "out").bytes_per_parameter > 0
    model, _ = load_mediator(tmp_path / "out")
    prompts = random_prompts(2)
    mixed = model(prompts, expert_weights=["math", {"math": 0.5, "code": 0.5}]).logits
    for row, spec in enumerate(("math", {"math": 0.5, "code": 0.5})):
        with model.use_experts(spec):
            torch.testing.assert_close(model(prompts).logits[row], mixed[row], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again, _ = load_mediator(tmp_path / "again")
    torch.testing.assert_close(
        again(prompts, expert_weights=["math", {"math": 0.5, "code": 0.5}]).logits, mixed, rtol=1e-5, atol=1e-5
    )
