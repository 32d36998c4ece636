"""Pairwise sign conflict."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .statistics import Statistics

CHANCE = 0.5
"""Share of opposite signs among entries whose signs are independent."""


def sign_counts(statistics: Statistics) -> NDArray[np.float64]:
    """Per pair: entries that both keep, those among them with opposite signs, and those that either keeps: (P, 3)."""
    rows, count_ones = [], statistics.count_ones
    sizes = [count_ones(kept) for kept in statistics.kept]
    for i, j in combinations(range(len(statistics.kept)), 2):
        both = statistics.kept[i] & statistics.kept[j]
        num_both = count_ones(both)
        both &= statistics.negative[i] ^ statistics.negative[j]
        rows.append([num_both, count_ones(both), sizes[i] + sizes[j] - num_both])
    return np.array(rows, np.float64).reshape(-1, 3)


def sign_score(counts: NDArray[np.float64]) -> float:
    r"""Mean over pairs of opp / both, in [0, 1]; independent signs give 0.5.

    .. math:: d_\ell = \operatorname{mean}_{i<j} \; \mathrm{opp}_{ij} / \mathrm{both}_{ij}

    Our choice: the Mediator abstract (https://arxiv.org/abs/2502.04411) names parameter conflict and gives no formula.
    A pair that changed entries but none together, such as two LoRAs on different layers, counts as 0.5: nothing is
    known of it, and an average would halve both. A pair that changed nothing has no say; without any pair (one
    expert) the score is 0.
    """
    counts = counts.reshape(-1, 3)  # one expert has no pair, and a file of no numbers no shape
    changed = counts[counts[:, 2] > 0]
    if not len(changed):
        return 0.0
    shared = changed[:, 0] > 0
    return float(np.where(shared, changed[:, 1] / np.where(shared, changed[:, 0], 1), CHANCE).mean())
