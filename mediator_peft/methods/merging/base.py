"""No merge: the backbone stays the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .row import MergeMethod

if TYPE_CHECKING:
    from torch import Tensor


def keep_base(task_vectors: Tensor) -> Tensor:
    """Zero, so that the backbone is the base: nothing dense to ship, and the fallback costs nothing (our choice).

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape), zeros.
    """
    return torch.zeros_like(task_vectors[0])


BASE = MergeMethod(
    keep_base,
    is_entrywise=True,
    needs_base=True,
    scale_of_sum=lambda num_experts: 0.0,
    paper="none: the base as it is",
    cost="none",
    good_for="a fallback to the base that costs nothing",
)
