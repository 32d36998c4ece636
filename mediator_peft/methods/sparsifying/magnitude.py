"""Keep the entries of largest magnitude, by exact selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...deferred import torch
from ...storage import as_array, to_tensor
from .selection import Floats, smallest_kept

if TYPE_CHECKING:
    from torch import Tensor


def keep_largest(delta: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep the ``round(density * numel)`` entries of largest magnitude, per tensor.

    Among entries of equal magnitude at the edge, those that come first are kept, so that the count is exact and the
    choice repeatable (the papers leave ties open). An exact zero is never counted as kept.

    Args:
        delta: (*shape)
        density: share kept, in (0, 1].
        generator: not used; part of the signature that all sparsifiers share.

    Returns:
        (*shape), a new tensor.
    """
    return torch.where(largest_mask(delta, density), delta, 0)


def largest_mask(delta: Tensor, density: float) -> Tensor:
    """Where :func:`keep_largest` keeps: (*shape) bool."""
    kept = largest_entries(as_array(delta.detach().to("cpu", torch.float32)), density)
    return to_tensor(kept).to(delta.device)


def largest_entries(delta: Floats, density: float) -> NDArray[np.bool_]:
    """:func:`largest_mask` in numpy."""
    num_kept = round(density * delta.size)
    magnitude = np.abs(delta).reshape(-1)
    if num_kept >= magnitude.size:
        kept = magnitude > 0
    elif num_kept == 0:
        kept = np.zeros(magnitude.size, dtype=bool)
    else:
        edge = np.float32(smallest_kept(magnitude, num_kept))
        kept = magnitude > edge
        if edge > 0:
            at_edge = np.flatnonzero(magnitude == edge)
            kept[at_edge[: num_kept - np.count_nonzero(kept)]] = True
    return kept.reshape(delta.shape)
