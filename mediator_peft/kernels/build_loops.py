"""The inner loops of a build, by the implementation that is there (see ``dispatch``): the same bytes either way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..methods.sparsifying import selection
from ..storage import BFLOAT16, FLOAT64, Array, FloatType, narrowed, widened
from . import dispatch, numpy_kernels
from .native_kernels import check, check_writable
from .numpy_kernels import MarkJob

__all__ = [
    "MarkJob",
    "count_ones",
    "first_ones",
    "loops",
    "mark_tile",
    "merge_tile",
    "put_bits",
    "ranked",
    "rounded",
    "row_counts",
    "take_bits",
]

_UINT8, _UINT16, _FLOAT32, _FLOAT64 = map(np.dtype, ("uint8", "uint16", "float32", "float64"))


def mark_tile(jobs: Sequence[MarkJob]) -> list[tuple[int, int]]:
    """Mark rows of several differences of one shape against a bracket each, and sum them up.

    Args:
        jobs: what is read and written.

    Returns:
        For each, how many magnitudes lie above the bracket and how many in it.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    for job in jobs:
        shape = (rows, columns) = jobs[0].minuend.shape
        check("minuend", job.minuend, (_FLOAT32, _UINT16), shape)
        check("subtrahend", job.subtrahend, (job.minuend.dtype,), shape)
        check("minuend", job.minuend, (jobs[0].minuend.dtype,), shape)
        for name in ("negative", "above", "inside"):
            check_writable(name, getattr(job, name), (_UINT8,), (rows, (columns + 7) // 8))
        check_writable("sums", job.sums, (_FLOAT64,), (rows, 3))
        check_writable("values", job.values, (_FLOAT32,), (rows * columns,))
    return (dispatch.native() or numpy_kernels).mark_tile(jobs)


def merge_tile(sources: Sequence[Array], is_mean: bool, backbone: Array, energies: NDArray[np.float64]) -> None:
    """Merge rows of weights: subtracted, averaged and rounded.

    Args:
        sources: K + 1 times (r, I), rows of the base, then of the experts: float32, or uint16 (the bits of bfloat16).
        is_mean: whether the backbone is the mean of the experts; else it is the base.
        backbone: (r, I) of the same dtype, written.
        energies: (r,), written: squared norm of each row of the sum of the task vectors.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    for source in sources:
        check("source", source, (backbone.dtype,), backbone.shape)
    check_writable("backbone", backbone, (_FLOAT32, _UINT16), backbone.shape)
    check_writable("energies", energies, (_FLOAT64,), (len(backbone),))
    (dispatch.native() or numpy_kernels).merge_tile(sources, is_mean, backbone, energies)


def rounded(values: Array, kind: FloatType) -> Array:
    """Weights in another floating-point type, by way of float32, rounded to nearest even.

    Args:
        values: (*shape) float64, float32, float16 or uint16 (the bits of bfloat16).
        kind: the type wanted.

    Returns:
        (*shape); the array itself where it is of that type.
    """
    if values.dtype == kind.array:
        return values
    if values.dtype != _UINT16 and kind == FLOAT64:
        return values.astype(_FLOAT64)
    with np.errstate(over="ignore"):
        wide = values if values.dtype == _FLOAT32 else widened(values)
    if kind == BFLOAT16 and (kernels := dispatch.native()) is not None:
        return kernels.to_bfloat16(np.ascontiguousarray(wide))
    return narrowed(wide, kind.array)


def take_bits(bitmap: Array, mask: Array, num_columns: int) -> Array:
    """The bits of a bitmap that stand where a mask has ones, row by row and closed up.

    Args:
        bitmap, mask: (r, ceil(num_columns / 8)) uint8, contiguous.
        num_columns: of a row.

    Returns:
        (ceil(number of ones / 8),) uint8
    """
    check("mask", mask, (_UINT8,), (len(mask), (num_columns + 7) // 8))
    check("bitmap", bitmap, (_UINT8,), mask.shape)
    if (kernels := dispatch.native()) is None:
        return numpy_kernels.take_bits(bitmap, mask, num_columns)
    return kernels.take_bits(bitmap, mask, count_ones(mask))


def put_bits(bitmap: Array, choice: NDArray[np.bool_], num_columns: int) -> Array:
    """Some ones of a bitmap, as another; ``choice`` has a boolean for each of them. May write over the bitmap.

    Args:
        bitmap: (r, ceil(num_columns / 8)) uint8, contiguous.
        choice: (number of its ones,)
        num_columns: of a row.
    """
    kernels = dispatch.native()
    if kernels is None:
        return numpy_kernels.chosen_ones(bitmap, choice, num_columns)
    check_writable("bitmap", bitmap, (_UINT8,), (len(bitmap), (num_columns + 7) // 8))
    kernels.put_bits(np.packbits(choice, bitorder="little"), bitmap)
    return bitmap


def row_counts(bitmap: Array) -> NDArray[np.int64]:
    """Number of ones in each row of a bitmap (r, n) uint8, contiguous: (r,)."""
    check("bitmap", bitmap, (_UINT8,), (len(bitmap), bitmap.shape[1]))
    kernels = dispatch.native()
    return selection.row_counts(bitmap) if kernels is None else kernels.row_counts(bitmap)


def count_ones(bitmap: Array) -> int:
    """Number of ones in a bitmap of any shape, uint8, contiguous."""
    return int(row_counts(bitmap.reshape(1, -1))[0])


def first_ones(bitmap: Array, num_ones: int) -> Array:
    """The first ``num_ones`` ones of a bitmap (r, n) uint8, contiguous, as another. May write over the bitmap."""
    kernels = dispatch.native()
    if kernels is None:
        return selection.first_ones(bitmap, num_ones)
    check_writable("bitmap", bitmap, (_UINT8,), (len(bitmap), bitmap.shape[1]))
    kernels.keep_first(bitmap, num_ones)
    return bitmap


def ranked(magnitudes: Array, ranks: Sequence[int]) -> list[float]:
    """Numbers at some places of the ascending order.

    Args:
        magnitudes: (n,) float32, none of them negative, contiguous, n < 2³².
        ranks: 0 to n - 1 each; 0 is the smallest.

    Raises:
        ValueError: a rank is not one of these.
    """
    check("magnitudes", magnitudes, (_FLOAT32,), (magnitudes.size,))
    if not all(0 <= rank < magnitudes.size for rank in ranks):
        raise ValueError(f"ranks must be 0 to {magnitudes.size - 1}, got {list(ranks)}.")
    kernels = dispatch.native()
    return selection.ranked(magnitudes, ranks) if kernels is None else kernels.ranked(magnitudes, ranks)


def loops() -> selection.Loops:
    """The inner loops of a selection, by the implementation that is there."""
    return selection.Loops(ranked, row_counts, put_bits, first_ones)
