"""Scores and OOD score → expert weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ood import Known, gate_coefficients
from .uncertainty import normalised_entropy


class GateSettings(NamedTuple):
    """How scores and OOD score become weights."""

    ood_alpha: float
    """Share of known prompts that may be flagged as unknown, in (0, 1)."""

    routing_top_p: float
    """Probability mass kept, in (0, 1]."""

    fallback_column: bool
    """Whether the base is a column of its own, the last."""

    ood_beta: float = 0.05
    """Share of unknown prompts that may reach an expert, in (0, 1)."""


class RouteOutput(NamedTuple):
    """What was decided for a batch of prompts."""

    expert_weights: Tensor
    """(B, K), or (B, K + 1) with the base as fallback, its column last; non-negative. A row sums to 1, or to the
    prompt's gate coefficient where the backbone is the fallback."""

    scores: Tensor
    """(B, K), the router's log-probability of each expert; larger is a better match."""

    uncertainty: Tensor
    """(B,) in [0, 1]: ``1 - gate_coefficient * (1 - ambiguity)``; 0 for a clear known prompt, 1 for an unknown one."""

    is_ood: Tensor
    """(B,) bool, True where the fallback gets more than the experts: the gate coefficient is below one half. For
    routers without a decision rule see :func:`~mediator_peft.routing.ood.gate_coefficients`."""


def smallest_sufficient_set(probabilities: Tensor, routing_top_p: float) -> Tensor:
    """Probabilities of the fewest experts that together reach ``routing_top_p``, scaled to sum to 1.

    Of equal probabilities the earlier column goes first.

    Args:
        probabilities: (B, K), rows sum to 1.
        routing_top_p: in (0, 1]

    Returns:
        (B, K)
    """
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
    mass_before = ranked.cumsum(dim=1) - ranked
    # The first always stays; another one only while what stands before it is short of routing_top_p.
    stays = mass_before < routing_top_p
    stays[:, 0] = True
    selected = torch.zeros_like(probabilities).scatter(1, order, torch.where(stays, ranked, 0))
    return selected / selected.sum(dim=1, keepdim=True)


def gate(scores: Tensor, ood_score: Tensor, distance: Tensor, known: Known, settings: GateSettings) -> RouteOutput:
    r"""Mix experts by how sure the router is.

    .. math:: w(x) = t(x)\, p_\mathrm{sel}(x) \text{ on the experts}, \quad 1 - t(x) \text{ on the fallback}

    Our choice; the Mediator abstract (https://arxiv.org/abs/2502.04411) says that experts are selected and merged by
    task uncertainty and gives no formula.

    Args:
        scores: (B, K), unnormalised log-probabilities.
        ood_score: (B,)
        distance: (B,)
        known: the held-out statistics of both.
        settings: rates and shares.
    """
    log_probabilities = scores.float().log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    _, is_ood, gate_coefficient = gate_coefficients(
        ood_score, distance, scores.argmax(dim=1), known, settings.ood_alpha, settings.ood_beta
    )
    weights = gate_coefficient.unsqueeze(1) * smallest_sufficient_set(probabilities, settings.routing_top_p)
    if settings.fallback_column:
        weights = torch.cat([weights, (1 - gate_coefficient).unsqueeze(1)], dim=1)
    ambiguity = normalised_entropy(probabilities)
    return RouteOutput(weights, log_probabilities, 1 - gate_coefficient * (1 - ambiguity), is_ood)
