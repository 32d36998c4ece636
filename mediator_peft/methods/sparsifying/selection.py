"""Exact selection of the largest entries, without sorting, for matrices that pass by in tiles.

The entries to keep are well defined: the ``num_kept`` of largest magnitude, of equal magnitudes those that come first,
and never a zero. So any way of finding them gives the same bits. Here a small sample first guesses a bracket around the
smallest kept magnitude; one pass then marks what lies above and what lies in the bracket, and the few entries in the
bracket are settled exactly. A bracket that misses is noticed and replaced by an exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ranked = Callable[[Floats, Sequence[int]], list[float]]

TINY = float(np.finfo(np.float32).smallest_subnormal)
"""The smallest magnitude that can be kept."""

_MOST_SUMMED = 1 << 13

LANES = 16
"""How many sums a row is added up in."""


class Bracket(NamedTuple):
    """Magnitudes between which the smallest kept one is expected."""

    low: float
    high: float


class Loops(NamedTuple):
    """The inner loops of a selection: by default in plain numpy; ``kernels.build_loops`` has faster twins."""

    ranked: Ranked
    row_counts: Callable[[Bitmap], NDArray[np.int64]]
    chosen_ones: Callable[[Bitmap, NDArray[np.bool_], int], Bitmap]
    """May write over the bitmap."""

    first_ones: Callable[[Bitmap, int], Bitmap]
    """May write over the bitmap."""


def ranked(magnitudes: Floats, ranks: Sequence[int]) -> list[float]:
    """Numbers at some places of the ascending order.

    Args:
        magnitudes: (n,) non-negative, contiguous.
        ranks: 0 to n - 1 each; 0 is the smallest.
    """
    numbers: list[float] = np.partition(magnitudes, sorted(set(ranks)))[list(ranks)].tolist()
    return numbers


def bracket_from_sample(magnitudes: Floats, density: float, slack: float, ranked: Ranked = ranked) -> Bracket:
    """Guess a bracket from some magnitudes of the matrix.

    Args:
        magnitudes: (s,) some of the matrix.
        density: share that is to be kept.
        slack: share of the sample by which its quantile may be off; a miss costs another pass and nothing else.
        ranked: a twin of :func:`ranked`.
    """
    if density >= 1:
        return Bracket(TINY, TINY)
    if not magnitudes.size:
        return Bracket(TINY, float("inf"))
    last = magnitudes.size - 1
    rank, width = (1 - density) * magnitudes.size, max(2.0, slack * magnitudes.size)
    below, beyond = min(last, max(0, int(rank - width))), min(last, int(rank + width))
    low, high = ranked(magnitudes, (below, beyond))
    if rank <= width:
        low = TINY
    if rank + width > last:
        high = float("inf")
    return Bracket(max(low, TINY), max(high, TINY))


def smallest_kept(magnitudes: Floats, num_kept: int) -> float:
    """The ``num_kept``-th largest of some magnitudes, by counting the halves of their bit patterns.

    Args:
        magnitudes: (n,) non-negative, contiguous, n >= num_kept.
        num_kept: 1 or more.
    """
    bits = magnitudes.view(np.uint32)
    # The bit pattern of a non-negative float grows with its value.
    upper, rest = _bin_of(np.bincount(bits >> np.uint32(16), minlength=1), num_kept)
    inside = bits[(bits >> np.uint32(16)) == upper] & np.uint32(0xFFFF)
    lower, _ = _bin_of(np.bincount(inside, minlength=1), rest)
    return float(np.uint32((upper << 16) | lower).view(np.float32))


def smallest_kept_of_tiles(read: Callable[[], Iterable[Floats]], num_kept: int) -> float:
    """As :func:`smallest_kept`, for magnitudes that do not fit into memory at once.

    Args:
        read: gives the magnitudes in pieces, (n,) each; it is called twice.
        num_kept: 1 or more, at most as many as there are.
    """
    counts = sum(np.bincount(piece.view(np.uint32) >> np.uint32(16), minlength=1 << 16) for piece in read())
    upper, rest = _bin_of(np.asarray(counts), num_kept)
    inside = np.zeros(1 << 16, np.intp)
    for piece in read():
        bits = piece.view(np.uint32)
        found = bits[(bits >> np.uint32(16)) == upper] & np.uint32(0xFFFF)
        inside += np.bincount(found, minlength=1 << 16)
    lower, _ = _bin_of(inside, rest)
    return float(np.uint32((upper << 16) | lower).view(np.float32))


def _bin_of(counts: NDArray[np.intp], rank: int) -> tuple[int, int]:
    """The bin in which the ``rank``-th largest lies, and its rank inside it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    before = int(from_top[place - 1]) if place else 0
    return counts.size - 1 - place, rank - before


