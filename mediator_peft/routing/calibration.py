"""Fitting a router on texts with known experts, and its held-out statistics on texts it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration_data import hash_folds
from .decision_rule import Negatives, combined_ood_score, equal_weights
from .metrics import brier_score, expected_calibration_error, fit_temperature
from .ood import Known, excess_distance, gate_coefficients
from .routers import Router
from .rule_fitting import combination_of, fitted_rule, leave_out
from .uncertainty import normalised_entropy

_FEWEST_ORDINARY = 5


class CalibrationReport(NamedTuple):
    """What held-out calibration prompts say of a fitted router."""

    num_texts: dict[str, int]
    """Expert → number of texts."""

    accuracy: float
    """Share of held-out texts whose expert scored highest, over the folds."""

    confusion: list[list[int]]
    """Row: true expert, column: best-scored expert; counts of held-out texts."""

    per_expert: dict[str, dict[str, float]]
    """Expert → ``precision``, ``recall`` and ``false_fallback`` (share of its held-out texts taken for unknown)."""

    temperature: float
    """By which scores are divided before they are probabilities."""

    ece: float
    """Expected calibration error of the held-out probabilities, in [0, 1]."""

    brier: float
    """Brier score of the held-out probabilities, in [0, 2]."""

    false_fallback: float
    """Share of held-out texts flagged as unknown by the statistics of the other folds; ``ood_alpha`` was asked for."""

    known_to_fallback: float = 0.0
    """Mean weight that held-out texts give to the fallback; at most about ``ood_alpha``."""

    unknown_to_expert: float | None = None
    """Mean weight that background prompts give to experts, each judged by a rule fitted without its family, families
    counting the same; ``ood_beta`` was asked for. None without background prompts."""

    base_weight_by_family: dict[str, float] | None = None
    """Background family → mean weight of the fallback, when the family was left out of the fit."""

    router_layer: int | None = None
    """After how many blocks the hidden state is read."""


class HeldOut(NamedTuple):
    """What routers said of texts they were not fitted on."""

    scores: Tensor
    """(N, K), before the temperature."""

    ood_score: Tensor
    """(N,)"""

    distance: Tensor
    """(N,)"""

    folds: Tensor
    """(N,)"""


class Evidence(NamedTuple):
    """What the gate would have said of prompts it had not seen: calibration prompts, then background ones."""

    probabilities: Tensor
    """(N + M, K), calibrated."""

    labels: Tensor
    """(N + M,) number of the expert; -1 for background prompts, which have none."""

    uncertainty: Tensor
    """(N + M,)"""

    is_ood: Tensor
    """(N + M,) bool"""

    gate_coefficient: Tensor
    """(N + M,) gate coefficient: the weight of the experts."""

    ood_score: Tensor
    """(N + M,)"""


def cross_fit(
    make_router: Callable[[], Router],
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    background: Tensor | None = None,
    background_folds: Tensor | None = None,
    augmented: Tensor | None = None,
    hard_negatives: Tensor | None = None,
) -> tuple[HeldOut, HeldOut | None]:
    """Scores, OOD score and distance of every text, by a router fitted on the other folds.

    Args:
        make_router: an unfitted router, one per fold.
        features: (N, H)
        labels: (N,)
        folds: (N,) number of the fold that holds each text out.
        background: (M, H) features of background prompts, or None.
        background_folds: (M,)
        augmented: (V, N, H) features of altered copies of the texts, which are fitted on with these and never judged.
        hard_negatives: (W, N, H) features of other requests about the texts' subjects, likewise.

    Returns:
        What was said of the texts, and of the background prompts.
    """
    rows: list[list[Tensor]] = [[], []]
    places: list[list[Tensor]] = [[], []]
    for fold in folds.unique().tolist():
        held_out = folds == fold
        rest = None
        judged = [(features, held_out)]
        if background is not None and background_folds is not None:
            rest = background[background_folds != fold]
            judged.append((background, background_folds == fold))
        router = make_router()
        near = None if hard_negatives is None else hard_negatives[:, ~held_out]
        router.fit(*_with_variations(features, labels, augmented, ~held_out), rest, near)
        for kind, (some, chosen) in enumerate(judged):
            rows[kind].append(_judged(router, some[chosen]))
            places[kind].append(chosen.nonzero().flatten())
    texts, ordinary = (
        torch.cat(parts)[torch.cat(order).argsort()] if parts else None
        for parts, order in zip(rows, places, strict=True)
    )
    assert texts is not None
    if ordinary is None or background_folds is None:
        return HeldOut(texts[:, 2:], texts[:, 0], texts[:, 1], folds), None
    return (
        HeldOut(texts[:, 2:], texts[:, 0], texts[:, 1], folds),
        HeldOut(ordinary[:, 2:], ordinary[:, 0], ordinary[:, 1], background_folds),
    )


def _with_variations(
    features: Tensor, labels: Tensor, augmented: Tensor | None, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Features and labels of the chosen texts, below them those of their altered copies."""
    if augmented is None:
        return features[chosen], labels[chosen]
    rows = torch.cat([features[chosen], augmented[:, chosen].flatten(0, 1)])
    return rows, labels[chosen].repeat(1 + len(augmented))


