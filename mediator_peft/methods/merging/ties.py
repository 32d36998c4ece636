"""TIES-Merging."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparsifying.magnitude import largest_mask

DENSITY = 0.2
"""Share of a task vector that is kept; the paper's choice where nothing can be tuned, as is the scale λ = 1."""


def ties(task_vectors: Tensor) -> Tensor:
    r"""Trim, elect a sign for each entry, and average those that agree with it.

    Algorithm 1 of *TIES-Merging*, https://arxiv.org/abs/2306.01708:

    .. math:: \gamma_p = \operatorname{sgn} \sum_k \hat\tau_{k,p}, \qquad
        \tau_p = \operatorname{mean} \{ \hat\tau_{k,p} : \hat\tau_{k,p} \gamma_p > 0 \}

    with :math:`\hat\tau_k` the :data:`DENSITY` largest entries of :math:`\tau_k`. The paper trims a whole model at
    once; here each tensor is trimmed by itself, since tensors are read one at a time. Where votes are exactly even,
    which the paper leaves open, +1 is elected; where no entry agrees, the result is 0.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    total = torch.zeros_like(task_vectors[0])
    kept = []
    for vector in task_vectors:
        kept.append(largest_mask(vector, DENSITY))
        total += torch.where(kept[-1], vector, 0)
    is_positive = total >= 0
    merged, num_agreeing = total.zero_(), torch.zeros_like(total)
    for vector, mask in zip(task_vectors, kept, strict=True):
        agrees = mask & ((vector > 0) == is_positive)
        merged += torch.where(agrees, vector, 0)
        num_agreeing += agrees
    return merged.div_(num_agreeing.clamp_(min=1))
