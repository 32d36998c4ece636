"""The map from expert weights to stored deltas, by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from mediator_peft.bank.column_map import ColumnMap, average_linkage, families, identity_rows, without_input
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import AdapterError
from mediator_peft.saved_settings import check_saved

FAMILY = {"_family 1": {"a": 1.0, "b": 1.0}, "a": {"a": 1.0}, "b": {"b": 1.0}}


def test_the_worked_example():
    (u,) = ColumnMap.of(FAMILY, ["a", "b"]).apply(torch.tensor([[0.7, 0.3]]))
    torch.testing.assert_close(u, torch.tensor([1.0, 0.7, 0.3]))
    stored = torch.tensor([[3.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(u @ stored, torch.tensor([3.4, 0.6]))
    torch.testing.assert_close(u @ stored, 0.7 * torch.tensor([4.0, 0.0]) + 0.3 * torch.tensor([2.0, 2.0]))


def test_it_is_the_affine_map():
    table = torch.rand(5, 3)
    rows = {"x": {"a": 1.0, "c": 2.0}, "y": {"*": 0.25}, "z": {"b": -1.0, "*": 1.0}}
    matrix = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    expected = table @ matrix.T + torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(ColumnMap.of(rows, ["a", "b", "c"]).apply(table), expected)
    assert torch.equal(ColumnMap.of(identity_rows("abc"), list("abc")).apply(table), table)


def test_the_order_of_experts_changes_no_bit():
    rows = {"f": dict.fromkeys("abcd", 1.0)}
    weights = dict(zip("abcd", (0.1, 1e-7, 0.7, 0.2), strict=True))
    found = {
        float(ColumnMap.of(rows, order).apply(torch.tensor([[weights[name] for name in order]])))
        for order in itertools.permutations("abcd")
    }
    assert len(found) == 1


def test_gradients_reach_the_expert_weights():
    table = torch.rand(2, 2, requires_grad=True)
    ColumnMap.of(FAMILY, ["a", "b"]).apply(table).sum().backward()
    assert torch.equal(table.grad, torch.full((2, 2), 2.0))


def test_what_nothing_uses_is_left_out():
    assert without_input(FAMILY, "a") == {"_family 1": {"b": 1.0}, "b": {"b": 1.0}}
    assert without_input({"x": {"*": 0.1}, **FAMILY}, "b").keys() == {"x", "_family 1", "a"}
    assert families(FAMILY) == {"_family 1": ["a", "b"]}


def test_average_linkage_by_hand():
    cosines = torch.tensor([[1, 0.5, 0.1, 0], [0.5, 1, 0.4, 0], [0.1, 0.4, 1, 0], [0, 0, 0, 1]])
    # After a and b, the mean cosine of c with both is .25.
    assert average_linkage(cosines, "abcd", 0.3) == [["a", "b"], ["c"], ["d"]]
    assert average_linkage(cosines, "abcd", 0.25) == [["a", "b", "c"], ["d"]]
    for order in itertools.permutations(range(4)):
        names = ["abcd"[number] for number in order]
        assert average_linkage(cosines[list(order)][:, list(order)], names, 0.25) == [["a", "b", "c"], ["d"]]


@pytest.mark.parametrize(
    "rows",
    [[], {"a": {}}, {"a": {"stranger": 1.0}}, {"a": {"a": "1"}}, {"a:b": {"a": 1.0}}, {"a": {"a": float("nan")}}],
)
def test_a_damaged_map_is_refused(rows):
    with pytest.raises(AdapterError, match="column_map"):
        check_saved({"column_map": rows, "expert_names": ["a"]}, list(vars(MediatorSettings())))
