"""Pairwise sign conflict."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .statistics import Statistics, count_ones


def sign_counts(statistics: Statistics) -> NDArray[np.float64]:
    """Per pair of experts: entries that both keep, and those among them with opposite signs: (K (K - 1) / 2, 2)."""
    rows = []
    for i, j in combinations(range(len(statistics.kept)), 2):
        both = statistics.kept[i] & statistics.kept[j]
        opposite = both & (statistics.negative[i] ^ statistics.negative[j])
        rows.append([count_ones(both), count_ones(opposite)])
    return np.array(rows, np.float64).reshape(-1, 2)


def sign_score(counts: NDArray[np.float64]) -> float:
    r"""Mean over pairs of opp / both, in [0, 1]; independent signs give 0.5.

    .. math:: d_\ell = \operatorname{mean}_{i<j} \; \mathrm{opp}_{ij} / \mathrm{both}_{ij}

    Our choice: the Mediator abstract (https://arxiv.org/abs/2502.04411) names parameter conflict and gives no formula.
    A pair that shares no kept entry has no say; without any such pair (one expert) the score is 0.
    """
    counts = counts.reshape(-1, 2)  # one expert has no pair, and a file of no numbers no shape
    shared = counts[:, 0] > 0
    if not shared.any():
        return 0.0
    return float((counts[shared, 1] / counts[shared, 0]).mean())
