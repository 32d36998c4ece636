"""Sums over experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def sum_in_order(task_vectors: Tensor) -> Tensor:
    """Sum in the order of the experts, so that an entry's rounding does not depend on how many stand beside it.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape), a new tensor.
    """
    total = task_vectors[0].clone()
    for vector in task_vectors[1:]:
        total += vector
    return total


def disjoint_sum(trimmed: Sequence[Tensor] | Tensor) -> Tensor:
    """Elect the sign of the sum, and add up the entries that agree with it; an even vote elects +1.

    Steps 2 and 3 of Algorithm 1 of *TIES-Merging*, https://arxiv.org/abs/2306.01708, with the sum for the mean.

    Args:
        trimmed: K times (*shape); a zero casts no vote.

    Returns:
        (*shape), a new tensor.
    """
    return _disjoint(trimmed)[0]


def disjoint_mean(trimmed: Sequence[Tensor] | Tensor) -> Tensor:
    """As :func:`disjoint_sum`, divided by the number of entries that agree; 0 where none does."""
    total, count = _disjoint(trimmed)
    return total.div_(count.clamp_(min=1))


def _disjoint(trimmed: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    votes = trimmed[0].clone()
    for vector in trimmed[1:]:
        votes += vector
    is_positive = votes >= 0
    total, count = votes.zero_(), torch.zeros_like(votes)
    for vector in trimmed:
        agrees = (vector != 0) & ((vector > 0) == is_positive)
        total += torch.where(agrees, vector, 0)
        count += agrees
    return total, count
