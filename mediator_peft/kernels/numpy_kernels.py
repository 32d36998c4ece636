"""Packed deltas in plain numpy: slow and clear. The compiled twins in ``kernels_numba`` must equal these functions.

At most one chunk of rows is dense at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DenseChunk = tuple[slice, NDArray[np.bool_], NDArray[np.float32]]

CHUNK_ROWS = 16
"""Rows between two stored offsets."""

_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def row_offsets(mask: Array) -> NDArray[np.int32]:
    """Number of kept entries before each chunk of 16 rows.

    Args:
        mask: (O, ceil(I / 8)) uint8

    Returns:
        (ceil(O / 16),) int32

    Raises:
        ValueError: more than 2³¹ − 1 entries are kept.
    """
    num_chunks = -(-len(mask) // CHUNK_ROWS)
    counts = np.zeros(num_chunks + 1, np.int64)
    for chunk in range(num_chunks):
        rows = mask[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
        counts[chunk + 1] = _ONES_IN_BYTE[rows].sum(dtype=np.int64)
    ends = counts.cumsum()
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"one matrix keeps {ends[-1]} entries, at most 2**31 - 1 can be addressed. Lower the density.")
    return ends[:-1].astype(np.int32)


def count_kept(mask: Array, offsets: NDArray[np.int32]) -> int:
    """Number of kept entries of a matrix: those before its last chunk and those in it."""
    if not len(offsets):
        return 0
    last = mask[(len(offsets) - 1) * CHUNK_ROWS :]
    return int(offsets[-1]) + int(_ONES_IN_BYTE[last].sum(dtype=np.int64))


def widened(values: Array) -> NDArray[np.float32]:
    """Numbers as float32.

    Args:
        values: (*shape) float32, float16 or uint16 (the bits of bfloat16).
    """
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def narrowed(values: NDArray[np.float32], dtype: Any) -> Array:
    """Float32 rounded to nearest even.

    Args:
        values: (*shape)
        dtype: float32, float16 or uint16 (the bits of bfloat16).
    """
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def dense_chunks(
    mask: Array, num_columns: int, signs: Array | None, scales: Array | None, values: Array | None, offsets: Array
) -> Iterator[DenseChunk]:
    """The delta by chunks of 16 rows.

    Args:
        mask: (O, ceil(I / 8)) uint8
        num_columns: I
        signs, scales: (ceil(num_kept / 8),) uint8 and (O,) uint16 (the bits of bfloat16), or None.
        values: (num_kept,), or None.
        offsets: from :func:`row_offsets`.

    Yields:
        (rows, (n, I) which entries are kept, (n, I) their values and zeros)
    """
    for chunk, start in enumerate(offsets.tolist()):
        rows = slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
        kept = np.unpackbits(mask[rows], axis=1, count=num_columns, bitorder="little").view(np.bool_)
        end = start + int(np.count_nonzero(kept))
        dense = np.zeros(kept.shape, np.float32)
        if values is not None:
            dense[kept] = widened(values[start:end])
        else:
            assert signs is not None
            assert scales is not None
            bits = np.unpackbits(signs[start // 8 : (end + 7) // 8], bitorder="little")[start % 8 :][: end - start]
            dense[kept] = np.where(bits, np.float32(-1), np.float32(1))
            dense *= widened(scales[rows])[:, None]
        yield rows, kept, dense
