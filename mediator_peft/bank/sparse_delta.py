"""The delta of one matrix for one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..deferred import torch
from ..methods.encoding import ENCODINGS
from ..methods.encoding.base import EXACT, Parts, Precision
from ..methods.encoding.bitmaps import pack_bits, unpack_bits
from ..methods.encoding.factors import store_factors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseDelta:
    """Positions and values of the kept entries of one (O, I) matrix, packed."""

    shape: tuple[int, int]
    """(O, I), outputs and inputs of the layer, also for ``Conv1D``."""

    coding: str
    """A key of ``ENCODINGS``."""

    mask: Tensor
    """(O, ceil(I / 8)) uint8, a one where an entry is kept; all ones where the coding has no positions."""

    parts: Parts
    """What the coding stores."""

    bias: Tensor | None = None
    """(O,) float32, the whole delta of the layer's bias; None where the layer has none."""

    @classmethod
    def from_dense(
        cls, delta: Tensor, kept: Tensor, coding: str, precision: Precision = EXACT, bias: Tensor | None = None
    ) -> SparseDelta:
        """Pack a delta.

        Args:
            delta: (O, I) float32, before thinning, in main memory.
            kept: (O, I) bool, where entries are kept.
            coding: a key of ``ENCODINGS``.
            precision: how finely the coding stores; by default, values as they are, in float32.
            bias: (O,) float32 or None.
        """
        parts, shape = ENCODINGS[coding].encode(delta, kept, precision), (delta.shape[0], delta.shape[1])
        mask = pack_bits(kept) if ENCODINGS[coding].has_positions else full_mask(shape, delta.device)
        return cls(shape, coding, mask, parts, bias)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> SparseDelta:
        """A delta of low rank.

        Args:
            left: (O, r), any floating dtype; it is kept.
            right: (r, I), likewise.
            bias: (O,) float32 or None.
        """
        shape = (left.shape[0], right.shape[1])
        return cls(shape, "factors", full_mask(shape, left.device), store_factors(left, right), bias)

    @property
    def kept(self) -> Tensor:
        """(O, I) bool."""
        return unpack_bits(self.mask, self.shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of everything stored, in memory."""
        tensors = [*self.parts.values()] + ([] if self.bias is None else [self.bias])
        if ENCODINGS[self.coding].has_positions:
            tensors.append(self.mask)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> SparseDelta:
        """The same on another device."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        bias = None if self.bias is None else self.bias.to(device)
        return SparseDelta(self.shape, self.coding, self.mask.to(device), parts, bias)

    def dense(self) -> Tensor:
        """The delta as a plain matrix: (O, I) float32. The clear reference for all faster ways of applying it."""
        encoding = ENCODINGS[self.coding]
        if not encoding.has_positions:
            return encoding.matrix(self.parts, self.shape)
        kept = self.kept
        matrix = torch.zeros(self.shape, device=self.mask.device)
        matrix[kept] = encoding.decode(self.parts, kept)
        return matrix

    def product(self, x: Tensor) -> Tensor:
        """``dense() @ x`` for each vector of ``x``, by its factors where it has some: (..., I) → (..., O)."""
        result = ENCODINGS[self.coding].product(self.parts, self.shape, x)
        return torch.nn.functional.linear(x, self.dense()) if result is None else result


def full_mask(shape: tuple[int, int], device: torch.device) -> Tensor:
    """The mask of a matrix (O, I) of which every entry is given: (O, ceil(I / 8)) uint8."""
    row = pack_bits(torch.ones(1, shape[1], dtype=torch.bool, device=device))
    return row.repeat(shape[0], 1)
