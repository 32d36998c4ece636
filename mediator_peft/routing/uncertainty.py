"""How unsure the router is. Larger means less sure."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor


def normalised_entropy(probabilities: Tensor) -> Tensor:
    r"""Ambiguity :math:`h = H(p) / \log K`, in [0, 1]; 0 for a single expert.

    Args:
        probabilities: (B, K), rows sum to 1.

    Returns:
        (B,)
    """
    num_experts = probabilities.shape[1]
    if num_experts == 1:
        return torch.zeros_like(probabilities[:, 0])
    return torch.special.entr(probabilities).sum(dim=1) / log(num_experts)


def free_energy(scores: Tensor) -> Tensor:
    r"""Energy :math:`-\log \sum_k e^{s_k}` of unnormalised scores; larger is less like anything known.

    Liu et al. 2020, Energy-based Out-of-distribution Detection, eq. (4) at temperature 1
    (https://arxiv.org/abs/2010.03759).

    Args:
        scores: (B, K)

    Returns:
        (B,)
    """
    return -scores.float().logsumexp(dim=1)


def squared_mahalanobis(whitened: Tensor, whitened_means: Tensor) -> Tensor:
    r"""Squared Mahalanobis distances to class means, :math:`(z-\mu_k)^\top \Sigma^{-1} (z-\mu_k)`.

    Args:
        whitened: (B, H), features times a root of the inverse covariance.
        whitened_means: (K, H), class means likewise.

    Returns:
        (B, K)
    """
    return torch.cdist(whitened, whitened_means, compute_mode="donot_use_mm_for_euclid_dist").square()
