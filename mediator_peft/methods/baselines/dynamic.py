"""Dynamic averaging: how sharply a block mixes experts follows from how much they conflict in it."""

from __future__ import annotations

import torch
from torch import Tensor

CHANCE = 0.5
"""Sign conflict of independent task vectors."""


def sharpness(conflict: Tensor) -> Tensor:
    r""":math:`\beta_\ell = d_\ell / (\tfrac12 - d_\ell)`: 0 where experts agree, infinite from the chance level on.

    Our choice, for a question that reviewers of Mediator asked (docs/evidence.md).

    Args:
        conflict: (L,) sign conflict of each block, 0 or more.

    Returns:
        (L,)
    """
    return torch.where(conflict < CHANCE, conflict / (CHANCE - conflict).clamp(min=1e-12), torch.inf)


def sharpened(probabilities: Tensor, beta: Tensor) -> Tensor:
    r"""Expert weights of each block.

    .. math:: w_{\ell k} = p_k^{\beta_\ell} / \sum_j p_j^{\beta_\ell}

    β = 0 averages, β = 1 gives the router's probabilities, β = ∞ the likeliest expert alone (equal ones share).

    Args:
        probabilities: (K,)
        beta: (L,)

    Returns:
        (L, K); rows sum to 1.
    """
    ratios = probabilities / probabilities.max()
    powers = ratios[None] ** beta[:, None]
    powers = torch.where(beta[:, None].isinf(), (ratios == 1).to(powers)[None], powers)
    return powers / powers.sum(dim=1, keepdim=True)
