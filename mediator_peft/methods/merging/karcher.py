"""Karcher mean of task vectors on the sphere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .geometry import Floats, combined, gram_matrix
from .row import MergeMethod, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


_TOLERANCE, _MOST_ROUNDS = 1e-12, 100


def karcher(task_vectors: Tensor, context: TensorContext) -> Tensor:
    r"""Mean direction of the task vectors on the sphere, at their mean norm, tensor by tensor.

    The direction u minimises the sum of squared angles to :math:`u_k = \tau_k / |\tau_k|` (Karcher, 1977), by the
    iteration :math:`T = \sum_k w_k \frac{\omega_k}{\sin\omega_k} (u_k - u\cos\omega_k)`,
    :math:`u \leftarrow u \cos|T| + \frac{T}{|T|} \sin|T|`. It stays in the span of the task vectors, so that it runs on
    K coefficients and needs their inner products alone. mergekit, where it is a way to merge weights, stops at
    |T| < 1e-5 or after 10 rounds; here at 1e-12 or after 100. A task vector that is zero has no direction, and counts
    in the mean norm alone.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with the coefficients as its survey.

    Returns:
        (r, I)
    """
    return combined(task_vectors, context.survey)


def karcher_coefficients(tiles: Iterable[tuple[Tensor, TensorContext]], context: TensorContext) -> Floats:
    """Coefficients of a tensor's task vectors: (K,)."""
    gram = gram_matrix(tiles)
    norms = np.sqrt(np.diag(gram))
    found, moved = np.zeros(len(norms)), norms > 0
    if not np.isfinite(gram).all() or not moved.any():
        return found
    cosines = (gram / np.outer(np.where(moved, norms, 1), np.where(moved, norms, 1)))[np.ix_(moved, moved)]
    direction = _mean_direction(cosines)
    if direction is None:  # they cancel out: no direction is nearer than another
        return np.full(len(norms), 1 / len(norms))
    found[moved] = norms.mean() * direction / norms[moved]
    return found


def _mean_direction(cosines: Floats) -> Floats | None:
    """The mean of unit vectors as a combination of them, by their inner products (k, k); None where they cancel out."""
    weights = np.full(len(cosines), 1 / len(cosines))
    squared = weights @ cosines @ weights
    if squared < 1e-12:
        return None
    mean = weights / np.sqrt(squared)
    for _ in range(_MOST_ROUNDS):
        inner = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(inner)
        sines = np.sin(angles)
        # Right across the sphere no way is the shortest one.
        stretch = np.where(angles < 1e-8, 1.0, np.where(sines > 1e-12, angles / np.maximum(sines, 1e-12), 0.0))
        tangent = weights * stretch - (weights * stretch * inner).sum() * mean
        length = np.sqrt(max(tangent @ cosines @ tangent, 0.0))
        if length < _TOLERANCE:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
        mean /= np.sqrt(mean @ cosines @ mean)
    return mean


KARCHER = MergeMethod(
    karcher,
    is_entrywise=True,
    takes_context=True,
    survey=karcher_coefficients,
    needs_base=True,
    paper="Karcher 1977; as merging: mergekit, no paper",
    cost="two passes",
    good_for="any number of experts, whose mean norm is kept where the mean shrinks it",
)