def count_ones(bitmap: Bitmap) -> int:
    """Number of ones in a bitmap."""
    flat = bitmap.reshape(-1)
    whole = flat.size // 8 * 8
    ones = np.bitwise_count(flat[:whole].view(np.uint64)).sum(dtype=np.int64)
    return int(ones) + int(np.bitwise_count(flat[whole:]).sum(dtype=np.int64))


def row_counts(bitmap: Bitmap) -> NDArray[np.int64]:
    """Number of ones in each row of (r, n): (r,)."""
    if bitmap.shape[1] % 8 == 0 and bitmap.flags.c_contiguous:
        bitmap = bitmap.view(np.uint64)
    return np.bitwise_count(bitmap).sum(axis=1, dtype=np.int64)


def pack_rows(bits: NDArray[np.bool_]) -> Bitmap:
    """Booleans (r, n) to bits (r, ceil(n / 8)), the first in the lowest bit; each row padded to whole bytes."""
    if bits.shape[1] % 8 == 0 and bits.flags.c_contiguous:
        return np.packbits(bits.reshape(-1), bitorder="little").reshape(len(bits), -1)
    return np.packbits(bits, axis=1, bitorder="little")


def bitmap_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the bitmap of a matrix (O, I)."""
    return shape[0], (shape[1] + 7) // 8


def unpack_rows(bitmap: Bitmap, num_columns: int) -> NDArray[np.bool_]:
    """The reverse of :func:`pack_rows`."""
    if num_columns % 8 == 0 and bitmap.flags.c_contiguous:
        flat = np.unpackbits(bitmap.reshape(-1), bitorder="little")
        return flat.reshape(len(bitmap), num_columns).view(np.bool_)
    return np.unpackbits(bitmap, axis=1, count=num_columns, bitorder="little").view(np.bool_)


class Settled(NamedTuple):
    """Which entries are kept, and what they add to the rows beyond those above the bracket."""

    kept: Bitmap
    """(O, ceil(I / 8)), a one where an entry is kept."""

    extra_sum: NDArray[np.float64]
    """(O,) sum of the magnitudes of kept entries that lay in the bracket."""

    extra_square: NDArray[np.float64]
    """(O,) sum of their squares."""


class TopSelection:
    """The ``num_kept`` largest entries of an (O, I) matrix whose rows come in order, some at a time.

    Args:
        shape: (O, I)
        num_kept: how many.
        bracket: around the smallest of them.
        bitmaps: (2, O, ceil(I / 8)) to be used for ``above`` and ``inside``; the outcome may lie in it as well.
    """

    above: Bitmap
    """(O, ceil(I / 8)), ones where a magnitude lies above the bracket."""

    inside: Bitmap
    """(O, ceil(I / 8)), ones where it lies in the bracket."""

    def __init__(self, shape: tuple[int, int], num_kept: int, bracket: Bracket, bitmaps: Bitmap | None = None) -> None:
        self.shape = shape
        self.num_kept = num_kept
        self.bracket = bracket if num_kept else Bracket(float("inf"), float("inf"))
        self.above, self.inside = np.empty((2, *bitmap_shape(shape)), np.uint8) if bitmaps is None else bitmaps
        self._num_above = self._num_inside = 0
        self._values: list[Floats] = []

    def add(self, start: int, magnitudes: Floats) -> None:
        """Take the next rows.

        Args:
            start: number of the first.
            magnitudes: (r, I)
        """
        low, high = (np.float32(edge) for edge in self.bracket)
        stop = start + len(magnitudes)
        above = magnitudes > high
        inside = (magnitudes >= low) ^ above
        self.above[start:stop], self.inside[start:stop] = pack_rows(above), pack_rows(inside)
        self.take(
            int(np.count_nonzero(above)),
            int(np.count_nonzero(inside)),
            np.compress(inside.reshape(-1), magnitudes.reshape(-1)),
        )

    def take(self, num_above: int, num_inside: int, values: Floats) -> None:
        """The same for a caller that marked the next rows in the bitmaps itself.

        Args:
            num_above: how many of their magnitudes lie above the bracket.
            num_inside: how many lie in it.
            values: begins with the latter, in their order; not looked at where the bracket is one number. It is copied.
        """
        self._num_above += num_above
        self._num_inside += num_inside
        if self.bracket.low != self.bracket.high:
            self._values.append(values[:num_inside].copy())

    def settle(self, loops: Loops | None = None) -> Settled | None:
        """The outcome after the last row; None where the bracket missed.

        Args:
            loops: faster twins of the functions of this module.
        """
        loops = loops or NUMPY_LOOPS
        low, high = self.bracket
        num_reached = self._num_above + self._num_inside
        if self._num_above > self.num_kept or (num_reached < self.num_kept and low > TINY):
            return None
        nothing = np.zeros(self.shape[0])
        num_left = min(self.num_kept, num_reached) - self._num_above
        if num_left == 0:
            return Settled(self.above, nothing, nothing)
        if low == high:
            chosen = loops.first_ones(self.inside, num_left)
            num_chosen = loops.row_counts(chosen).astype(np.float64)
            extra_sum, extra_square = num_chosen * low, num_chosen * (low * low)
        else:
            chosen, extra_sum, extra_square = self._largest_inside(num_left, loops)
        return Settled(np.bitwise_or(self.above, chosen, out=chosen), extra_sum, extra_square)

    def _largest_inside(self, num_left: int, loops: Loops) -> tuple[Bitmap, NDArray[np.float64], NDArray[np.float64]]:
        values = np.concatenate(self._values)
        edge = np.float32(loops.ranked(values, (values.size - num_left,))[0])
        keep = values > edge
        at_edge = np.flatnonzero(values == edge)
        keep[at_edge[: num_left - np.count_nonzero(keep)]] = True
        # The values stand in the order of rows.
        sums, squares = _sums_of_kept(values, keep, loops.row_counts(self.inside))
        return loops.chosen_ones(self.inside, keep, self.shape[1]), sums, squares


def chosen_ones(bitmap: Bitmap, choice: NDArray[np.bool_], num_columns: int) -> Bitmap:
    """Some ones of a bitmap (r, ceil(num_columns / 8)), as another; ``choice`` has a boolean for each of them."""
    bits = unpack_rows(bitmap, num_columns)
    flat = bits.reshape(-1)
    flat[np.flatnonzero(flat)] = choice
    return pack_rows(bits)


def _sums_of_kept(
    values: Floats, keep: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of the values that are kept, and of their squares, in consecutive groups of these lengths."""
    sums, squares = np.zeros((2, lengths.size))
    ends = np.cumsum(lengths)
    first = start = 0
    # Some groups at a time: large arrays would take longer to be had than to be filled.
    while first < lengths.size:
        last = max(first + 1, int(np.searchsorted(ends, start + _MOST_SUMMED, side="right")))
        stop = int(ends[last - 1])
        kept = np.multiply(values[start:stop], keep[start:stop], dtype=np.float32)
        sums[first:last] = _grouped_sums(kept, lengths[first:last])
        # In float32 the squares of large values would overflow.
        squares[first:last] = _grouped_sums(np.square(kept, dtype=np.float64), lengths[first:last])
        first, start = last, stop
    return sums, squares


