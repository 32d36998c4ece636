"""Bitmaps on disk come back as they were, in the shorter of two forms."""

from __future__ import annotations

import numpy as np
import pytest

from mediator_peft.errors import AdapterError
from mediator_peft.methods.encoding.bitmaps import compress, compress_mask, decompress_mask

SHAPES = [(1, 1), (3, 7), (16, 64), (300, 577)]


def bitmap(shape, density, seed=0):
    return np.packbits(np.random.default_rng(seed).random(shape) < density, axis=-1, bitorder="little")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.003, 0.05, 0.14, 0.2, 1.0])
def test_a_mask_comes_back(shape, density):
    mask = bitmap(shape, density)
    stored = compress_mask(mask)
    assert stored.ndim == 1
    assert np.array_equal(decompress_mask(stored, mask.shape, "m"), mask)


@pytest.mark.parametrize("gap", [253, 254, 255, 256, 509, 510, 511, 765])
def test_long_gaps_come_back(gap):
    bits = np.zeros((1, 2400), np.bool_)
    bits[0, gap], bits[0, 2 * gap + 1], bits[0, -1] = True, True, True
    mask = np.packbits(bits, axis=-1, bitorder="little")
    assert np.array_equal(decompress_mask(compress_mask(mask), mask.shape, "m"), mask)


@pytest.mark.parametrize(("density", "share"), [(0.01, 0.8), (0.05, 0.85), (0.1, 0.95)])
def test_few_ones_take_fewer_bytes_by_their_gaps(density, share):
    mask = bitmap((512, 512), density)
    assert len(compress_mask(mask)) <= share * len(compress(mask))


def test_many_ones_are_a_plain_frame():
    mask = bitmap((64, 64), 0.2)
    assert np.array_equal(compress_mask(mask), compress(mask))


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_a_mask_of_another_shape_or_a_damaged_one_is_refused(density):
    mask = bitmap((64, 640), density)
    stored = compress_mask(mask)
    with pytest.raises(AdapterError, match="other shapes"):
        decompress_mask(stored, (8, 80), "m")
    with pytest.raises(AdapterError, match="damaged"):
        decompress_mask(stored[: len(stored) // 2], mask.shape, "m")
