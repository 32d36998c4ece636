"""Largest entries of one matrix with their signs, in one pass: a packed delta or a trimmed task vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bank.packed_arrays import BIAS, MASK, PackedArrays
from ..bank.sparse_delta import SparseDelta
from ..deferred import torch
from ..kernels import build_loops as kernels
from ..methods.encoding.scales import SIGN_SCALES, RowSums
from ..methods.sparsifying.selection import (
    Bitmap,
    Bracket,
    Floats,
    Settled,
    TopSelection,
    bitmap_shape,
    bracket_from_sample,
)
from ..storage import BFLOAT16, FLOAT64, Array
from .tiles import Workspace

if TYPE_CHECKING:
    from torch import Tensor


# The share of a sample by which its quantile may be off: at first, and when that missed.
SLACK, WIDE_SLACK = 0.007, 0.05


class Errors(NamedTuple):
    """How well one packed delta stands for the whole one: four numbers that add up over matrices."""

    norm: float
    """Squared norm of the whole delta."""

    packed: float
    """Squared norm of the packed one."""

    inner: float
    """Their inner product."""

    kept: float
    """Squared norm of the whole delta where entries are kept."""


class SignedSelection:
    """The largest entries of one matrix, their signs, and sums over its rows; :class:`Marking` shows it the rows.

    Args:
        shape: (O, I)
        density: share of the entries that is kept.
        sample: some of them.
        bitmaps: (3, O, ceil(I / 8)) uint8 to be used, with what is settled lying in it.
    """

    negative: Bitmap
    """(O, ceil(I / 8)), ones where an entry is negative."""

    sums: NDArray[np.float64]
    """(O, 3): of the squares of each row, of its magnitudes above the bracket, of their squares."""

    def __init__(self, shape: tuple[int, int], density: float, sample: Floats, bitmaps: Bitmap | None = None) -> None:
        self.shape = shape
        self._bitmaps = np.empty((3, *bitmap_shape(shape)), np.uint8) if bitmaps is None else bitmaps
        self.negative = self._bitmaps[0]
        self.num_kept = round(density * shape[0] * shape[1])
        self.settled: Settled
        self._density = density
        self._sample = np.abs(sample).reshape(-1)
        self.restart(self.bracket(SLACK))

    def bracket(self, slack: float) -> Bracket:
        """Where the sample expects the smallest kept entry."""
        return bracket_from_sample(self._sample, self._density, slack, kernels.ranked)

    def restart(self, bracket: Bracket) -> None:
        """Begin anew with another bracket."""
        self.selection = TopSelection(self.shape, self.num_kept, bracket, self._bitmaps[1:])
        self.sums = np.empty((self.shape[0], 3))

    @property
    def squared_norm(self) -> float:
        """Of the whole matrix."""
        return float(self.sums[:, 0].sum())

    def settle(self) -> bool:
        """Decide what is kept; False where the bracket missed."""
        settled = self.selection.settle(kernels.loops())
        if settled is None:
            return False
        self.settled = settled
        return True

    def encode(self, bias: Floats | None, rescale: str) -> tuple[PackedArrays, Errors]:
        """Signs of the kept entries, and one scale a row by a key of ``SIGN_SCALES``."""
        kept = self.settled.kept.copy()
        num_kept = kernels.row_counts(kept)
        square = self.sums[:, 0]
        magnitudes, squares = self.sums[:, 1] + self.settled.extra_sum, self.sums[:, 2] + self.settled.extra_square
        stored = kernels.rounded(SIGN_SCALES[rescale](RowSums(square, magnitudes, num_kept)), BFLOAT16)
        scales = kernels.rounded(stored, FLOAT64)
        errors = Errors(
            norm=float(square.sum()),
            packed=float((scales * scales * num_kept).sum()),
            inner=float((scales * magnitudes).sum()),
            kept=float(squares.sum()),
        )
        signs = kernels.take_bits(self.negative, kept, self.shape[1])
        parts = {MASK: kept, "signs": signs, "scales": stored} | ({} if bias is None else {BIAS: bias})
        return PackedArrays(self.shape, "sign", parts), errors


class Marking:
    """Shows rows of several differences of one shape to their selections, all in one look at them.

    Args:
        selections: the differences' own. They must not be restarted meanwhile.
        space: buffers.
    """

    def __init__(self, selections: Sequence[SignedSelection], space: Workspace) -> None:
        self._selections = selections
        self._space = space

    def add(self, start: int, pairs: Sequence[tuple[Array, Array]]) -> None:
        """Show the next rows.

        Args:
            start: number of the first.
            pairs: for each selection a minuend and a subtrahend, (r, I); all of them float32, or all uint16 (the bits
                of bfloat16).
        """
        if not pairs:
            return
        rows, columns = pairs[0][0].shape
        place = slice(start, start + rows)
        # Most of it is never touched, so that it takes no memory.
        inside = self._space.take("inside", (len(pairs), rows * columns))
        jobs = [
            kernels.MarkJob(
                minuend,
                subtrahend,
                each.negative[place],
                each.selection.above[place],
                each.selection.inside[place],
                each.sums[place],
                values,
                *each.selection.bracket,
            )
            for each, values, (minuend, subtrahend) in zip(self._selections, inside, pairs, strict=True)
        ]
        for each, values, counts in zip(self._selections, inside, kernels.mark_tile(jobs), strict=True):
            each.selection.take(*counts, values)


def errors_of(delta: Tensor, packed: SparseDelta) -> Errors:
    """Compare a whole delta (O, I) with its packed form."""
    return errors_of_sum(delta, (packed,))


def errors_of_sum(delta: Tensor, packed: Sequence[SparseDelta]) -> Errors:
    """Compare a whole delta (O, I) with the sum of some packed ones."""
    whole, dense = delta.flatten(), torch.stack([each.dense() for each in packed]).sum(dim=0).flatten()
    kept = whole[torch.stack([each.kept for each in packed]).any(dim=0).flatten()]
    return Errors(float(whole @ whole), float(dense @ dense), float(whole @ dense), float(kept @ kept))
