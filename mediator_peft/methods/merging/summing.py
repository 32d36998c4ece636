"""Sums over experts."""

from __future__ import annotations

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
