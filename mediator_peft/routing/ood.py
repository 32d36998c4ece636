"""Held-out statistics of the OOD score, and the gate coefficient that follows from a prompt's score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SHARE_IN_TAIL = 0.2
_SMALLEST_TAIL = 5
_TRUSTED_SHARE, _UNKNOWN_SHARE = 0.15, 0.25
_DISTANCE_MARGIN = 1.4


class Known(NamedTuple):
    """Prompts the router was not fitted on, the held-out statistics of the gate."""

    ood_score: Tensor
    """(N,) of calibration prompts; N is 0 for a router that was made without texts."""

    labels: Tensor
    """(N,) number of each prompt's expert."""

    distance: Tensor
    """(N,) of the same prompts."""

    background_novelty: Tensor
    """(M,) of background prompts that belong to no expert; M is 0 where the router was fitted without."""

    background_excess: Tensor
    """(M,) by how much their distance exceeds the largest usual one of their nearest expert."""

    background_share: Tensor | None = None
    """(M,) each background prompt's share of the whole, every family counting the same. None for routers without a
    learned decision rule; with one, ``ood_score`` holds its OOD scores."""

    @property
    def num_experts(self) -> int:
        """K"""
        return int(self.labels.max()) + 1

    @property
    def has_texts(self) -> bool:
        """Whether there are calibration prompts; without, background prompts alone decide."""
        return len(self.labels) > 0


class Tail(NamedTuple):
    r"""Upper tail of each expert's values: :math:`P(Y \ge y) = s\,e^{-(y - u)/\sigma}` for :math:`y \ge u`."""

    start: Tensor
    """(K,) u, where the tail begins."""

    share: Tensor
    """(K,) s, share of known prompts at or beyond ``start``."""

    scale: Tensor
    r"""(K,) :math:`\sigma`, larger is heavier."""


def fit_tail(values: Tensor, labels: Tensor, num_experts: int) -> Tail:
    r"""Each expert's own exponential tail, from the largest fifth of its known prompts.

    Each expert has its own statistics: prompts of one expert may be alike and those of another varied, and with
    common statistics whatever is nearer than the most varied expert's prompts would count as known. The scale is the
    mean excess over the start (for log-distances this is Hill's estimator, 1975). With a fitted tail a rate smaller
    than one in the number of known prompts has a threshold too, and the share falls off smoothly beyond the last.

    Args:
        values: (N,) of prompts the router was not fitted on.
        labels: (N,) their experts' numbers; every expert at least once.
        num_experts: K
    """
    starts, shares, scales = [], [], []
    spread = values.std() if len(values) > 1 else values.new_tensor(1.0)
    for expert in range(num_experts):
        own = values[labels == expert].sort(descending=True).values
        count = len(own)
        size = min(max(_SMALLEST_TAIL, round(_SHARE_IN_TAIL * count)), count - 1)
        starts.append(own[size])
        shares.append(values.new_tensor((size + 0.5) / (count + 1)))
        excess = (own[:size] - own[size]).mean() if size else spread
        scales.append(excess.clamp(min=1e-6 + 1e-3 * float(spread)))
    return Tail(torch.stack(starts), torch.stack(shares), torch.stack(scales))


def tail_share(values: Tensor, nearest: Tensor, tail: Tail) -> Tensor:
    r"""Share :math:`\pi` of the nearest expert's known prompts whose value is at least as large.

    Args:
        values: (B,)
        nearest: (B,) number of the best-scored expert.
        tail: of the known prompts.

    Returns:
        (B,) in [0, 1]; before the tail's start it is not resolved, and at least the tail's whole share.
    """
    return (tail.share[nearest] * ((tail.start[nearest] - values) / tail.scale[nearest]).exp()).clamp(max=1.0)


def threshold(tail: Tail, ood_alpha: float) -> Tensor:
    """(K,) the value that a share ``ood_alpha`` of each expert's known prompts exceeds."""
    return tail.start + tail.scale * (tail.share / ood_alpha).log()


class Trust(NamedTuple):
    """How far a prompt is from what is known, and what follows."""

    tail_share: Tensor
    """(B,) share of the nearest expert's known prompts that are at least as novel; NaN where there are none."""

    is_ood: Tensor
    """(B,) bool, whether the fallback gets more than the experts. Routers that were fitted without a decision rule:
    whether that share is below ``ood_alpha``, or the prompt is farther off than any ordinary one."""

    gate_coefficient: Tensor
    """(B,) in [0, 1]"""


