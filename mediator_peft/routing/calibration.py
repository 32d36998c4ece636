"""Fitting a router on texts with known experts, and its yardstick of novelty on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RoutingError
from .routers import Router

_NUM_FOLDS = 5


class CalibrationReport(NamedTuple):
    """What held-out calibration prompts say of a fitted router."""

    num_texts: dict[str, int]
    """Expert → number of texts."""

    accuracy: float
    """Share of held-out texts whose expert scored highest, over the folds."""

    confusion: list[list[int]]
    """Row: true expert, column: best-scored expert; counts of held-out texts."""


def labelled_texts(
    dataset: Any, experts: Sequence[str], text_column: str, label_column: str
) -> tuple[list[str], list[int]]:
    """Texts and expert numbers of a ``datasets.Dataset``, or of a dict expert → texts.

    Raises:
        RoutingError: a column or an expert is unknown, a text is no string, or an expert has fewer than two texts.
    """
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names"):
        pairs = [(text, name) for name, texts in dataset.items() for text in texts]
    else:
        columns = list(getattr(dataset, "column_names", None) or [])
        missing = [name for name in (text_column, label_column) if columns and name not in columns]
        if missing:
            raise RoutingError(f"the dataset has no column {missing}; it has {columns}. Set text_column, label_column.")
        feature = (getattr(dataset, "features", None) or {}).get(label_column)
        to_name = feature.int2str if hasattr(feature, "int2str") else str
        pairs = [(row[text_column], to_name(row[label_column])) for row in dataset]
    unknown = sorted({name for _, name in pairs} - set(experts))
    if unknown:
        raise RoutingError(f"calibration labels {unknown} are no experts of this model; it has {list(experts)}.")
    if not all(isinstance(text, str) for text, _ in pairs):
        raise RoutingError(f"column {text_column!r} must hold strings.")
    counts = {name: sum(1 for _, label in pairs if label == name) for name in experts}
    few = {name: count for name, count in counts.items() if count < 2}
    if few:
        raise RoutingError(f"each expert needs at least 2 calibration texts, better 50; too few: {few}.")
    return [text for text, _ in pairs], [list(experts).index(name) for _, name in pairs]


def calibrate(
    make_router: Callable[[], Router], router: Router, features: Tensor, labels: Tensor, texts: Sequence[str], seed: int
) -> CalibrationReport:
    """Fit ``router`` on everything, and take its novelty yardstick from folds it was not fitted on.

    Equal texts share a fold, so that a duplicate is never held out from itself.

    Args:
        make_router: an unfitted router of the same kind, one per fold.
        router: fitted in place.
        features: (N, H)
        labels: (N,)
        texts: N texts, to find duplicates.
        seed: shuffles the folds.
    """
    folds = _folds(texts, labels, seed)
    novelty = torch.zeros(len(labels))
    guess = torch.zeros(len(labels), dtype=torch.long)
    for fold in range(int(folds.max()) + 1):
        held_out = folds == fold
        trial = make_router()
        trial.fit(features[~held_out], labels[~held_out])
        with torch.no_grad():
            novelty[held_out] = trial.novelty(features[held_out]).cpu()
            guess[held_out] = trial.scores(features[held_out]).argmax(dim=1).cpu()
    router.fit(features, labels)
    router.set_known_novelty(novelty)
    num_experts = router.num_experts
    confusion = torch.zeros(num_experts, num_experts, dtype=torch.long)
    confusion.index_put_((labels.cpu(), guess), torch.tensor(1), accumulate=True)
    return CalibrationReport(
        num_texts={str(label): int((labels == label).sum()) for label in range(num_experts)},
        accuracy=float(confusion.diagonal().sum() / len(labels)),
        confusion=confusion.tolist(),
    )


def _folds(texts: Sequence[str], labels: Tensor, seed: int) -> Tensor:
    """(N,) number of the fold that holds each text out; every class stays in every fit."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.zeros(len(texts), dtype=torch.long)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten().tolist()
        distinct = sorted({texts[row] for row in rows})
        if len(distinct) < 2:
            raise RoutingError("each expert needs at least 2 different calibration texts.")
        order = torch.randperm(len(distinct), generator=generator).tolist()
        fold_of = {text: place % _NUM_FOLDS for text, place in zip(distinct, order, strict=True)}
        for row in rows:
            folds[row] = fold_of[texts[row]]
    return folds
