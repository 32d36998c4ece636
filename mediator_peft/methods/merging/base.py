"""No merge: the backbone stays the base."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_base(task_vectors: Tensor) -> Tensor:
    """Zero, so that the backbone is the base: nothing dense to ship, and the fallback costs nothing (our choice).

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape), zeros.
    """
    return torch.zeros_like(task_vectors[0])
