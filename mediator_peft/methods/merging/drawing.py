"""Random draws that are addressed by what they are for, never by the order of calls."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from .row import TensorContext

if TYPE_CHECKING:
    from torch import Tensor


_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def drawn_mask(context: TensorContext, expert: str, shape: tuple[int, int], density: float) -> Tensor:
    """Which entries of a tile are kept, each with probability ``density``.

    The number of an entry is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) at the entry's place in the stored tensor,
    from a state that is BLAKE2b of seed, expert and tensor: tiles, workers and resumed builds agree.

    Args:
        context: of the tile.
        expert: name.
        shape: (r, I) of the tile.
        density: in (0, 1].

    Returns:
        (r, I) bool
    """
    key = f"{context.seed}/{expert}/{context.name}".encode()
    state = np.frombuffer(blake2b(key, digest_size=8).digest(), "<u8")
    mixed = context.flat_indices(*shape).numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed *= _STEP
        mixed += state
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    mixed ^= mixed >> np.uint64(31)
    # 53 bits, as many as a float64 holds: below 1, so that density 1 keeps all.
    return torch.from_numpy((mixed >> np.uint64(11)) * 2.0**-53 < density)
