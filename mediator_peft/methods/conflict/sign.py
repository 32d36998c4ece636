"""Pairwise sign conflict."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def sign_counts(task_vectors: Tensor, signs: Tensor) -> Tensor:
    """Per pair of experts: entries that both keep, and those among them with opposite signs.

    Args:
        task_vectors: (K, n), not used by this score.
        signs: (K, n) in {-1, 0, 1}, 0 where trimmed.

    Returns:
        (K (K - 1) / 2, 2) float64: ``both`` and ``opp`` of each pair.
    """
    rows = []
    for i, j in combinations(range(len(signs)), 2):
        product = signs[i] * signs[j]
        rows.append([int(torch.count_nonzero(product)), int(torch.count_nonzero(product < 0))])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def sign_score(counts: Tensor) -> float:
    r"""Mean over pairs of opp / both, in [0, 1]; independent signs give 0.5.

    .. math:: d_\ell = \operatorname{mean}_{i<j} \; \mathrm{opp}_{ij} / \mathrm{both}_{ij}

    Our choice: the Mediator abstract (https://arxiv.org/abs/2502.04411) names parameter conflict and gives no formula.
    A pair that shares no kept entry has no say; without any such pair (one expert) the score is 0.
    """
    shared = counts[:, 0] > 0
    if not shared.any():
        return 0.0
    return float((counts[shared, 1] / counts[shared, 0]).mean())
