r"""The learned decision between an expert and the fallback: is this prompt one of the experts' kinds, or none of them?

Outlier exposure (Hendrycks et al. 2019, https://arxiv.org/abs/1812.04606): a detector per expert is trained to tell the
expert's prompts from background prompts of many families. A detector alone fails on families that it was not trained
on, and a distance alone fails on families that lie close to the calibration texts; so a second logistic regression
combines both (stacked generalisation, Wolpert 1992). It is trained on values of prompts whose family was left out of
the first level, so it weighs the two by how well they do on families that nothing was fitted on.

.. math::
    s(x) = a_1\,(w_k^\top z + b_k) - a_2\, d_k(z) + a_3\, c_k(z) + c, \qquad k = \text{the best-scored expert}

:math:`z` is the pooled hidden state, :math:`d_k` the router's distance, :math:`c_k` the closeness to the expert's texts
(:mod:`~mediator_peft.routing.neighbours`; only where there is a basis of wordings). The OOD score is :math:`-s`.
The combination is our choice; ``docs/routing.md`` compares it with the alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .neighbours import Neighbours

_RIDGE = 0.03
_RIDGE_IN_BASIS = 0.1
_STACKING_RIDGE = 1e-3
_MOST_STEPS = 100


class Negatives(NamedTuple):
    """Prompts that belong to no expert."""

    features: Tensor
    """(M, H)"""

    families: Tensor
    """(M,) number of each prompt's family, from 0."""

    is_background: Tensor
    """(M,) bool; False for hard negatives, which are trained on and take no part in the stated rate of unknown prompts:
    some of them are requests that an expert serves well."""

    basis: Tensor | None = None
    """(H, H) of :func:`~mediator_peft.routing.wording.wording_basis`, or None where there are no reference prompts."""

    kinds: Tensor | None = None
    """(M,) number of each family's kind; families of a kind are left out together. None where each is its own."""

    @property
    def left_out_together(self) -> Tensor:
        """(M,) number of the group that is left out as a whole."""
        return self.families if self.kinds is None else self.kinds

    def subset(self, rows: Tensor) -> Negatives:
        """The chosen rows, (M,) bool."""
        kinds = None if self.kinds is None else self.kinds[rows]
        return Negatives(self.features[rows], self.families[rows], self.is_background[rows], self.basis, kinds)

    def in_basis(self, features: Tensor) -> Tensor:
        """(…, H) features in the basis; as they are without one."""
        if self.basis is None:
            return features
        return (features.double() @ self.basis.to(features.device).double()).float()


