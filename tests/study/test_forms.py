"""Forms of a delta: what comes back and the bytes that it takes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from mediator_peft.bank.layer_bank import delta_buffers
from mediator_peft.bank.packed_arrays import to_disk
from mediator_peft.merge.delta_packing import pack_delta
from mediator_peft.storage import BFLOAT16, as_array
from mediator_peft.study.forms import (
    components,
    neurons,
    packed,
    signs_and_factors,
    three_bit_factors,
    whole,
)
from mediator_peft.tuner.config import MediatorConfig

DELTA = 0.01 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
NAME = "model.layers.0.mlp.up_proj.weight"


def test_the_whole_delta_takes_16_bits():
    assert torch.equal(whole(DELTA, NAME).dense, DELTA)
    assert whole(DELTA, NAME).num_bytes == 2 * 64 * 48


@pytest.mark.parametrize("encoding", ["sign", "factors_sign"])
def test_an_encoding_is_the_librarys_with_the_bytes_of_its_file(encoding):
    stored = packed(0.2, encoding=encoding)(DELTA, NAME)
    by_library = pack_delta(MediatorConfig(encoding=encoding), NAME, DELTA, 0.2, BFLOAT16, None)
    assert torch.equal(stored.dense, by_library.dense())
    parts = {key: torch.from_numpy(to_disk(key, as_array(part)).view("uint8").copy())
             for key, part in delta_buffers("expert", by_library).items()}  # fmt: skip
    head = int.from_bytes(save(parts)[:8], "little") + 8
    assert stored.num_bytes == len(save(parts)) - head


def test_neurons_are_rows_or_columns_with_the_largest_change():
    stored = neurons(0.25)(DELTA, NAME)
    kept = (stored.dense != 0).any(dim=1)
    assert set(torch.nonzero(kept).flatten().tolist()) == set(DELTA.norm(dim=1).topk(16).indices.tolist())
    assert torch.equal(stored.dense[kept].sign(), DELTA[kept].sign())
    assert float((stored.dense * DELTA).sum()) == pytest.approx(float(DELTA.square().sum()), rel=1e-4)
    assert stored.num_bytes == 64 / 8 + 16 * 48 / 8 + 2 * 16
    back = neurons(0.25)(DELTA, NAME.replace("up_proj", "down_proj"))
    assert int((back.dense != 0).any(dim=0).sum()) == 12
    assert back.num_bytes == 48 / 8 + 12 * 64 / 8 + 2 * 64


def test_factors_take_three_bits_a_number():
    one = torch.outer(DELTA[:, 0].sign(), DELTA[0].sign())
    stored = components(1)(one, NAME)
    assert stored.num_bytes == (3 * (64 + 48) + 48) / 8
    torch.testing.assert_close(stored.dense, one)
    both = signs_and_factors(0.1, 0.05)(DELTA, NAME)
    signs = packed(0.1)(DELTA, NAME)
    rest = three_bit_factors(0.05)(DELTA - signs.dense, NAME)
    assert torch.equal(both.dense, signs.dense + rest.dense)
    assert both.num_bytes == signs.num_bytes + rest.num_bytes