@torch.no_grad()
def _judged(router: Router, features: Tensor) -> Tensor:
    """(B, 2 + K): OOD score, distance, scores."""
    columns = [
        router.background_log_odds(features).unsqueeze(1),
        router.distance(features).unsqueeze(1),
        router.scores(features),
    ]
    return torch.cat(columns, dim=1).cpu()


def calibrate(
    make_router: Callable[[], Router],
    router: Router,
    features: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    names: Sequence[str],
    seed: int,
    ood_alpha: float,
    background: Tensor | None = None,
    augmented: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    negatives: Negatives | None = None,
    family_names: Sequence[str] = (),
    ood_beta: float = 0.05,
) -> CalibrationReport:
    """Fit ``router`` on everything; temperature and held-out statistics come from folds it was not fitted on.

    Args:
        make_router: an unfitted router of the same kind, one per fold.
        router: fitted in place.
        features: (N, H)
        labels: (N,)
        keys: N texts, or groups of texts; rows of equal key share a fold, so that a duplicate is never held out from
            itself. The fold follows from the key's hash, not from the order of the data.
        names: of the experts.
        seed: gives other folds.
        ood_alpha: share of known prompts that may be flagged as unknown.
        background: (M, H) features of background prompts that belong to no expert, or None.
        augmented: (V, N, H) features of altered copies of the texts, or None. They share their text's fold; the
            held-out statistics are taken from the texts alone.
        hard_negatives: (W, N, H) features of other requests about the texts' subjects, or None; in their text's fold.
        negatives: background prompts by family and hard negatives, for a decision rule; takes the place of
            ``background`` and ``hard_negatives``.
        family_names: of the negatives' families.
        ood_beta: share of unknown prompts that may reach an expert.
    """
    labels = labels.cpu()
    folds = torch.tensor(hash_folds(keys, labels.tolist(), router.num_folds, seed))
    if negatives is not None:
        return _calibrate_with_rule(
            make_router,
            router,
            features,
            labels,
            folds,
            names,
            (ood_alpha, ood_beta),
            negatives,
            family_names,
            augmented,
        )
    router.set_rule(None)
    if background is not None and len(background) < _FEWEST_ORDINARY:
        background = None
    present = folds.unique()
    spread = None if background is None else present[torch.arange(len(background)) % len(present)]
    held_out, ordinary = cross_fit(make_router, features, labels, folds, background, spread, augmented, hard_negatives)
    temperature = fit_temperature(held_out.scores, labels)
    everything = torch.ones(len(labels), dtype=torch.bool)
    router.fit(
        *_with_variations(features, labels.to(features.device), augmented, everything), background, hard_negatives
    )
    known = known_of(held_out, labels, ordinary)
    router.set_known(known, temperature)
    router.evidence = _evidence(held_out, ordinary, known, temperature, ood_alpha)
    return _report(held_out, known, names, temperature, router.evidence)


def _calibrate_with_rule(
    make_router: Callable[[], Router],
    router: Router,
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    names: Sequence[str],
    rates: tuple[float, float],
    negatives: Negatives,
    family_names: Sequence[str],
    augmented: Tensor | None,
) -> CalibrationReport:
    left_out = leave_out(make_router, features, labels, folds, negatives, augmented)
    combination = combination_of(left_out, labels, negatives)
    everything = torch.ones(len(labels), dtype=torch.bool)
    rows, their_labels = _with_variations(features, labels.to(features.device), augmented, everything)
    background = negatives.subset(negatives.is_background)
    router.basis = negatives.basis
    router.fit(rows, their_labels, background.features)
    router.set_rule(fitted_rule(rows, their_labels, negatives, combination))
    held_out = HeldOut(left_out.scores, combined_ood_score(left_out.statistics, combination), left_out.distance, folds)
    unknown = negatives.is_background
    present = folds.unique()
    judged = left_out.negative_statistics[unknown]
    ordinary = HeldOut(
        left_out.negative_scores[unknown],
        combined_ood_score(judged, combination),
        -judged[:, 1],
        present[background.left_out_together % len(present)],
    )
    known = Known(
        held_out.ood_score,
        labels,
        held_out.distance,
        ordinary.ood_score,
        torch.zeros(len(ordinary.ood_score)),
        equal_weights(background.families),
    )
    temperature = fit_temperature(held_out.scores, labels)
    router.set_known(known, temperature)
    router.evidence = _evidence(held_out, ordinary, known, temperature, *rates)
    report = _report(held_out, known, names, temperature, router.evidence)
    to_base = 1 - router.evidence.gate_coefficient[len(labels) :]
    by_family = {
        name: float(to_base[background.families == number].mean())
        for number, name in enumerate(family_names)
        if (background.families == number).any()
    }
    to_expert = float(((1 - to_base) * equal_weights(background.families)).sum())
    return report._replace(unknown_to_expert=to_expert, base_weight_by_family=by_family)


