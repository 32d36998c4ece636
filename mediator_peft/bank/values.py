"""How the kept entries of a delta are stored: a table of codings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits
from .scales import SIGN_SCALES, RowSums

Parts = dict[str, Tensor]


class Precision(NamedTuple):
    """How finely a coding stores what it keeps; each coding reads what concerns it."""

    dtype: torch.dtype | None = None
    """Of values that are stored as numbers; None keeps float32."""

    sign_scale: str = "projection"
    """A key of ``SIGN_SCALES``."""


EXACT = Precision()


class ValueCoding(NamedTuple):
    """One way to store kept entries."""

    encode: Callable[[Tensor, Tensor, Precision], Parts]
    """(delta (O, I) float32, kept (O, I) bool, precision) → named parts, each 1-D."""

    decode: Callable[[Parts, Tensor], Tensor]
    """(parts, kept (O, I) bool) → kept entries (num_kept,) float32, row by row."""

    part_names: tuple[str, ...]


def encode_signs(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """One bit an entry, one scale a row (see ``SIGN_SCALES``).

    Our choice; BitDelta (https://arxiv.org/abs/2402.10193) keeps one sign for every weight and one scale a matrix.

    Args:
        delta: (O, I), before thinning: the norm of the whole row counts.
        kept: (O, I) bool
        precision: which scale.

    Returns:
        ``signs`` (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; ``scales`` (O,) float32.
    """
    exact = delta.double()
    rows = RowSums(
        exact.square().sum(dim=1).numpy(), torch.where(kept, exact, 0).abs().sum(dim=1).numpy(), kept.sum(dim=1).numpy()
    )
    scales = SIGN_SCALES[precision.sign_scale](rows)
    return {"signs": pack_bits(delta[kept] < 0), "scales": torch.from_numpy(scales).float()}


def decode_signs(parts: Parts, kept: Tensor) -> Tensor:
    """``±scale`` of its row for each kept entry."""
    num_kept = kept.sum(dim=1)
    magnitude = torch.repeat_interleave(parts["scales"], num_kept)
    negative = unpack_bits(parts["signs"], len(magnitude))
    return torch.where(negative, -magnitude, magnitude)


def encode_floats(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """The entries themselves, rounded once.

    Returns:
        ``values`` (num_kept,), row by row.
    """
    return {"values": delta[kept].to(precision.dtype or torch.float32)}


def decode_floats(parts: Parts, kept: Tensor) -> Tensor:
    """The stored entries as float32."""
    return parts["values"].float()


VALUES: dict[str, ValueCoding] = {
    "sign": ValueCoding(encode_signs, decode_signs, ("signs", "scales")),
    "float": ValueCoding(encode_floats, decode_floats, ("values",)),
}
