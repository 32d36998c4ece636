"""Writing deltas into a weight such that every bit of it can be brought back.

Where the native kernels run, a float32 weight that came from a 16-bit checkpoint takes next to no memory for this: its
numbers have free low bits, so subtracting the delta and rounding gives them back. Everything else keeps what it
overwrote, and nothing more.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels import dispatch as kernels
from ..kernels.dispatch import PackedDelta, as_array, row_offsets
from ..methods.encoding.bitmaps import unpack_bits

_MIN_FREE_BITS = 8
"""With fewer, too many entries do not come back by rounding."""

_MOST_MARKED_ROWS = 0.125
"""Share of rows saved whole from which on it is smaller to save the kept entries alone."""


class Saved(Protocol):
    """The way back from one change of a weight."""

    def restore(self, weight: Tensor) -> None:
        """Bring the weight back, bit for bit; as often as one likes, also after an addition that was cut short."""

    @property
    def num_bytes(self) -> int:
        """Bytes held for it, beside the bank."""


def has_loops_for(weight: Tensor) -> bool:
    """Whether the native kernels can write to this weight."""
    has_width = weight.dtype.itemsize in (2, 4)
    return weight.device.type == "cpu" and weight.is_contiguous() and has_width and kernels.has_native()


def free_low_bits(weight: Tensor) -> int:
    """How many low bits of a float32 weight's numbers are 0, by a sample of them; 0 for any other weight."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.numel():
        return 0
    flat = weight.detach().reshape(-1).view(torch.int32).numpy()
    used = int(np.bitwise_or.reduce(flat[:: max(1, flat.size >> 12)])) & 0x7FFFFF
    return 23 if used == 0 else (used & -used).bit_length() - 1


class ComputedBack:
    """One delta, added to a float32 weight with free low bits. Rows that would not come back by rounding are saved."""

    def __init__(self, delta: PackedDelta, coefficient: float, low_bits: int) -> None:
        self._delta, self._coefficient, self._low_bits = delta, coefficient, low_bits
        self._marks = np.ones(delta.shape[0], np.uint8)
        self._rows: Tensor | None = None

    @staticmethod
    def fits(weight: Tensor, low_bits: int) -> bool:
        """Whether this way is open for a weight."""
        return low_bits >= _MIN_FREE_BITS and weight.dtype == torch.float32 and has_loops_for(weight)

    def add(self, weight: Tensor) -> bool:
        """Add the delta; False, and an untouched weight, where too many rows would have to be saved."""
        self._change(kernels.ADD_OR_MARK, weight)
        marked = torch.from_numpy(np.flatnonzero(self._marks))
        if len(marked) > max(1, _MOST_MARKED_ROWS * len(weight)):
            self.restore(weight)
            return False
        if len(marked):
            self._rows = weight[marked]
            self._change(kernels.ADD_MARKED, weight)
        return True

    def restore(self, weight: Tensor) -> None:
        self._change(kernels.TAKE_UNMARKED, weight)
        if self._rows is not None:
            weight[torch.from_numpy(np.flatnonzero(self._marks))] = self._rows
        self._marks[:], self._rows = 1, None

    @property
    def num_bytes(self) -> int:
        return self._marks.nbytes + (0 if self._rows is None else self._rows.nbytes)

    def _change(self, mode: int, weight: Tensor) -> None:
        kernels.change(mode, as_array(weight), self._delta, self._coefficient, self._low_bits, self._marks)


class KeptEntries:
    """What a mask's entries of a weight were, packed.

    Args:
        weight: (O, I), any dtype of 2 or 4 bytes.
        mask: (O, ceil(I / 8)) uint8
        offsets: of the mask, where they are known.
    """

    def __init__(self, weight: Tensor, mask: Tensor, offsets: np.ndarray | None = None) -> None:
        self._mask, self._owns_mask = mask, offsets is None
        self._offsets: np.ndarray | None = None
        if not has_loops_for(weight):
            self._saved = weight[self._bits(weight)]
            return
        self._offsets = row_offsets(mask.numpy()) if offsets is None else offsets
        num_kept = int(np.bitwise_count(mask.numpy()).sum(dtype=np.int64))
        self._saved = torch.empty(num_kept, dtype=weight.dtype)
        self._move(kernels.SAVE, weight)

    def restore(self, weight: Tensor) -> None:
        if self._offsets is None:
            weight[self._bits(weight)] = self._saved
        else:
            self._move(kernels.BRING_BACK, weight)

    @property
    def num_bytes(self) -> int:
        return self._saved.nbytes + (self._mask.nbytes if self._owns_mask else 0)

    def _bits(self, weight: Tensor) -> Tensor:
        return unpack_bits(self._mask, weight.shape[1])

    def _move(self, mode: int, weight: Tensor) -> None:
        assert self._offsets is not None
        kernels.move_kept(mode, as_array(weight), self._mask.numpy(), self._offsets, as_array(self._saved))