def known_of(held_out: HeldOut, labels: Tensor, ordinary: HeldOut | None) -> Known:
    """The held-out statistics of the gate, from what routers said of prompts they were not fitted on."""
    none = torch.zeros(0)
    known = Known(held_out.ood_score, labels, held_out.distance, none, none)
    if ordinary is None:
        return known
    excess = excess_distance(ordinary.distance, ordinary.scores.argmax(dim=1), known)
    return known._replace(background_novelty=ordinary.ood_score, background_excess=excess)


def _report(
    held_out: HeldOut, known: Known, names: Sequence[str], temperature: float, evidence: Evidence
) -> CalibrationReport:
    labels = known.labels
    guess = held_out.scores.argmax(dim=1)
    num_experts = len(names)
    confusion = torch.zeros(num_experts, num_experts, dtype=torch.long)
    confusion.index_put_((labels, guess), torch.tensor(1), accumulate=True)
    fell_back = evidence.is_ood[: len(labels)]
    right = confusion.diagonal()
    per_expert = {
        name: {
            "precision": float(right[row] / confusion[:, row].sum().clamp(min=1)),
            "recall": float(right[row] / confusion[row].sum().clamp(min=1)),
            "false_fallback": float(fell_back[labels == row].double().mean()),
        }
        for row, name in enumerate(names)
    }
    probabilities = (held_out.scores.double() / temperature).softmax(dim=1)
    return CalibrationReport(
        num_texts={name: int((labels == row).sum()) for row, name in enumerate(names)},
        accuracy=int(right.sum()) / len(labels),
        confusion=confusion.tolist(),
        per_expert=per_expert,
        temperature=temperature,
        ece=expected_calibration_error(probabilities, labels),
        brier=brier_score(probabilities, labels),
        false_fallback=float(fell_back.double().mean()),
        known_to_fallback=float(1 - evidence.gate_coefficient[: len(labels)].double().mean()),
    )


def _evidence(
    held_out: HeldOut,
    ordinary: HeldOut | None,
    known: Known,
    temperature: float,
    ood_alpha: float,
    ood_beta: float = 0.05,
) -> Evidence:
    """Each held-out prompt is judged by the held-out statistics of the other folds."""
    judged = [(held_out, known.labels, fold) for fold in held_out.folds.unique().tolist()]
    if ordinary is not None:
        none = torch.full((len(ordinary.ood_score),), -1)
        judged += [(ordinary, none, fold) for fold in ordinary.folds.unique().tolist()]
    rows: list[list[Tensor]] = []
    for prompts, labels, fold in judged:
        own, rest = prompts.folds == fold, held_out.folds != fold
        others = known._replace(
            ood_score=known.ood_score[rest], labels=known.labels[rest], distance=known.distance[rest]
        )
        if ordinary is not None:
            kept = ordinary.folds != fold
            others = others._replace(
                background_novelty=known.background_novelty[kept], background_excess=known.background_excess[kept]
            )
            if known.background_share is not None:
                share = known.background_share[kept]
                others = others._replace(background_share=share / share.sum().clamp(min=1e-12))
        scores = prompts.scores[own]
        probabilities = (scores.double() / temperature).softmax(dim=1)
        found = gate_coefficients(
            prompts.ood_score[own], prompts.distance[own], scores.argmax(dim=1), others, ood_alpha, ood_beta
        )
        uncertainty = 1 - found.gate_coefficient * (1 - normalised_entropy(probabilities))
        place = own.nonzero().flatten() + (0 if prompts is held_out else len(held_out.ood_score))
        rows.append(
            [
                place,
                probabilities,
                labels[own],
                uncertainty,
                found.is_ood,
                found.gate_coefficient,
                prompts.ood_score[own],
            ]
        )
    place, *columns = (torch.cat(parts) for parts in zip(*rows, strict=True))
    order = place.argsort()
    return Evidence(*(column[order] for column in columns))
