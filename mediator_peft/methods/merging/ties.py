"""TIES-Merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from ..sparsifying.magnitude import largest_mask
from .row import MergeMethod, Parameter

if TYPE_CHECKING:
    from torch import Tensor


DENSITY = 0.2
"""Share of a task vector that is kept; the paper's choice where nothing can be tuned, as is the scale λ = 1."""


def ties(task_vectors: Tensor, density: float = DENSITY, scale: float = 1.0) -> Tensor:
    r"""Trim, elect a sign for each entry, and average those that agree with it.

    Algorithm 1 of *TIES-Merging*, https://arxiv.org/abs/2306.01708:

    .. math:: \gamma_p = \operatorname{sgn} \sum_k \hat\tau_{k,p}, \qquad
        \tau_p = \operatorname{mean} \{ \hat\tau_{k,p} : \hat\tau_{k,p} \gamma_p > 0 \}

    with :math:`\hat\tau_k` the share ``density`` of largest entries of :math:`\tau_k`. The paper trims a whole model at
    once; here each tensor is trimmed by itself, since tensors are read one at a time. Where votes are exactly even,
    which the paper leaves open, +1 is elected; where no entry agrees, the result is 0.

    Args:
        task_vectors: (K, *shape)
        density: share of a task vector that is kept, in (0, 1].
        scale: λ, by which the result is multiplied.

    Returns:
        (*shape)
    """
    total = torch.zeros_like(task_vectors[0])
    kept = []
    for vector in task_vectors:
        kept.append(largest_mask(vector, density))
        total += torch.where(kept[-1], vector, 0)
    is_positive = total >= 0
    merged, num_agreeing = total.zero_(), torch.zeros_like(total)
    for vector, mask in zip(task_vectors, kept, strict=True):
        agrees = mask & ((vector > 0) == is_positive)
        merged += torch.where(agrees, vector, 0)
        num_agreeing += agrees
    merged.div_(num_agreeing.clamp_(min=1))
    return merged if scale == 1.0 else merged.mul_(scale)


TIES = MergeMethod(
    ties,
    parameters={
        "density": Parameter(DENSITY, "share of a task vector that is kept", "(0, 1]", is_published=True),
        "scale": Parameter(1.0, "factor λ of the merged task vector", "(0, inf)", is_published=True),
    },
    work=lambda experts, rows, columns: (5.5 + 0.4 * experts) * rows * columns,
    paper="TIES-Merging, arXiv 2306.01708",
    cost="a selection of the largest entries for each tensor and expert",
    good_for="experts whose task vectors conflict in sign",
)
