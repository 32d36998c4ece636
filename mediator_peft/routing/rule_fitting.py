"""Fitting the decision rule, and what it says of prompts and families that were left out of the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decision_rule import (
    DecisionRule,
    Negatives,
    combined_ood_score,
    detector_statistics,
    equal_weights,
    fit_combination,
    fit_detectors,
    fit_detectors_inside,
)
from .neighbours import Neighbours, fit_neighbours
from .routers import Router


class LeftOut(NamedTuple):
    """What routers and detectors said of prompts that they were not fitted on."""

    scores: Tensor
    """(N, K) of the texts, before the temperature."""

    distance: Tensor
    """(N,) of the texts."""

    statistics: Tensor
    """(N, S) of the texts: detector, minus distance, and where there is a basis closeness."""

    altered: Tensor
    """(V, N, S) statistics of their altered copies."""

    negative_scores: Tensor
    """(M, K)"""

    negative_statistics: Tensor
    """(M, S)"""


def leave_out(
    make_router: Callable[[], Router],
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    negatives: Negatives,
    augmented: Tensor | None,
) -> LeftOut:
    """Judge every text by a fit on the other folds, and every family of negatives by a fit without it.

    A fold leaves out its texts with their altered copies, and the kinds of families whose number falls on it.

    Args:
        make_router: an unfitted router, one per fold.
        features: (N, H)
        labels: (N,)
        folds: (N,) number of the fold that holds each text out.
        negatives: background prompts and hard negatives.
        augmented: (V, N, H) of altered copies, or None.
    """
    present = folds.unique()
    family_folds = present[negatives.left_out_together.cpu() % len(present)]
    copies = features.new_zeros((0, *features.shape)) if augmented is None else augmented
    num_experts = int(labels.max()) + 1
    size = 2 if negatives.basis is None else 3
    texts = torch.zeros(1 + len(copies), len(features), size + num_experts)
    others = torch.zeros(len(negatives.features), size + num_experts)
    inside = negatives._replace(features=negatives.in_basis(negatives.features))
    own_inside, copies_inside = negatives.in_basis(features), negatives.in_basis(copies)
    everything = torch.cat([own_inside, copies_inside.flatten(0, 1)])
    start = fit_detectors_inside(everything, labels.repeat(1 + len(copies)), inside, num_experts)
    for fold in present.tolist():
        out, family_out = folds == fold, family_folds == fold
        rows = torch.cat([features[~out], copies[:, ~out].flatten(0, 1)])
        their_labels = labels[~out].repeat(1 + len(copies))
        rest = negatives.subset(~family_out)
        router = make_router()
        router.basis = negatives.basis
        router.fit(rows, their_labels, rest.features[rest.is_background])
        rows_inside = torch.cat([own_inside[~out], copies_inside[:, ~out].flatten(0, 1)])
        detectors = fit_detectors_inside(rows_inside, their_labels, inside.subset(~family_out), num_experts, start)
        close = _neighbours(rows, their_labels, rest)
        for number, (some, same) in enumerate(zip([features, *copies], [own_inside, *copies_inside], strict=True)):
            texts[number, out] = _judged(router, detectors, close, some[out], same[out])
        found = _judged(router, detectors, close, negatives.features[family_out], inside.features[family_out])
        others[family_out] = found
    own, altered = texts[0], texts[1:]
    return LeftOut(own[:, size:], -own[:, 1], own[:, :size], altered[:, :, :size], others[:, size:], others[:, :size])


def _neighbours(features: Tensor, labels: Tensor, negatives: Negatives) -> Neighbours | None:
    """Stored texts and background prompts; None where there is no basis."""
    if negatives.basis is None:
        return None
    return fit_neighbours(features, labels, negatives.features[negatives.is_background], negatives.basis)


@torch.no_grad()
def _judged(
    router: Router, detectors: tuple[Tensor, Tensor], close: Neighbours | None, features: Tensor, inside: Tensor
) -> Tensor:
    """(B, S + K): the statistics, and the scores; the detectors take the features in the basis."""
    scores, distance = router.scores(features).cpu(), router.distance(features).cpu()
    nearest = scores.argmax(dim=1)
    parts = [detector_statistics(*detectors, inside.cpu(), nearest, distance)]
    if close is not None:
        parts.append(close.closeness(features.cpu(), nearest).unsqueeze(1))
    return torch.cat([*parts, scores], dim=1)


def combination_of(left_out: LeftOut, labels: Tensor, negatives: Negatives) -> Tensor:
    """(S + 1,) the second level, from what was left out."""
    known = torch.cat([left_out.statistics, left_out.altered.flatten(0, 1)])
    their_labels = labels.repeat(1 + len(left_out.altered))
    return fit_combination(known, their_labels, left_out.negative_statistics, negatives.families)


def decision_loss(left_out: LeftOut, labels: Tensor, negatives: Negatives) -> float:
    """Cross-entropy of the decision on altered copies and left-out families, both sides weighing the same.

    It is what a depth is chosen by: smaller is better. Texts in their own wording are easy at every depth.
    """
    combination = combination_of(left_out, labels, negatives)
    altered = left_out.altered.flatten(0, 1) if len(left_out.altered) else left_out.statistics
    their_labels = labels.repeat(max(1, len(left_out.altered)))
    known = combined_ood_score(altered, combination)
    unknown = combined_ood_score(left_out.negative_statistics, combination)
    softplus = torch.nn.functional.softplus
    loss = (equal_weights(their_labels) * softplus(known)).sum()
    return float(0.5 * (loss + (equal_weights(negatives.families) * softplus(-unknown)).sum()))


def fitted_rule(features: Tensor, labels: Tensor, negatives: Negatives, combination: Tensor) -> DecisionRule:
    """The rule for use: detectors of all prompts and families, combined as the left-out ones say.

    Args:
        features: (N, H) of texts and altered copies.
        labels: (N,)
        negatives: all.
        combination: (S + 1,)
    """
    weight, bias = fit_detectors(features, labels, negatives, int(labels.max()) + 1)
    return DecisionRule(weight, bias, combination, _neighbours(features, labels, negatives))
