"""Scores and novelty → expert weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .uncertainty import normalised_entropy, tail_share


class RouteOutput(NamedTuple):
    """What was decided for a batch of prompts."""

    expert_weights: Tensor
    """(B, K), or (B, K + 1) with the base as fallback, its column last; non-negative. A row sums to 1, or to the
    prompt's trust where the backbone is the fallback."""

    scores: Tensor
    """(B, K), the router's log-probability of each expert; larger is a better match."""

    uncertainty: Tensor
    """(B,) in [0, 1]: ``1 - trust * (1 - ambiguity)``; 0 for a clear and known prompt, 1 for an unknown one."""

    is_ood: Tensor
    """(B,) bool, True where the prompt is more novel than all but a share ``ood_alpha`` of known prompts."""


def smallest_sufficient_set(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities of the fewest experts that together reach ``top_p``, scaled to sum to 1.

    Of equal probabilities the earlier column goes first.

    Args:
        probabilities: (B, K), rows sum to 1.
        top_p: in (0, 1]

    Returns:
        (B, K)
    """
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
    mass_before = ranked.cumsum(dim=1) - ranked
    # The first always stays; another one only while what stands before it is short of top_p.
    stays = mass_before < top_p
    stays[:, 0] = True
    selected = torch.zeros_like(probabilities).scatter(1, order, torch.where(stays, ranked, 0))
    return selected / selected.sum(dim=1, keepdim=True)


def trust_of(novelty: Tensor, known_novelty: Tensor, ood_alpha: float) -> Tensor:
    r"""Trust :math:`t = \min(1, \pi / \alpha)`, in [0, 1].

    Args:
        novelty: (B,)
        known_novelty: (N,) ascending
        ood_alpha: share of known prompts that may be taken for unknown.

    Returns:
        (B,)
    """
    return (tail_share(novelty, known_novelty) / ood_alpha).clamp(max=1.0)


def gate(
    scores: Tensor, novelty: Tensor, known_novelty: Tensor, *, ood_alpha: float, top_p: float, fallback_column: bool
) -> RouteOutput:
    r"""Mix experts by how sure the router is.

    .. math:: w(x) = t(x)\, p_\mathrm{sel}(x) \text{ on the experts}, \quad 1 - t(x) \text{ on the fallback}

    Our choice; the Mediator abstract (https://arxiv.org/abs/2502.04411) says that experts are selected and merged by
    task uncertainty and gives no formula.

    Args:
        scores: (B, K), unnormalised log-probabilities.
        novelty: (B,)
        known_novelty: (N,) ascending, of held-out calibration prompts.
        ood_alpha: share of known prompts that may be taken for unknown, in (0, 1).
        top_p: probability mass kept, in (0, 1].
        fallback_column: whether the base is a column of its own, the last.
    """
    log_probabilities = scores.float().log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    trust = trust_of(novelty, known_novelty, ood_alpha)
    weights = trust.unsqueeze(1) * smallest_sufficient_set(probabilities, top_p)
    if fallback_column:
        weights = torch.cat([weights, (1 - trust).unsqueeze(1)], dim=1)
    ambiguity = normalised_entropy(probabilities)
    return RouteOutput(weights, log_probabilities, 1 - trust * (1 - ambiguity), trust < 1)
