"""The compiled loops give what the plain steps give, bit for bit."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from mediator_peft.build import loops, signed, tiles
from mediator_peft.build.loops import compiled
from tests.build.helpers import EXPERTS, build, digests
from tests.tiny import write_tiny_checkpoints

pytestmark = pytest.mark.skipif(compiled() is None, reason="numba is not there")

SHAPES = [(1, 1), (3, 7), (5, 8), (4, 15), (2, 16), (7, 17), (3, 40), (6, 64), (2, 577)]


def packed(bits):
    return np.packbits(bits, axis=1, bitorder="little")


def values_of(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    values.reshape(-1)[::5] = 0
    values.reshape(-1)[1::7] = -0.0
    values.reshape(-1)[2::11] = 1.25  # on the edge of the bracket
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bracket", [(0.5, 1.25), (1.25, 1.25), (1e-45, np.inf), (np.inf, np.inf)])
def test_marking_is_comparing(shape, bracket):
    first, second = values_of(shape, 0), values_of(shape, 1)
    low, high = np.float32(bracket[0]), np.float32(bracket[1])
    bitmaps = [np.full((shape[0], (shape[1] + 7) // 8), 255, np.uint8) for _ in range(3)]
    inside, delta, kept = (np.full(first.size, np.nan, np.float32) for _ in range(3))
    delta, kept = delta.reshape(shape), kept.reshape(shape)
    for values in (first, first - second):
        if values is first:
            count = compiled().mark_values(first, low, high, *bitmaps, inside)
        else:
            count = compiled().mark_differences(first, second, low, high, *bitmaps, inside, delta, kept)
            np.testing.assert_array_equal(delta, values)
            np.testing.assert_array_equal(kept, np.where(abs(values) > high, abs(values), 0))
        magnitudes = abs(values)
        for found, expected in zip(bitmaps, (values < 0, magnitudes > high, magnitudes >= low), strict=True):
            np.testing.assert_array_equal(found, packed(expected))
        np.testing.assert_array_equal(inside[:count], magnitudes[(magnitudes >= low) & ~(magnitudes > high)])


@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 15, 16, 77, 4096])
@pytest.mark.parametrize("is_mean", [True, False])
def test_merging_a_tile_is_what_torch_does(num_experts, size, is_mean):
    torch.manual_seed(size)
    stored = [torch.randn(size).bfloat16() for _ in range(num_experts + 1)]
    weights = np.empty((num_experts + 1, size), np.float32)
    vectors, total = np.empty((num_experts, size), np.float32), np.empty(size, np.float32)
    bits, rounded = np.empty(size, np.uint16), np.empty(size, np.float32)
    sources = np.array([tensor.data_ptr() for tensor in stored], np.int64)
    compiled().merge_means(sources, is_mean, weights, vectors, total, bits, rounded)
    expected = [tensor.float() for tensor in stored]
    differences = [tensor - expected[0] for tensor in expected[1:]]
    merged = expected[0] + sum(differences) / num_experts if is_mean else expected[0]
    np.testing.assert_array_equal(weights, torch.stack(expected).numpy())
    np.testing.assert_array_equal(vectors, torch.stack(differences).numpy())
    np.testing.assert_array_equal(bits, merged.bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(rounded, merged.bfloat16().float().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_taking_bits_is_choosing_by_a_mask(shape):
    generator = np.random.default_rng(2)
    bits, mask = generator.random(shape) < 0.5, generator.random(shape) < 0.3
    expected = np.packbits(bits[mask], bitorder="little")
    np.testing.assert_array_equal(signed.kept_bits(packed(bits), packed(mask), shape[1]), expected)


@pytest.mark.parametrize("settings", [{}, {"merge_method": "base"}, {"values": "float", "density": 1.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_numba_the_bytes_are_the_same(settings, dtype, tmp_path, monkeypatch):
    paths = write_tiny_checkpoints(tmp_path / "in", ("base", *EXPERTS), dtype=dtype)
    build(paths, tmp_path / "fast", settings)
    for module in (signed, tiles):
        monkeypatch.setattr(module, "compiled", lambda: None)
    build(paths, tmp_path / "slow", settings)
    assert digests(tmp_path / "fast") == digests(tmp_path / "slow")


def test_numba_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mediator_peft.build.loops_numba", None)
    monkeypatch.delattr("mediator_peft.build.loops_numba")
    assert loops.compiled.__wrapped__() is None


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
        monkeypatch.setattr(signed, "compiled", lambda: None)
    minuend, subtrahend = torch.from_numpy(values_of(shape, 5)), torch.from_numpy(values_of(shape, 6)) * 0.5
    delta = minuend - subtrahend
    selection = signed.SignedSelection(shape, density, delta.flatten()[::2].contiguous())
    space = tiles.Workspace()
    for bracket in (None, (0.0, np.inf)):  # a small sample may miss; the whole line cannot
        if bracket is not None:
            selection.restart(signed.Bracket(1e-45, float("inf")))
        for start in range(0, shape[0], 2):
            selection.add(start, minuend[start : start + 2], subtrahend[start : start + 2], space)
        if selection.settle():
            break
    packed_delta, errors = selection.encode(None, "norm")
    kept, negative, scales = signs_by_hand(delta.numpy(), round(density * delta.numel()))
    assert packed_delta.kept.nonzero().tolist() == [list(place) for place in kept]
    signs = np.unpackbits(packed_delta.parts["signs"].numpy(), bitorder="little")[: len(kept)]
    assert signs.tolist() == [int(is_negative) for is_negative in negative]
    stored = torch.tensor(scales, dtype=torch.float64).bfloat16()
    torch.testing.assert_close(packed_delta.parts["scales"], stored, rtol=0, atol=0)
    scales = stored.double().tolist()
    assert errors.norm == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
    inner = sum(abs(float(delta[place])) * scales[place[0]] for place in kept)
    assert errors.inner == pytest.approx(inner, rel=1e-5)
