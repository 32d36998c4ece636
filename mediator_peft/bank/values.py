"""How the kept entries of a delta are stored: a table of codings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits

Parts = dict[str, Tensor]


class ValueCoding(NamedTuple):
    """One way to store kept entries."""

    encode: Callable[[Tensor, Tensor, torch.dtype | None], Parts]
    """(delta (O, I) float32, kept (O, I) bool, storage dtype or None for exact) → named parts, each 1-D."""

    decode: Callable[[Parts, Tensor], Tensor]
    """(parts, kept (O, I) bool) → kept entries (num_kept,) float32, row by row."""

    part_names: tuple[str, ...]


def encode_signs(delta: Tensor, kept: Tensor, storage: torch.dtype | None) -> Parts:
    r"""One bit an entry, one scale a row, chosen so that the row keeps its Euclidean norm.

    .. math:: s_r = \|\Delta_r\| / \sqrt{\text{kept in row } r}

    Our choice; BitDelta (https://arxiv.org/abs/2402.10193) keeps one sign for every weight and one scale a matrix.

    Args:
        delta: (O, I), before thinning: the norm of the whole row counts.
        kept: (O, I) bool
        storage: not used.

    Returns:
        ``signs`` (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; ``scales`` (O,) float32.
    """
    num_kept = kept.sum(dim=1)
    scales = torch.where(num_kept > 0, delta.norm(dim=1) / num_kept.clamp(min=1).sqrt(), 0)
    return {"signs": pack_bits(delta[kept] < 0), "scales": scales.float()}


def decode_signs(parts: Parts, kept: Tensor) -> Tensor:
    """``±scale`` of its row for each kept entry."""
    num_kept = kept.sum(dim=1)
    magnitude = torch.repeat_interleave(parts["scales"], num_kept)
    negative = unpack_bits(parts["signs"], len(magnitude))
    return torch.where(negative, -magnitude, magnitude)


def encode_floats(delta: Tensor, kept: Tensor, storage: torch.dtype | None) -> Parts:
    """The entries themselves, rounded once to ``storage``; ``None`` keeps float32.

    Returns:
        ``values`` (num_kept,), row by row.
    """
    return {"values": delta[kept].to(storage or torch.float32)}


def decode_floats(parts: Parts, kept: Tensor) -> Tensor:
    """The stored entries as float32."""
    return parts["values"].float()


VALUES: dict[str, ValueCoding] = {
    "sign": ValueCoding(encode_signs, decode_signs, ("signs", "scales")),
    "float": ValueCoding(encode_floats, decode_floats, ("values",)),
}