def _grouped_sums(values: Floats | NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of consecutive groups of these lengths."""
    sums = np.zeros(lengths.size)
    starts, filled = np.cumsum(lengths) - lengths, lengths > 0
    if values.size:
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums


def row_sums(matrix: Floats) -> NDArray[np.float64]:
    """Sum of each row in an order that compiled loops can keep as well: (r, n) → (r,).

    The columns 0, 16, 32, ... are added up one by one in float32, so are 1, 17, 33, ... and so on: sixteen sums,
    which are then added in float64, halves first.
    """
    rows, columns = matrix.shape
    whole = columns // LANES * LANES
    # einsum goes through the middle axis in order, as add.reduce does, in a fifth of the time.
    sums = np.einsum("ijk->ik", matrix[:, :whole].reshape(rows, whole // LANES, LANES))
    sums[:, : columns - whole] += matrix[:, whole:]
    lanes = sums.astype(np.float64)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def first_ones(bitmap: Bitmap, num_ones: int) -> Bitmap:
    """A bitmap with the first ``num_ones`` ones of another, in the order of rows and columns."""
    first = np.zeros_like(bitmap)
    by_row = np.cumsum(row_counts(bitmap))
    row = int(np.searchsorted(by_row, num_ones))
    if row == len(bitmap):
        return bitmap.copy()
    first[:row] = bitmap[:row]
    missing = num_ones - (int(by_row[row - 1]) if row else 0)
    # Within the row in which they end, byte by byte and bit by bit.
    running = np.cumsum(np.bitwise_count(bitmap[row]), dtype=np.int64)
    place = int(np.searchsorted(running, missing))
    first[row, :place] = bitmap[row, :place]
    missing -= int(running[place - 1]) if place else 0
    for bit in range(8):
        if missing and bitmap[row, place] >> bit & 1:
            first[row, place] |= np.uint8(1 << bit)
            missing -= 1
    return first


NUMPY_LOOPS = Loops(ranked, row_counts, chosen_ones, first_ones)
