"""WIDEN: columns weighted by how far each expert moved their magnitude and direction, by rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...deferred import torch
from .geometry import Floats
from .row import EMBEDDING, MergeMethod, Parameter, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


THRESHOLD, SCORE = 1.0, 1.0


def widen(task_vectors: Tensor, context: TensorContext, threshold: float = THRESHOLD, score: float = SCORE) -> Tensor:
    r"""Weighted sum of the task vectors, with weights for every column (input) of a matrix.

    *Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement*,
    https://arxiv.org/abs/2408.03092. Of every column j and expert k it takes the change of magnitude
    :math:`a_{kj} = |\,\|\theta_{kj}\| - \|\theta_{0j}\|\,|` and of direction
    :math:`b_{kj} = 1 - \cos(\theta_{kj}, \theta_{0j})`, and ranks both within each expert. Ranks become scores by a
    softmax over experts; a rank above ``threshold`` times the expert's mean rank scores ``score``. The weight is the
    mean of both scores. Vectors: the same on :math:`|\tau_k|` itself, entry by entry. The columns of the embedding are
    its tokens. Ranks make experts comparable that moved far (pre-training) and little (fine-tuning); weights of K
    experts add up to between 1 and K. A column of zeros has not moved (the authors leave 0 / 0 open). Entry by entry
    only in this sense: a tile's columns are scored from the whole tensor.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with :func:`column_weights` as its survey.
        threshold: t
        score: what is above the threshold scores.

    Returns:
        (r, I)
    """
    if context.is_vector:
        weights = _scores(task_vectors.double().numpy(), context.survey, score)
    elif context.kind == EMBEDDING:
        weights = context.survey[:, context.start : context.start + task_vectors.shape[1], None]
    else:
        weights = context.survey[:, None]
    merged = torch.zeros_like(task_vectors[0])
    for vector, own in zip(task_vectors, torch.from_numpy(weights).float(), strict=True):
        merged += own * vector
    return merged


def column_weights(
    tiles: Iterable[tuple[Tensor, TensorContext]],
    context: TensorContext,
    threshold: float = THRESHOLD,
    score: float = SCORE,
) -> Floats:
    """Weights of a matrix's columns, (K, n); of a vector, the magnitude above which an entry matters, (K, 1, 1)."""
    if context.is_vector:
        magnitudes = np.concatenate([vectors.abs().double().numpy() for vectors, _ in tiles], axis=1)
        return threshold * np.ascontiguousarray(magnitudes[..., 0]).mean(axis=1)[:, None, None]
    of_base, inner, of_vectors = _moments_by_row(tiles) if context.kind == EMBEDDING else _moments_by_column(tiles)
    changes = _changes(of_base, inner, of_vectors)
    return (_rank_scores(changes[0], threshold, score) + _rank_scores(changes[1], threshold, score)) / 2


def _moments_by_row(tiles: Iterable[tuple[Tensor, TensorContext]]) -> tuple[Floats, Floats, Floats]:
    """Squared norms of the base's rows, (n,); their inner products with the task vectors', and these' squared norms."""
    parts = []
    for task_vectors, context in tiles:
        base, vectors = _doubles(task_vectors, context)
        sums = ((base * base).sum(axis=1), (base * vectors).sum(axis=2), (vectors * vectors).sum(axis=2))
        parts.append(sums)
    joined = [np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2]


def _moments_by_column(tiles: Iterable[tuple[Tensor, TensorContext]]) -> tuple[Floats, Floats, Floats]:
    """The same of columns, row after row, so that the height of tiles changes nothing."""
    totals: list[Floats] = []
    for task_vectors, context in tiles:
        base, vectors = _doubles(task_vectors, context)
        terms = [base * base, *(base * vector for vector in vectors), *(vector * vector for vector in vectors)]
        totals = totals or [np.zeros(base.shape[1]) for _ in terms]
        totals = [_added(total, term) for total, term in zip(totals, terms, strict=True)]
    num_experts = len(totals) // 2
    return totals[0], np.stack(totals[1 : 1 + num_experts]), np.stack(totals[1 + num_experts :])


def _doubles(task_vectors: Tensor, context: TensorContext) -> tuple[Floats, Floats]:
    assert context.base is not None
    return context.base.double().numpy(), task_vectors.double().numpy()


def _added(total: Floats, rows: Floats) -> Floats:
    """A total and further rows, added up one after the other."""
    rows = np.concatenate([total[None], rows])
    # A single column would be added up in pairs.
    return np.cumsum(rows, axis=0)[-1] if rows.shape[1] == 1 else np.add.reduce(rows, axis=0)


def _changes(of_base: Floats, inner: Floats, of_vectors: Floats) -> tuple[Floats, Floats]:
    """Change of magnitude and of direction, (K, n), from squared norms and inner products.

    Neither is a difference of large numbers: a fine-tune turns a column by about 1e-3, which leaves 1 - cos = 5e-7.
    """
    with np.errstate(all="ignore"):
        squared = of_base + 2 * inner + of_vectors
        old, new = np.sqrt(of_base), np.sqrt(np.maximum(squared, 0))
        magnitude = np.abs(2 * inner + of_vectors) / (old + new)
        cosine = (of_base + inner) / (old * new)
        squared_sine = np.maximum(of_base * of_vectors - inner * inner, 0) / (of_base * squared)
        direction = np.where(cosine > 0, squared_sine / (1 + cosine), 1 - cosine)
    is_zero = (old == 0) | (new == 0)
    return np.where(old + new == 0, 0, magnitude), np.where(is_zero, 0, direction)


def _rank_scores(change: Floats, threshold: float, score: float) -> Floats:
    """Scores from the ranks of each expert's changes, 0 to n - 1, equal ones by place: (K, n)."""
    number = change.shape[1]
    ranks = np.empty(change.shape, np.int64)
    np.put_along_axis(ranks, np.argsort(change, axis=1, kind="stable"), np.arange(number)[None], axis=1)
    # The mean rank is (n - 1) / 2: compared as whole numbers, the middle one is not above itself.
    return np.where(2 * ranks > threshold * (number - 1), score, _softmax(ranks / number))


def _scores(task_vectors: Floats, edges: Floats, score: float) -> Floats:
    """Scores of a vector's entries by their magnitude: (K, r, I)."""
    magnitude = np.abs(task_vectors)
    return np.where(magnitude > edges, score, _softmax(magnitude))


def _softmax(values: NDArray[np.float64]) -> Floats:
    """Over experts."""
    powers = np.exp(values - values.max(axis=0))
    return np.asarray(powers / powers.sum(axis=0))


WIDEN = MergeMethod(
    widen,
    is_entrywise=True,
    takes_context=True,
    is_oriented=True,
    survey=column_weights,
    parameters={
        "threshold": Parameter(
            THRESHOLD, "t: times the mean rank, from which on a column is important", "[0, inf)", (), True
        ),
        "score": Parameter(SCORE, "what an important column scores", "[0, inf)", (), True),
    },
    needs_base=True,
    paper="WIDEN, arXiv 2408.03092",
    cost="two passes",
    good_for="experts that moved by very different amounts, e.g. a continued pre-training and a fine-tune",
)
