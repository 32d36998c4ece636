"""What bias deltas add to each prompt of a mixed batch."""

import pytest
import torch
from torch import nn

from mediator_peft.bank.layer_bank import LayerBank
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.tuner.execution import DeviceRows
from mediator_peft.tuner.expert_weights import make_route
from mediator_peft.tuner.merged_weight import mixed_biases

COLUMNS = ("math", "code", "law")
TABLES = {
    "one mix": [[0.25, 0.5, 0.0]] * 3,
    "each its own": [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, 0.6, 0.1]],
    "the backbone alone": [[0.0, 0.0, 0.0]],
    "an expert without a delta": [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
}


def bank_of(has_bias=True):
    """Deltas of two experts, of zeros but for their biases; the third has none."""
    bank = LayerBank((6, 16), "float", has_bias)
    biases = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for name, bias in zip(COLUMNS, biases, strict=False):
        nothing = torch.zeros(6, 16)
        bank.put(name, SparseDelta.from_dense(nothing, nothing != 0, "float", bias=bias if has_bias else None))
    return bank, biases


@pytest.mark.parametrize("kind", TABLES)
def test_every_prompt_gets_its_own_mix_of_biases(kind):
    bank, biases = bank_of()
    table = torch.tensor(TABLES[kind])
    found = mixed_biases(bank, make_route(table, COLUMNS, False, None))
    expected = table[:, :2] @ biases
    torch.testing.assert_close(torch.zeros_like(expected) if found is None else found, expected)


def test_without_biases_there_is_nothing_to_add():
    bank, _ = bank_of(has_bias=False)
    assert mixed_biases(bank, make_route(torch.ones(2, 3), COLUMNS, False, None)) is None


@torch.no_grad()
@pytest.mark.parametrize("kind", TABLES)
def test_every_token_of_a_prompt_gets_its_biases_in_the_way_for_few_rows(kind, monkeypatch):
    """Its kernel needs a GPU; the biases beside it do not."""
    monkeypatch.setattr(LayerBank, "on_device", lambda *_: None)
    bank, biases = bank_of()
    table = torch.tensor(TABLES[kind])
    layer, x = nn.Linear(16, 6), torch.randn(len(table), 4, 16)
    found = DeviceRows(x, layer, bank, make_route(table, COLUMNS, False, None))(x)
    torch.testing.assert_close(found, layer(x) + (table[:, :2] @ biases)[:, None])