class DecisionRule(NamedTuple):
    """A fitted rule; see the module's formula."""

    detector_weight: Tensor
    """(K, H)"""

    detector_bias: Tensor
    """(K,)"""

    combination: Tensor
    r"""(4,) :math:`a_1, a_2, a_3, c`; (3,) without neighbours."""

    neighbours: Neighbours | None = None
    """Texts and background prompts for :math:`c_k`; None where there is no basis of wordings."""

    def with_expert(self, features: Tensor, negatives: Negatives) -> DecisionRule:
        """The rule with one more expert, the last; the other experts' detectors and the combination stay as they are.

        Args:
            features: (N, H) of the new expert's prompts.
            negatives: of all families.
        """
        labels = torch.zeros(len(features), dtype=torch.long)
        weight, bias = fit_detectors(features, labels, negatives, 1)
        device = self.detector_weight.device
        return self._replace(
            detector_weight=torch.cat([self.detector_weight, weight.to(device)]),
            detector_bias=torch.cat([self.detector_bias, bias.to(device)]),
            neighbours=self.neighbours and self.neighbours.with_expert(features, len(self.detector_bias)),
        )

    def without_expert(self, number: int) -> DecisionRule:
        """The rule without one expert."""
        stay = [row for row in range(len(self.detector_bias)) if row != number]
        return self._replace(
            detector_weight=self.detector_weight[stay],
            detector_bias=self.detector_bias[stay],
            neighbours=self.neighbours and self.neighbours.without_expert(number),
        )

    def statistics(self, features: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
        """(B, S): the nearest expert's detector, minus the distance, and with neighbours the closeness.

        Larger is more like a known prompt.

        Args:
            features: (B, H)
            nearest: (B,) number of the best-scored expert.
            distance: (B,)
        """
        found = detector_statistics(self.detector_weight, self.detector_bias, features, nearest, distance)
        if self.neighbours is None:
            return found
        return torch.cat([found, self.neighbours.closeness(features, nearest).unsqueeze(1)], dim=1)

    def ood_score(self, features: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
        """(B,) log-odds that a prompt belongs to no expert; larger is less like any known prompt."""
        return combined_ood_score(self.statistics(features, nearest, distance), self.combination)


def detector_statistics(weight: Tensor, bias: Tensor, features: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
    """(B, 2): the nearest expert's detector, and minus the distance."""
    logits = (features.float() * weight[nearest]).sum(dim=1) + bias[nearest]
    return torch.stack([logits, -distance.float()], dim=1)


def combined_ood_score(statistics: Tensor, combination: Tensor) -> Tensor:
    """(B, S) statistics and (S + 1,) combination → (B,) OOD scores."""
    return -(statistics @ combination[:-1] + combination[-1])


def fit_detectors(features: Tensor, labels: Tensor, negatives: Negatives, num_experts: int) -> tuple[Tensor, Tensor]:
    """One logistic regression per expert: its prompts against all negatives.

    Both sides weigh the same, and on the negative side every family weighs the same. Another expert's prompts are on
    neither side: which expert is the scores' matter, and an expert can be added without touching the others. The ridge
    is one of the negatives' basis, where there is one.

    Args:
        features: (N, H) of the experts' prompts.
        labels: (N,)
        negatives: of all families.
        num_experts: K

    Returns:
        Weights (K, H) and biases (K,), float32, for the features as they are.
    """
    inside = negatives._replace(features=negatives.in_basis(negatives.features))
    weight, bias = fit_detectors_inside(negatives.in_basis(features), labels, inside, num_experts)
    if negatives.basis is not None:
        weight = (weight.double() @ negatives.basis.double().cpu().T).float()
    return weight, bias


def fit_detectors_inside(
    features: Tensor,
    labels: Tensor,
    negatives: Negatives,
    num_experts: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`fit_detectors`, where all features are in the basis already; so are the detectors.

    ``start`` holds detectors of nearly the same prompts, from which fewer steps lead to the same optimum.
    """
    against = equal_weights(negatives.families)
    in_basis = negatives.basis is not None
    fitted = []
    for expert in range(num_experts):
        own = features[labels == expert]
        fitted.append(
            fit_logistic(
                torch.cat([own, negatives.features]),
                torch.cat([torch.ones(len(own)), torch.zeros(len(against))]),
                torch.cat([torch.full((len(own),), 0.5 / max(1, len(own))), 0.5 * against]),
                _RIDGE_IN_BASIS if in_basis else _RIDGE,
                common_scale=in_basis,
                start=None if start is None else (start[0][expert], start[1][expert]),
            )
        )
    return torch.stack([weight for weight, _ in fitted]), torch.stack([bias for _, bias in fitted])


def fit_combination(known: Tensor, labels: Tensor, unknown: Tensor, families: Tensor) -> Tensor:
    """The second level: (S + 1,) weights of the statistics, and the constant.

    Args:
        known: (N, S) statistics of known prompts by rules that were not fitted on them.
        labels: (N,) their experts; every expert weighs the same.
        unknown: (M, S) statistics of negatives by rules that were not fitted on their family.
        families: (M,) every family weighs the same.
    """
    rows = torch.cat([known, unknown])
    weight, bias = fit_logistic(
        rows,
        torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))]),
        torch.cat([0.5 * equal_weights(labels), 0.5 * equal_weights(families)]),
        _STACKING_RIDGE,
    )
    # A statistic that counts against what it stands for is noise of few prompts.
    return torch.cat([weight.clamp(min=0.0), bias.reshape(1)])


def equal_weights(groups: Tensor) -> Tensor:
    """(N,) weights that sum to 1, every group having the same share."""
    _, place, counts = groups.unique(return_inverse=True, return_counts=True)
    return 1.0 / (counts[place].float() * len(counts))


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    ridge: float,
    common_scale: bool = False,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Weighted logistic regression on standardised features, by full-batch L-BFGS.

    .. math:: \min_{w, b} \sum_i v_i \log(1 + e^{-y_i (w^\top \tilde z_i + b)}) + \tfrac{\rho}{2}\|w\|^2

    Args:
        features: (N, H)
        targets: (N,) 1 or 0.
        weights: (N,) v, which sum to 1.
        ridge: :math:`\rho`, for features of unit variance.
        common_scale: standardise by one scale for all features, for a ridge that depends on no choice of axes.
        start: weight (H,) and bias () from which the search starts; zero without it. The optimum is the same.

    Returns:
        Weight (H,) and bias () for the features as they are, float32.
    """
    rows, weights, targets = features.detach().double().cpu(), weights.double().cpu(), targets.double().cpu()
    mean = (weights.unsqueeze(1) * rows).sum(dim=0)
    scale = (weights.unsqueeze(1) * (rows - mean).square()).sum(dim=0).sqrt()
    if common_scale:
        scale = scale.square().mean().sqrt().expand_as(scale)
    # A feature that never varies says nothing, whatever value it has later.
    useful = scale > 1e-6 * float(scale.max().clamp(min=1e-12))
    inverse = torch.where(useful, 1 / scale.clamp(min=1e-12), 0.0)
    rows = (rows - mean) * inverse
    solution = torch.zeros(rows.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        first = start[0].double().cpu()
        solution[:-1] = torch.where(useful, first * scale, 0.0)
        solution[-1] = start[1].double().cpu() + first @ mean
    solution.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=_MOST_STEPS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = rows @ solution[:-1] + solution[-1]
        value = (
            weights * torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        ).sum()
        value = value + 0.5 * ridge * solution[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    found = solution.detach()
    weight = found[:-1] * inverse
    return weight.float(), (found[-1] - weight.double() @ mean).float()


def family_numbers(names: Sequence[str]) -> Tensor:
    """(M,) number of each prompt's family, in the order of the sorted names."""
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names], dtype=torch.long)
