"""The native loops of a build give what plain numpy gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mediator_peft.kernels import build_loops, dispatch
from mediator_peft.merge import signed_selection as signed
from mediator_peft.merge import tiles
from mediator_peft.methods.sparsifying.selection import chosen_ones, first_ones
from mediator_peft.storage import BFLOAT16, FLOAT16, FLOAT32, float_type, to_tensor, widened
from tests.merge.helpers import EXPERTS, InMemory, build, digests
from tests.tiny import write_tiny_checkpoints

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are not there")

SHAPES = [(1, 1), (3, 7), (5, 8), (4, 15), (2, 16), (7, 17), (3, 40), (6, 64), (2, 577)]


def packed(bits):
    return np.packbits(bits, axis=1, bitorder="little")


def values_of(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    values.reshape(-1)[::5] = 0
    values.reshape(-1)[1::7] = -0.0
    values.reshape(-1)[2::11] = 1.25  # on the edge of the bracket
    return values


def selections_of(shape, brackets):
    """One selection for each bracket, with rubbish where the marks will be."""
    selections = [signed.SignedSelection(shape, 1.0, np.ones(3, np.float32)) for _ in brackets]
    for selection, bracket in zip(selections, brackets, strict=True):
        selection.restart(signed.Bracket(*bracket))
        for array in (selection.negative, selection.selection.above, selection.selection.inside, selection.sums):
            array.fill(255)
    return selections


BRACKETS = [(0.5, 1.25), (1.25, 1.25), (1e-45, np.inf), (np.inf, np.inf)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("use_loops", [True, False])
def test_marking_is_comparing_and_summing(shape, kind, use_loops, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    pairs = [
        (build_loops.rounded(values_of(shape, seed), kind), build_loops.rounded(values_of(shape, seed + 9), kind))
        for seed in range(len(BRACKETS))
    ]
    pairs[1] = (pairs[1][0], np.zeros(shape, kind.array))  # many entries on the edge, some of them -0.0
    selections = selections_of(shape, BRACKETS)
    marking = signed.Marking(selections, tiles.Workspace())
    for start in range(0, shape[0], 2):
        marking.add(start, [(a[start : start + 2], b[start : start + 2]) for a, b in pairs])
    for selection, (low, high), (minuend, subtrahend) in zip(selections, BRACKETS, pairs, strict=True):
        values = widened(minuend) - widened(subtrahend)
        magnitudes = abs(values).astype(np.float64)
        above, inside = magnitudes > high, (magnitudes >= np.float32(low)) & ~(magnitudes > high)
        np.testing.assert_array_equal(selection.negative, packed(values < 0))
        np.testing.assert_array_equal(selection.selection.above, packed(above))
        np.testing.assert_array_equal(selection.selection.inside, packed(inside))
        assert (selection.selection._num_above, selection.selection._num_inside) == (above.sum(), inside.sum())
        if low != high:
            np.testing.assert_array_equal(np.concatenate(selection.selection._values), magnitudes[inside])
        sums = [(magnitudes**2).sum(1), (magnitudes * above).sum(1), (magnitudes**2 * above).sum(1)]
        np.testing.assert_allclose(selection.sums, np.stack(sums, axis=1), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096), (3, 5001)])
@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT32], ids=str)
def test_marks_and_sums_are_the_same_to_the_last_bit(shape, kind, monkeypatch):
    first, second = (build_loops.rounded(values_of(shape, seed), kind) for seed in (3, 4))
    found = []
    for native_or_none in (dispatch.native(), None):
        monkeypatch.setattr(dispatch, "native", lambda given=native_or_none: given)
        selections = selections_of(shape, BRACKETS)
        signed.Marking(selections, tiles.Workspace()).add(0, [(first, second)] * len(BRACKETS))
        found.append([array for each in selections for array in (each.sums, each.negative, each.selection.above)])
    for fast, slow in zip(*found, strict=True):
        np.testing.assert_array_equal(fast, slow)


def test_marking_writes_nothing_beyond_the_rows():
    """The last byte of the last row is followed by numbers that are not its own."""
    for columns in (1, 7, 8, 9, 16, 17, 24, 25):
        frame = np.full((4, (columns + 7) // 8), 170, np.uint8)
        selection = selections_of((4, columns), [(0.5, 1.0)])[0]
        selection.negative, selection.selection.above, selection.selection.inside = frame, frame, frame
        ones = np.ones((2, columns), np.float32)
        signed.Marking([selection], tiles.Workspace()).add(1, [(ones, 0 * ones)])
        np.testing.assert_array_equal(frame[[0, 3]], 170)
        assert not (frame[1:3] == 170).any()


@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1,), (77,), *SHAPES, (5, 4096), (3, 2, 9)])
@pytest.mark.parametrize(
    ("method", "dtype"), [("average", torch.bfloat16), ("base", torch.bfloat16), ("average", torch.float32)]
)
def test_merging_a_tile_is_what_torch_does(num_experts, shape, method, dtype, monkeypatch):
    torch.manual_seed(num_experts)
    stored = [torch.randn(shape).to(dtype) for _ in range(num_experts + 1)]
    for number, tensor in enumerate(stored):
        tensor.view(-1)[number % 2 :: 3] = -0.0
        tensor.view(-1)[2::7] = 0.5
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 64)
    found = []
    for native_or_none in (dispatch.native(), None):
        monkeypatch.setattr(dispatch, "native", lambda given=native_or_none: given)
        seen = tiles.TensorTiles(
            "w", [InMemory({"w": each}) for each in stored], float_type(dtype), method, tiles.Workspace()
        )
        found.append([(tile.backbone.copy(), tile.energies) for tile in seen])
    for fast, slow in zip(*found, strict=True):
        for one, other in zip(fast, slow, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    differences = torch.stack([tensor.float() - stored[0].float() for tensor in stored[1:]])
    merged = stored[0].float() + (sum(differences) / num_experts if method == "average" else 0)
    backbone = to_tensor(np.concatenate([part for part, _ in found[0]]))
    torch.testing.assert_close(backbone, merged.to(dtype).reshape(backbone.shape), rtol=0, atol=0)
    energy = float(np.concatenate([part for _, part in found[0]]).sum())
    assert energy == pytest.approx(float(differences.double().sum(dim=0).square().sum()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("use_loops", [True, False])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # signalling NaN
def test_rounding_is_what_torch_does(use_loops, length, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    bits = np.random.default_rng(length).integers(0, 1 << 32, length, np.uint32)
    bits[::3] &= 0xFFFF8000  # halfway between two numbers, or one of them
    values = bits.view(np.float32)
    for source in (values, values.astype(np.float64), build_loops.rounded(values, FLOAT16)):
        for kind in (BFLOAT16, FLOAT16, FLOAT32):
            expected = torch.from_numpy(source).float().to(kind.torch)
            found = to_tensor(build_loops.rounded(source, kind))
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_taking_bits_is_choosing_by_a_mask(shape):
    generator = np.random.default_rng(2)
    bits, mask = generator.random(shape) < 0.5, generator.random(shape) < 0.3
    expected = np.packbits(bits[mask], bitorder="little")
    np.testing.assert_array_equal(build_loops.take_bits(packed(bits), packed(mask), shape[1]), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 64), (3, 128), (40, 200)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_choosing_ones_is_what_numpy_does(shape, share):
    generator = np.random.default_rng(3)
    mask = generator.random(shape) < share
    choice = generator.random(int(mask.sum())) < 0.5
    expected = mask.copy()
    expected[mask] = choice
    for found in (build_loops.put_bits(packed(mask), choice, shape[1]), chosen_ones(packed(mask), choice, shape[1])):
        np.testing.assert_array_equal(found, packed(expected))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 64), (40, 200)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_counting_and_first_ones_are_what_numpy_does(shape, share):
    mask = np.random.default_rng(4).random(shape) < share
    np.testing.assert_array_equal(build_loops.row_counts(packed(mask)), mask.sum(axis=1))
    assert build_loops.count_ones(packed(mask)) == mask.sum()
    for num_ones in sorted({0, int(mask.sum()) // 3, int(mask.sum())}):
        expected = mask & (mask.cumsum().reshape(shape) <= num_ones)
        for find in (build_loops.first_ones, first_ones):
            np.testing.assert_array_equal(find(packed(mask), num_ones), packed(expected))


@pytest.mark.parametrize("use_loops", [True, False])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])
def test_ranked_numbers_are_those_of_sorting(use_loops, length, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    values = np.abs(values_of((1, length), length).reshape(-1))
    values[::5], values[3::7] = np.float32(1e-45), np.inf
    values[2::3] = widened(build_loops.rounded(values[2::3], BFLOAT16))  # many equal ones
    ranks = [0, length // 3, length - 1]
    assert build_loops.ranked(values, ranks) == np.sort(values)[ranks].tolist()
    with pytest.raises(ValueError, match="ranks"):
        build_loops.ranked(values, [length])


@pytest.mark.parametrize("num_experts", [1, 3])
def test_a_tensor_of_one_tile_is_read_once(num_experts, monkeypatch):
    """Its sample and its passes are those of a tensor that is read anew for each."""
    stored = [build_loops.rounded(values_of((200, 240), seed), BFLOAT16) for seed in range(num_experts + 1)]
    checkpoints = [InMemory({"w": to_tensor(each)}) for each in stored]
    seen = tiles.TensorTiles("w", checkpoints, BFLOAT16, "average", tiles.Workspace())
    sample = seen.sample()
    expected = [each.copy() for each in (*sample.rows, sample.backbone)]
    (tile,) = seen
    backbone = tile.backbone.copy()
    with seen.read_once():
        monkeypatch.setattr(InMemory, "read_rows", None)
        held, (again,) = seen.sample(), seen
        for one, other in zip(expected, (*held.rows, held.backbone), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(again.backbone, backbone)


@pytest.mark.parametrize("settings", [{}, {"merge_method": "base"}, {"encoding": "float", "density": 1.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_by_numpy_the_bytes_are_the_same(settings, dtype, tmp_path, monkeypatch):
    paths = write_tiny_checkpoints(tmp_path / "in", ("base", *EXPERTS), dtype=dtype)
    build(paths, tmp_path / "fast", settings)
    monkeypatch.setattr(dispatch, "native", lambda: None)
    build(paths, tmp_path / "slow", settings)
    assert digests(tmp_path / "fast") == digests(tmp_path / "slow")


def signs_by_hand(delta, num_kept):
    """Which entries are kept, their signs, and one scale a row, one number at a time."""
    rows, columns = delta.shape
    places = [(r, c) for r in range(rows) for c in range(columns) if float(delta[r, c]) != 0.0]
    places.sort(key=lambda place: (-abs(float(delta[place])), place))
    kept = sorted(places[:num_kept])
    counts = [sum(r == row for r, _ in kept) for row in range(rows)]
    norms = [sum(float(value) ** 2 for value in row) ** 0.5 for row in delta]
    scales = [norm / count**0.5 if count else 0.0 for norm, count in zip(norms, counts, strict=True)]
    return kept, [float(delta[place]) < 0 for place in kept], scales


@pytest.mark.parametrize("use_loops", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (6, 8), (5, 21), (9, 50)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sign_coding_is_its_formula(use_loops, shape, density, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    minuend, subtrahend = values_of(shape, 5), values_of(shape, 6) * np.float32(0.5)
    delta = minuend - subtrahend
    selection = signed.SignedSelection(shape, density, delta.reshape(-1)[::2])
    space = tiles.Workspace()
    for bracket in (None, (0.0, np.inf)):  # a small sample may miss; the whole line cannot
        if bracket is not None:
            selection.restart(signed.Bracket(1e-45, float("inf")))
        marking = signed.Marking([selection], space)
        for start in range(0, shape[0], 2):
            marking.add(start, [(minuend[start : start + 2], subtrahend[start : start + 2])])
        if selection.settle():
            break
    made, errors = selection.encode(None, "norm")
    packed_delta = made.as_tensors()
    kept, negative, scales = signs_by_hand(delta, round(density * delta.size))
    assert packed_delta.kept.nonzero().tolist() == [list(place) for place in kept]
    signs = np.unpackbits(packed_delta.parts["signs"].numpy(), bitorder="little")[: len(kept)]
    assert signs.tolist() == [int(is_negative) for is_negative in negative]
    stored = torch.tensor(scales, dtype=torch.float64).bfloat16()
    torch.testing.assert_close(packed_delta.parts["scales"], stored, rtol=0, atol=0)
    scales = stored.double().tolist()
    assert errors.norm == pytest.approx(float(np.square(delta, dtype=np.float64).sum()), rel=1e-5)
    inner = sum(abs(float(delta[place])) * scales[place[0]] for place in kept)
    assert errors.inner == pytest.approx(inner, rel=1e-5)
