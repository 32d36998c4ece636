"""Largest entries of one matrix with their signs, in one pass: a packed delta or a trimmed task vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bank.sparse_delta import SparseDelta
from ..kernels.build_loops import compiled
from ..methods.encoding.scales import SIGN_SCALES, RowSums
from ..methods.sparsifying.selection import (
    Bitmap,
    Bracket,
    Floats,
    Settled,
    TopSelection,
    bitmap_shape,
    bracket_from_sample,
    chosen_ones,
    count_ones,
    pack_rows,
    row_counts,
    row_sums,
    unpack_rows,
)
from .tiles import Workspace

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

    def __init__(self, shape: tuple[int, int], density: float, sample: Tensor, bitmaps: Bitmap | None = None) -> None:
        self.shape = shape
        self._bitmaps = np.empty((3, *bitmap_shape(shape)), np.uint8) if bitmaps is None else bitmaps
        self.negative = self._bitmaps[0]
        self.num_kept = round(density * shape[0] * shape[1])
        self.settled: Settled
        self._density = density
        self._sample = sample.abs().numpy().reshape(-1)
        self.restart(self.bracket(SLACK))

    def bracket(self, slack: float) -> Bracket:
        """Where the sample expects the smallest kept entry."""
        return bracket_from_sample(self._sample, self._density, slack)

    def restart(self, bracket: Bracket) -> None:
        """Begin anew with another bracket."""
        self.selection = TopSelection(self.shape, self.num_kept, bracket, self._bitmaps[1:])
        self.sums = np.empty((self.shape[0], 3))

    def add(self, start: int, delta: Floats) -> None:
        """Take the next rows, (r, I) from row ``start`` on: the plain twin of the loop that marks."""
        rows = slice(start, start + len(delta))
        magnitudes = np.abs(delta)
        self.selection.add(start, magnitudes)
        self.negative[rows] = pack_rows(delta < 0)
        above = torch.threshold(torch.from_numpy(magnitudes), self.selection.bracket.high, 0.0).numpy()
        for number, matrix in enumerate((magnitudes * magnitudes, above, above * above)):
            self.sums[rows, number] = row_sums(matrix)

    @property
    def squared_norm(self) -> float:
        """Of the whole matrix."""
        return float(self.sums[:, 0].sum())

    def settle(self) -> bool:
        """Decide what is kept; False where the bracket missed."""
        settled = self.selection.settle(choose)
        if settled is None:
            return False
        self.settled = settled
        return True

    def encode(self, bias: Tensor | None, rescale: str) -> tuple[SparseDelta, Errors]:
        """Signs of the kept entries, and one scale a row by a key of ``SIGN_SCALES``."""
        kept = self.settled.kept.copy()
        num_kept = row_counts(kept)
        square = self.sums[:, 0]
        magnitudes, squares = self.sums[:, 1] + self.settled.extra_sum, self.sums[:, 2] + self.settled.extra_square
        stored = torch.from_numpy(SIGN_SCALES[rescale](RowSums(square, magnitudes, num_kept))).bfloat16()
        scales = stored.double().numpy()
        errors = Errors(
            norm=float(square.sum()),
            packed=float((scales * scales * num_kept).sum()),
            inner=float((scales * magnitudes).sum()),
            kept=float(squares.sum()),
        )
        signs = kept_bits(self.negative, kept, self.shape[1])
        parts = {"signs": torch.from_numpy(signs), "scales": stored}
        return SparseDelta(self.shape, "sign", torch.from_numpy(kept), parts, bias), errors


class Marking:
    """Shows rows of several differences of one shape to their selections, all in one look at them.

    Args:
        selections: the differences' own. They must not be restarted meanwhile.
        space: buffers.
    """

    def __init__(self, selections: Sequence[SignedSelection], space: Workspace) -> None:
        self._selections = selections
        self._space = space
        self._loops = compiled() if selections else None
        if self._loops is None:
            return
        written = [(each.negative, each.selection.above, each.selection.inside, each.sums) for each in selections]
        self._addresses = np.array([[array.ctypes.data for array in arrays] for arrays in written], np.int64)
        self._strides = np.array([[array.strides[0] for array in arrays] for arrays in written], np.int64)
        self._brackets = np.array([each.selection.bracket for each in selections], np.float32)
        self._counts = np.empty((len(selections), 2), np.int64)

    def add(self, start: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Show the next rows.

        Args:
            start: number of the first.
            pairs: for each selection a minuend and a subtrahend, (r, I); all bfloat16 or all float32.
        """
        if self._loops is None:
            wide = {id(rows): rows.float().numpy() for pair in pairs for rows in pair}
            for selection, (minuend, subtrahend) in zip(self._selections, pairs, strict=True):
                selection.add(start, wide[id(minuend)] - wide[id(subtrahend)])
            return
        rows, columns = pairs[0][0].shape
        # Most of it is never touched, so that it takes no memory.
        inside = self._space.take("inside", (len(pairs), rows * columns)).numpy()
        jobs = np.empty((len(pairs), 7), np.int64)
        jobs[:, :2] = [[minuend.data_ptr(), subtrahend.data_ptr()] for minuend, subtrahend in pairs]
        jobs[:, 2:6] = self._addresses + start * self._strides
        jobs[:, 6] = inside.ctypes.data + inside.strides[0] * np.arange(len(pairs))
        is_half = pairs[0][0].dtype == torch.bfloat16
        self._loops.mark_tile(is_half, (rows, columns), jobs, self._brackets, self._counts)
        for selection, values, (num_above, num_inside) in zip(
            self._selections, inside, self._counts.tolist(), strict=True
        ):
            selection.selection.take(num_above, num_inside, values)


def kept_bits(bitmap: Bitmap, kept: Bitmap, num_columns: int) -> Bitmap:
    """The bits of a bitmap that stand where another has ones, row by row and closed up: (ceil(num_kept / 8),)."""
    loops = compiled()
    if loops is not None:
        num_ones = count_ones(kept)
        target = np.empty((num_ones + 63) // 64, np.uint64)
        loops.take_bits(bitmap.reshape(-1), kept.reshape(-1), target)
        return target.view(np.uint8)[: (num_ones + 7) // 8]
    pieces = []
    step = max(1, (1 << 20) // max(1, num_columns))
    for start in range(0, len(kept), step):
        rows = slice(start, start + step)
        where = unpack_rows(kept[rows], num_columns).reshape(-1)
        pieces.append(np.compress(where, unpack_rows(bitmap[rows], num_columns).reshape(-1)))
    return np.packbits(np.concatenate(pieces), bitorder="little") if pieces else np.empty(0, np.uint8)


def choose(bitmap: Bitmap, choice: NDArray[np.bool_], num_columns: int) -> Bitmap:
    """As :func:`chosen_ones`, by the compiled loops where they are; these write it over the bitmap."""
    loops = compiled()
    if loops is None:
        return chosen_ones(bitmap, choice, num_columns)
    # A word more, as the loop reads whole words from any place.
    bits = np.zeros(choice.size // 8 + 16, np.uint8)
    bits[: (choice.size + 7) // 8] = np.packbits(choice, bitorder="little")
    loops.put_bits(bits, bitmap.reshape(-1))
    return bitmap


def errors_of(delta: Tensor, packed: SparseDelta) -> Errors:
    """Compare a whole delta (O, I) with its packed form."""
    whole, dense = delta.flatten(), packed.dense().flatten()
    kept = whole[packed.kept.flatten()]
    return Errors(float(whole @ whole), float(dense @ dense), float(whole @ dense), float(kept @ kept))
