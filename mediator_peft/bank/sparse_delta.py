"""The delta of one matrix for one expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits
from .values import EXACT, VALUES, Parts, Precision


@dataclass(frozen=True)
class SparseDelta:
    """Positions and values of the kept entries of one (O, I) matrix, packed."""

    shape: tuple[int, int]
    """(O, I), outputs and inputs of the layer, also for ``Conv1D``."""

    coding: str
    """A key of ``VALUES``."""

    mask: Tensor
    """(O, ceil(I / 8)) uint8, a one where an entry is kept."""

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
            coding: a key of ``VALUES``.
            precision: how finely the coding stores; by default, values in float32.
            bias: (O,) float32 or None.
        """
        parts = VALUES[coding].encode(delta, kept, precision)
        return cls((delta.shape[0], delta.shape[1]), coding, pack_bits(kept), parts, bias)

    @property
    def kept(self) -> Tensor:
        """(O, I) bool."""
        return unpack_bits(self.mask, self.shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of everything stored, in memory."""
        tensors = [self.mask, *self.parts.values()] + ([] if self.bias is None else [self.bias])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> SparseDelta:
        """The same on another device."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        bias = None if self.bias is None else self.bias.to(device)
        return SparseDelta(self.shape, self.coding, self.mask.to(device), parts, bias)

    def dense(self) -> Tensor:
        """The delta as a plain matrix: (O, I) float32. The clear reference for all faster ways of applying it."""
        kept = self.kept
        matrix = torch.zeros(self.shape, device=self.mask.device)
        matrix[kept] = VALUES[self.coding].decode(self.parts, kept)
        return matrix