def gate_coefficients(
    ood_score: Tensor, distance: Tensor, nearest: Tensor, known: Known, ood_alpha: float, ood_beta: float = 0.05
) -> Trust:
    r"""Gate coefficient of each prompt: the weight that goes to the experts.

    .. math:: t = \max\Bigl(\min(1, \pi/\alpha),\; \min\bigl(1, \max(0, \tfrac32 - \beta(x) / \beta)\bigr)\Bigr)

    :math:`\pi` is the share of the nearest expert's known prompts with at least this OOD score, so known prompts go to
    their expert except for a share :math:`\alpha`. :math:`\beta(x)` is the share of held-out background prompts with
    at most this OOD score, each from a family that the rule was not fitted on; over these prompts the mean of the
    second term is :math:`\beta`. Where both rates cannot be held, the first one is. A prompt is OOD where
    :math:`t < \tfrac12`. Without calibration prompts the first term is 0, and :math:`\alpha` is not held. Our choice,
    measured in ``docs/routing.md``.

    Args:
        ood_score: (B,) OOD scores.
        distance: (B,)
        nearest: (B,) number of the best-scored expert.
        known: held-out statistics.
        ood_alpha: share of known prompts that may be flagged as unknown.
        ood_beta: share of unknown prompts that may reach an expert.
    """
    if known.has_texts:
        share = tail_share(ood_score, nearest, fit_tail(known.ood_score, known.labels, known.num_experts))
        gate_coefficient = (share / ood_alpha).clamp(max=1.0)
    else:
        share, gate_coefficient = torch.full_like(ood_score, torch.nan), torch.zeros_like(ood_score)
    if known.background_share is not None:
        accepted = unknown_share(ood_score, known)
        gate_coefficient = torch.maximum(gate_coefficient, (1.5 - accepted / ood_beta).clamp(0.0, 1.0))
        return Trust(share, gate_coefficient < 0.5, gate_coefficient)
    is_ood = share < ood_alpha
    if len(known.background_novelty):
        gate_coefficient, beyond = _trust_without_rule(gate_coefficient, ood_score, distance, nearest, known)
        is_ood = is_ood | beyond
    return Trust(share, is_ood, gate_coefficient)


def ood_threshold(known: Known, ood_alpha: float, ood_beta: float) -> Tensor:
    """(K,) the OOD score above which a prompt of each expert is OOD; see :func:`gate_coefficients`. (1,) for all of
    them without calibration prompts.

    Args:
        known: held-out statistics.
        ood_alpha: share of known prompts that may be flagged as unknown.
        ood_beta: share of unknown prompts that may reach an expert.
    """
    tail = fit_tail(known.ood_score, known.labels, known.num_experts) if known.has_texts else None
    if known.background_share is None:
        assert tail is not None
        return threshold(tail, ood_alpha)
    values, order = known.background_novelty.sort()
    beyond = known.background_share[order].cumsum(dim=0) > ood_beta
    least = values[beyond][0] if beyond.any() else values.new_tensor(torch.inf)
    return least.reshape(1) if tail is None else torch.maximum(threshold(tail, 0.5 * ood_alpha), least)


def unknown_share(ood_score: Tensor, known: Known) -> Tensor:
    """(B,) share of held-out background prompts whose OOD score is at most as large, every family counting the same."""
    assert known.background_share is not None
    values, order = known.background_novelty.sort()
    below = torch.searchsorted(values, ood_score.to(values), right=True)
    shares = torch.cat([values.new_zeros(1), known.background_share[order].to(values).cumsum(dim=0)])
    return shares[below]


def _trust_without_rule(
    gate_coefficient: Tensor, ood_score: Tensor, distance: Tensor, nearest: Tensor, known: Known
) -> tuple[Tensor, Tensor]:
    r"""The gate of routers that were fitted before there was a decision rule.

    A prompt that is less novel than 85 % of the background prompts goes to its expert, one that is more novel than a
    quarter of them does not; nor does one that is much farther from the nearest expert than every background prompt.
    """
    less_novel = (known.background_novelty.unsqueeze(0) <= ood_score.unsqueeze(1)).float().mean(dim=1)
    width = _UNKNOWN_SHARE - _TRUSTED_SHARE
    gate_coefficient = torch.maximum(gate_coefficient, ((_UNKNOWN_SHARE - less_novel) / width).clamp(0.0, 1.0))
    farthest = known.background_excess.max() + _DISTANCE_MARGIN
    beyond = excess_distance(distance, nearest, known) > farthest
    return torch.where(beyond, 0.0, gate_coefficient), beyond


def excess_distance(distance: Tensor, nearest: Tensor, known: Known) -> Tensor:
    """(B,) by how much distances exceed the 99 % point of the nearest expert's known prompts; below 0 within it."""
    return distance - threshold(fit_tail(known.distance, known.labels, known.num_experts), 0.01)[nearest]
