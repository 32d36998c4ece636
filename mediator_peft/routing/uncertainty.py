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


def squared_mahalanobis(whitened: Tensor, whitened_means: Tensor) -> Tensor:
    r"""Squared Mahalanobis distance to the nearest class mean, :math:`\min_k (z-\mu_k)^\top \Sigma^{-1} (z-\mu_k)`.

    Args:
        whitened: (B, H), features times a root of the inverse covariance.
        whitened_means: (K, H), class means likewise.

    Returns:
        (B,)
    """
    return torch.cdist(whitened, whitened_means, compute_mode="donot_use_mm_for_euclid_dist").square().amin(dim=1)


def tail_share(novelty: Tensor, known: Tensor) -> Tensor:
    r"""Share :math:`\pi` of known prompts at least as novel as each prompt.

    Args:
        novelty: (B,)
        known: (N,) ascending, of held-out calibration prompts.

    Returns:
        (B,) in [0, 1]
    """
    below = torch.searchsorted(known, novelty.contiguous())
    return 1 - below / max(1, len(known))
