"""Kept entries as floating-point numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .base import Encoding, Parts, Precision, rescaled_numbers

if TYPE_CHECKING:
    from torch import Tensor


class FloatEncoding(Encoding):
    """The kept entries themselves, rescaled (see ``NUMBER_SCALES``) and rounded once; exact at density 1."""

    part_names = ("values",)
    in_kernels = True

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """``values`` (num_kept,), row by row, in ``precision.dtype``."""
        return {"values": rescaled_numbers(delta, kept, precision).to(precision.dtype or torch.float32)}

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """The stored entries as float32."""
        return parts["values"].float()

    def part_sizes(self, num_kept: int) -> dict[str, int]:
        return {"values": num_kept}

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        return num_kept * number_size

    def row_values(self, parts: Parts, rows: Tensor, counts: Tensor, places: Tensor) -> Tensor:
        return parts["values"][places].float()
