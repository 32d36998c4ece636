"""Packed deltas, and the inner loops of a build, in plain numpy: slow and clear. The native kernels must equal these.

At most one chunk of rows is dense at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..methods.sparsifying.selection import chosen_ones, pack_rows, row_sums, unpack_rows
from ..storage import Array, narrowed, widened

__all__ = [
    "MarkJob",
    "chosen_ones",
    "dense_chunks",
    "mark_tile",
    "merge_tile",
    "take_bits",
]

DenseChunk = tuple[slice, NDArray[np.bool_], NDArray[np.float32]]

CHUNK_ROWS = 16
"""Rows between two stored offsets."""


def dense_chunks(
    mask: Array, num_columns: int, signs: Array | None, scales: Array | None, values: Array | None, offsets: Array
) -> Iterator[DenseChunk]:
    """The delta by chunks of 16 rows.

    Args:
        mask: (O, ceil(I / 8)) uint8
        num_columns: I
        signs, scales: (ceil(num_kept / 8),) uint8 and (O,) uint16 (the bits of bfloat16), or None.
        values: (num_kept,), or None.
        offsets: from ``dispatch.row_offsets``.

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


class MarkJob(NamedTuple):
    """One difference of a build, ``minuend - subtrahend``, some rows of it; and where its marks go."""

    minuend: Array
    """(r, I) float32 or uint16 (the bits of bfloat16)."""

    subtrahend: Array
    """The same."""

    negative: Array
    """(r, ceil(I / 8)) uint8, written: ones where the difference is negative."""

    above: Array
    """Likewise, where its magnitude is above ``high``."""

    inside: Array
    """Likewise, where its magnitude is at least ``low`` and not above ``high``."""

    sums: NDArray[np.float64]
    """(r, 3), written: for each row the sum of squares, of magnitudes above ``high``, and of their squares."""

    values: NDArray[np.float32]
    """(r * I,), written: begins with the magnitudes inside the bracket, in order, if it is wider than one number."""

    low: float
    high: float


def mark_tile(jobs: Sequence[MarkJob]) -> list[tuple[int, int]]:
    """Mark rows against brackets; see ``build_loops.mark_tile``."""
    counts = []
    for job in jobs:
        low, high = np.float32(job.low), np.float32(job.high)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = widened(job.minuend) - widened(job.subtrahend)
            magnitudes = np.abs(delta)
            above = magnitudes > high
            inside = (magnitudes >= low) ^ above
            squares = np.square(delta)
            for number, matrix in enumerate((squares, np.where(above, magnitudes, 0), np.where(above, squares, 0))):
                job.sums[:, number] = row_sums(matrix)
        for target, bits in ((job.negative, delta < 0), (job.above, above), (job.inside, inside)):
            target[:] = pack_rows(bits)
        found = magnitudes[inside]
        if low != high:
            job.values[: len(found)] = found
        counts.append((int(np.count_nonzero(above)), len(found)))
    return counts


def merge_tile(sources: Sequence[Array], is_mean: bool, backbone: Array, energies: NDArray[np.float64]) -> None:
    """Merge rows of weights; see ``build_loops.merge_tile``."""
    base = widened(sources[0])
    with np.errstate(over="ignore", invalid="ignore"):
        # What is added to -0.0 stays as it is, even -0.0.
        total = np.full(base.shape, -0.0, np.float32)
        for source in sources[1:]:
            total += widened(source) - base
        energies[:] = row_sums(np.square(total))
        merged = total / np.float32(len(sources) - 1) + base if is_mean else base + np.float32(0)
    backbone[:] = narrowed(merged, backbone.dtype)


def take_bits(bitmap: Array, mask: Array, num_columns: int) -> Array:
    """The bits of a bitmap where a mask has ones; see ``build_loops.take_bits``."""
    pieces = []
    step = max(1, (1 << 20) // max(1, num_columns))
    for start in range(0, len(mask), step):
        rows = slice(start, start + step)
        where = unpack_rows(mask[rows], num_columns).reshape(-1)
        pieces.append(np.compress(where, unpack_rows(bitmap[rows], num_columns).reshape(-1)))
    return np.packbits(np.concatenate(pieces), bitorder="little") if pieces else np.empty(0, np.uint8)
