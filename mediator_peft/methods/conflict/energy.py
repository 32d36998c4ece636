"""What the mean loses of the experts."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_counts(task_vectors: Tensor, signs: Tensor) -> Tensor:
    """Energy of the experts around their mean, and around the base.

    Args:
        task_vectors: (K, n)
        signs: (K, n), not used by this score.

    Returns:
        (2,) float64
    """
    total = task_vectors.square().sum(dtype=torch.float64)
    mean = task_vectors.mean(dim=0).square().sum(dtype=torch.float64)
    # sum_k |tau_k - mean|^2 = sum_k |tau_k|^2 - K |mean|^2
    return torch.stack([(total - len(task_vectors) * mean).clamp(min=0), total])


def energy_score(counts: Tensor) -> float:
    r""":math:`\sum_k \|\theta_k - \bar\theta\|^2 / \sum_k \|\tau_k\|^2`, in [0, 1]; 1 - 1/K for orthogonal experts.

    Our choice. 0 where no expert differs from the base.
    """
    return float(counts[0] / counts[1]) if counts[1] > 0 else 0.0
