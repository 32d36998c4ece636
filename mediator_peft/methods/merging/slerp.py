"""Spherical linear interpolation of two task vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .geometry import Floats, combined, gram_matrix
from .row import MergeMethod, Parameter, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


POSITION = 0.5

_LINEAR = 0.9995
"""From this cosine on, interpolation is linear, as in mergekit."""


def slerp(task_vectors: Tensor, context: TensorContext, t: float = POSITION) -> Tensor:
    r"""Interpolate between two task vectors on the arc that joins them, tensor by tensor.

    .. math:: \tau = \frac{\sin((1-t)\,\omega)}{\sin\omega}\,\tau_1 + \frac{\sin(t\,\omega)}{\sin\omega}\,\tau_2

    with ω the angle of the task vectors (Shoemake, SIGGRAPH 1985; as a way to merge: arcee-ai/mergekit#55, there on
    weights, whose angle is next to nothing for experts of one base). Where the cosine is beyond ±0.9995, or a task
    vector is zero, it is linear interpolation.

    Args:
        task_vectors: (2, r, I) rows of a tensor; the first is of the expert whose name sorts first.
        context: with the two coefficients as its survey.
        t: place on the arc: 0 is the first expert, 1 the second.

    Returns:
        (r, I)
    """
    return combined(task_vectors, context.survey)


def slerp_coefficients(
    tiles: Iterable[tuple[Tensor, TensorContext]], context: TensorContext, t: float = POSITION
) -> Floats:
    """Both coefficients of a tensor, from the angle of its task vectors: (2,)."""
    gram = gram_matrix(tiles)
    norms = np.sqrt(np.diag(gram))
    cosine = gram[0, 1] / (norms[0] * norms[1]) if norms.all() and np.isfinite(gram).all() else 1.0
    if not abs(cosine) <= _LINEAR:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    return np.sin(np.array([1 - t, t]) * angle) / np.sin(angle)


SLERP = MergeMethod(
    slerp,
    is_entrywise=True,
    takes_context=True,
    survey=slerp_coefficients,
    num_experts=2,
    parameters={"t": Parameter(POSITION, "place between the two experts, in the order of their names", "[0, 1]")},
    needs_base=True,
    paper="Shoemake 1985; as merging: mergekit, no paper",
    cost="two passes",
    good_for="two experts, whose norm is kept where the mean shrinks it",
)
