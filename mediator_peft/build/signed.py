"""The largest entries of one matrix with their signs: the packed form of a delta, and of a trimmed task vector."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bank.scales import SIGN_SCALES, RowSums
from ..bank.sparse_delta import SparseDelta
from ..methods.sparsifying.selection import (
    Bitmap,
    Bracket,
    Floats,
    Settled,
    TopSelection,
    bracket_from_sample,
    count_ones,
    pack_rows,
    row_counts,
    row_products,
    row_squares,
    unpack_rows,
)
from .loops import compiled
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
    """The largest entries of one matrix, their signs, and sums over its rows."""

    def __init__(self, shape: tuple[int, int], density: float, sample: Tensor) -> None:
        self.shape = shape
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
        self._selection = TopSelection(self.shape, self.num_kept, bracket)
        self.negative = np.empty((self.shape[0], (self.shape[1] + 7) // 8), np.uint8)
        self._square, self._above_sum, self._above_square = (np.zeros(self.shape[0]) for _ in range(3))

    def add(self, start: int, minuend: Tensor, subtrahend: Tensor | None, space: Workspace) -> None:
        """The next rows of ``minuend - subtrahend``. Sums over rows are kept for differences alone."""
        shape = (minuend.shape[0], minuend.shape[1])
        stop = start + shape[0]
        loops = compiled()
        if loops is not None:
            self._mark(loops, start, stop, minuend, subtrahend, space)
            return
        bits, more_bits = (space.take(name, shape, torch.bool).numpy() for name in ("bits", "more bits"))
        magnitudes = space.take("magnitudes", shape).numpy()
        if subtrahend is None:
            delta = minuend.numpy()
        else:
            delta = space.take("delta", shape).numpy()
            np.subtract(minuend.numpy(), subtrahend.numpy(), out=delta)
        np.less(delta, 0, out=bits)
        self.negative[start:stop] = pack_rows(bits)
        np.abs(delta, out=magnitudes)
        self._selection.add(start, magnitudes, bits, more_bits)
        if subtrahend is not None:
            torch.threshold_(space.take("magnitudes", shape), self._selection.bracket.high, 0.0)
            self._sum_rows(start, stop, delta, magnitudes, space)

    def _mark(
        self, loops: Any, start: int, stop: int, minuend: Tensor, subtrahend: Tensor | None, space: Workspace
    ) -> None:
        """As :meth:`add`, by the compiled loops."""
        shape = (minuend.shape[0], minuend.shape[1])
        low, high = (np.float32(edge) for edge in self._selection.bracket)
        inside = space.array("inside", (shape[0] * shape[1],))
        bitmaps = (self.negative[start:stop], *self._selection.rows(start, stop))
        if subtrahend is None:
            count = loops.mark_values(minuend.numpy(), low, high, *bitmaps, inside)
        else:
            delta, above = space.array("delta", shape), space.array("magnitudes", shape)
            pair = (minuend.numpy(), subtrahend.numpy())
            count = loops.mark_differences(*pair, low, high, *bitmaps, inside, delta, above)
            self._sum_rows(start, stop, delta, above, space)
        if low != high:
            self._selection.take(inside[:count].copy())

    def _sum_rows(self, start: int, stop: int, delta: Floats, above: Floats, space: Workspace) -> None:
        """Sums over rows: of the whole delta, and of the magnitudes above the bracket."""
        self._square[start:stop] = row_squares(delta)
        self._above_sum[start:stop] = row_products(above, space.ones(delta.shape[1]))
        self._above_square[start:stop] = row_squares(above)

    def settle(self) -> bool:
        """Decide what is kept; False where the bracket missed."""
        settled = self._selection.settle()
        if settled is None:
            return False
        self.settled = settled
        return True

    def encode(self, bias: Tensor | None, sign_scale: str) -> tuple[SparseDelta, Errors]:
        """Signs of the kept entries, and one scale a row by a key of ``SIGN_SCALES``."""
        kept = self.settled.kept
        num_kept = row_counts(kept)
        sums = self._above_sum + self.settled.extra_sum
        stored = torch.from_numpy(SIGN_SCALES[sign_scale](RowSums(self._square, sums, num_kept))).bfloat16()
        scales = stored.double().numpy()
        squares = self._above_square + self.settled.extra_square
        errors = Errors(
            norm=float(self._square.sum()),
            packed=float((scales * scales * num_kept).sum()),
            inner=float((scales * sums).sum()),
            kept=float(squares.sum()),
        )
        signs = kept_bits(self.negative, kept, self.shape[1])
        parts = {"signs": torch.from_numpy(signs), "scales": stored}
        return SparseDelta(self.shape, "sign", torch.from_numpy(kept), parts, bias), errors


def kept_bits(bitmap: Bitmap, kept: Bitmap, num_columns: int) -> Bitmap:
    """The bits of a bitmap that stand where another has ones, row by row and closed up: (ceil(num_kept / 8),)."""
    loops = compiled()
    if loops is not None:
        num_ones = count_ones(kept)
        target = np.empty((num_ones + 7) // 8, np.uint8)
        loops.take_bits(bitmap.reshape(-1), kept.reshape(-1), _bit_table(), target)
        return target
    pieces = []
    step = max(1, (1 << 20) // max(1, num_columns))
    for start in range(0, len(kept), step):
        rows = slice(start, start + step)
        where = unpack_rows(kept[rows], num_columns).reshape(-1)
        pieces.append(np.compress(where, unpack_rows(bitmap[rows], num_columns).reshape(-1)))
    return np.packbits(np.concatenate(pieces), bitorder="little") if pieces else np.empty(0, np.uint8)


@cache
def _bit_table() -> Bitmap:
    loops = compiled()
    assert loops is not None
    return loops.bit_table()


def errors_of(delta: Tensor, packed: SparseDelta) -> Errors:
    """Compare a whole delta (O, I) with its packed form."""
    whole, dense = delta.flatten(), packed.dense().flatten()
    kept = whole[packed.kept.flatten()]
    return Errors(float(whole @ whole), float(dense @ dense), float(whole @ dense), float(kept @ kept))
