"""Mask, sign and scale: one bit per kept entry and one scale per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .base import Encoding, Parts, Precision
from .bitmaps import pack_bits, unpack_bits
from .scales import SIGN_SCALES, RowSums

if TYPE_CHECKING:
    from torch import Tensor


class SignEncoding(Encoding):
    """Bitmap of kept entries, their signs, and one scale per row (see ``SIGN_SCALES``).

    The form is that of T-Switch (https://arxiv.org/abs/2412.00054), which has one scale per task vector; a scale per
    row is our choice. BitDelta (https://arxiv.org/abs/2402.10193) keeps the sign of every weight.
    """

    part_names = ("signs", "scales")
    in_kernels = True
    has_scales = True

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """Signs and scales of the kept entries.

        Returns:
            ``signs`` (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; ``scales`` (O,) bfloat16:
            their rounding changed no measured answer (docs/forms.md).
        """
        exact = delta.double()
        rows = RowSums(
            exact.square().sum(dim=1).numpy(),
            torch.where(kept, exact, 0).abs().sum(dim=1).numpy(),
            kept.sum(dim=1).numpy(),
        )
        scales = SIGN_SCALES[precision.rescale](rows)
        return {"signs": pack_bits(delta[kept] < 0), "scales": torch.from_numpy(scales).bfloat16()}

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """``±scale`` of its row for each kept entry."""
        magnitude = torch.repeat_interleave(parts["scales"].float(), kept.sum(dim=1))
        negative = unpack_bits(parts["signs"], len(magnitude))
        return torch.where(negative, -magnitude, magnitude)

    def scaled(self, parts: Parts, factor: float) -> Parts:
        return {**parts, "scales": (parts["scales"].float() * factor).to(parts["scales"].dtype)}

    def part_sizes(self, num_kept: int) -> dict[str, int]:
        return {"signs": -(-num_kept // 8)}

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        return num_kept / 8 + 2 * num_rows

    def row_values(self, parts: Parts, rows: Tensor, counts: Tensor, places: Tensor) -> Tensor:
        magnitudes = torch.repeat_interleave(parts["scales"][rows].float(), counts)
        negative = (parts["signs"][places >> 3].long() >> (places & 7)) & 1
        return torch.where(negative.bool(), -magnitudes, magnitudes)
