"""Share of the task vectors' energy that the mean loses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .statistics import Statistics


def energy_counts(statistics: Statistics) -> NDArray[np.float64]:
    """Energy of the experts around their mean, and around the base: (2,)."""
    # sum_k |tau_k - mean|^2 = sum_k |tau_k|^2 - |sum_k tau_k|^2 / K
    total = float(statistics.energies.sum())
    return np.array([max(0.0, total - statistics.energy_of_sum / len(statistics.energies)), total])


def energy_score(counts: NDArray[np.float64]) -> float:
    r""":math:`\sum_k \|\theta_k - \bar\theta\|^2 / \sum_k \|\tau_k\|^2`, in [0, 1]; 1 - 1/K for orthogonal experts.

    Our choice. 0 where no expert differs from the base.
    """
    return float(counts[0] / counts[1]) if counts[1] > 0 else 0.0
