"""Top-density selection against sorting, one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mediator_peft.methods.sparsifying import SPARSIFIERS
from mediator_peft.methods.sparsifying.magnitude import keep_largest, largest_mask
from mediator_peft.methods.sparsifying.selection import (
    TINY,
    Bracket,
    TopSelection,
    bracket_from_sample,
    count_ones,
    first_ones,
    pack_rows,
    row_sums,
    smallest_kept,
    smallest_kept_of_tiles,
    unpack_rows,
)

DENSITIES = [0.001, 0.05, 0.2, 0.5, 0.999, 1.0]


def matrices():
    """Many ties, no ties, many zeros, all zeros, all equal, tiny and huge numbers, one entry."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(37, 19, generator=generator)
    return {
        "noise": noise,
        "ties": (noise * 2).round(),
        "bf16": (noise * 0.02).bfloat16().float() - (noise * 0.0201).bfloat16().float(),
        "sparse": noise * (noise > 1),
        "zeros": torch.zeros(8, 5),
        "equal": -torch.ones(9, 11),
        "subnormal": noise * 1e-42,
        "huge": noise * 1e37,
        "one": torch.tensor([[3.0]]),
        "row": noise[:1],
        "column": noise[:, :1].contiguous(),
    }


def kept_by_sorting(delta: torch.Tensor, density: float) -> list[bool]:
    """Sort by magnitude, then by place; keep the first ones that are not zero."""
    values = delta.flatten().tolist()
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
    chosen = set(order[: round(density * len(values))])
    return [place in chosen and values[place] != 0 for place in range(len(values))]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", matrices())
def test_mask_is_that_of_sorting(kind, density):
    delta = matrices()[kind]
    assert largest_mask(delta, density).flatten().tolist() == kept_by_sorting(delta, density)


def select(delta: torch.Tensor, density: float, bracket: Bracket, rows: int) -> list[bool] | None:
    shape = (delta.shape[0], delta.shape[1])
    selection = TopSelection(shape, round(density * delta.numel()), bracket)
    for start in range(0, shape[0], rows):
        magnitudes = delta[start : start + rows].abs().contiguous().numpy()
        selection.add(start, magnitudes)
    settled = selection.settle()
    if settled is None:
        return None
    return unpack_rows(settled.kept, shape[1]).reshape(-1).tolist()


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", matrices())
def test_selection_by_tiles_is_that_of_sorting(kind, density, rows):
    delta = matrices()[kind]
    expected = kept_by_sorting(delta, density)
    sample = np.sort(delta.abs().numpy(), axis=None)
    for bracket in (Bracket(TINY, float("inf")), bracket_from_sample(sample, density, 0.1)):
        assert select(delta, density, bracket, rows) == expected


@pytest.mark.parametrize("bracket", [Bracket(2.9, 3.0), Bracket(TINY, TINY), Bracket(0.1, 0.2), Bracket(1e9, 1e9)])
def test_a_bracket_that_misses_is_noticed(bracket):
    delta = matrices()["noise"]
    assert select(delta, 0.2, bracket, 7) is None


@pytest.mark.parametrize("num_kept", [1, 5, 100, 702, 703])
@pytest.mark.parametrize("kind", ["noise", "ties", "bf16", "sparse", "subnormal", "huge"])
def test_smallest_kept_is_the_one_of_sorting(kind, num_kept):
    magnitudes = np.ascontiguousarray(matrices()[kind].abs().numpy().reshape(-1))
    expected = float(np.sort(magnitudes)[::-1][num_kept - 1])
    assert smallest_kept(magnitudes, num_kept) == expected
    assert smallest_kept_of_tiles(lambda: iter(np.array_split(magnitudes, 7)), num_kept) == expected


@pytest.mark.parametrize("kind", ["noise", "ties", "sparse"])
def test_sums_over_rows_of_what_lay_in_the_bracket(kind):
    delta = matrices()[kind]
    magnitudes = delta.abs().numpy()
    edge = float(np.sort(magnitudes, axis=None)[-141])
    high = float(np.quantile(magnitudes, 0.95))
    for bracket in (Bracket(edge, edge), Bracket(edge / 2, max(high, edge))):
        selection = TopSelection((37, 19), 141, bracket)
        selection.add(0, magnitudes)
        settled = selection.settle()
        assert settled is not None
        inside = unpack_rows(settled.kept, 19) & (magnitudes <= np.float32(bracket.high))
        np.testing.assert_allclose(settled.extra_sum, (magnitudes * inside).sum(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(settled.extra_square, (magnitudes**2 * inside).sum(axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 7, 8, 64, 65])
def test_bits_survive_packing(columns):
    bits = np.random.default_rng(0).random((13, columns)) < 0.3
    packed = pack_rows(bits)
    assert packed.shape == (13, (columns + 7) // 8)
    np.testing.assert_array_equal(unpack_rows(packed, columns), bits)
    assert count_ones(packed) == int(bits.sum())
    for number in (0, 1, 3, int(bits.sum())):
        places = np.flatnonzero(bits.reshape(-1))[:number]
        np.testing.assert_array_equal(
            np.flatnonzero(unpack_rows(first_ones(packed, number), columns).reshape(-1)), places
        )


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 31, 33, 4096, 9000])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_of_rows_are_sixteen_sums_in_order(rows, columns):
    matrix = np.random.default_rng(columns).random((rows, columns), np.float32)
    found = row_sums(matrix)
    np.testing.assert_allclose(found, matrix.sum(axis=1, dtype=np.float64), rtol=3e-6)
    for row, number in zip(matrix, found, strict=True):
        lanes = [np.float32(0)] * 16
        for column, value in enumerate(row):
            lanes[column % 16] += value
        totals = [float(lane) for lane in lanes]
        while len(totals) > 1:
            half = len(totals) // 2
            totals = [low + high for low, high in zip(totals[:half], totals[half:], strict=True)]
        assert number == totals[0]


@pytest.mark.parametrize("density", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("name", SPARSIFIERS)
def test_no_dropped_weight_is_larger_than_a_kept_one(name, density):
    delta = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    sparse = SPARSIFIERS[name](delta, density, torch.Generator().manual_seed(0))
    kept = sparse != 0
    if name == "magnitude":
        assert int(kept.sum()) == round(density * delta.numel())
        torch.testing.assert_close(sparse[kept], delta[kept], rtol=0, atol=0)
        assert delta[kept].abs().min() >= delta[~kept].abs().max()


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_density_one_keeps_everything(name):
    delta = torch.randn(16, 24)
    torch.testing.assert_close(SPARSIFIERS[name](delta, 1.0, torch.Generator().manual_seed(0)), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_left_alone_and_the_dtype_is_kept(dtype):
    delta = torch.randn(6, 7).to(dtype)
    before = delta.clone()
    assert keep_largest(delta, 0.3).dtype == dtype
    torch.testing.assert_close(delta, before, rtol=0, atol=0)
