"""TALL-masks: the sum of all task vectors, and a mask of it for each expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..merging.row import Parameter, TensorContext
from ..merging.summing import sum_in_order
from .row import NUMBER_BITS, Baseline, Bits, num_entries


def restore(task_vectors: Tensor, number: int, context: TensorContext, survey: None, *, mask_weight: float) -> Tensor:
    r"""The entries of the sum that are near to the expert's own.

    .. math:: m_k = [\,|\tau_k| > \lambda\, |\tau_M - \tau_k|\,], \quad m_k \circ \tau_M, \quad \tau_M = \sum_k \tau_k

    TALL-masks, https://arxiv.org/abs/2405.07813, equation 5; the comparison is strict, as in the authors' code.

    Returns:
        (*shape)
    """
    total = sum_in_order(task_vectors)
    own = task_vectors[number]
    return torch.where(own.abs() > mask_weight * (total - own).abs(), total, 0.0)


def bits(context: TensorContext, num_experts: int, mask_weight: float) -> Bits:
    """16 for the sum, one a mask."""
    return Bits(float(NUMBER_BITS * num_entries(context)), float(num_entries(context)))


TALL = Baseline(
    restore,
    bits,
    paper="TALL-masks, arXiv 2405.07813",
    text="the sum of all task vectors; a mask of it for each expert",
    parameters={"mask_weight": Parameter(0.4, "λ of the masks, in the paper 0.2 to 0.6 by validation", "[0, inf)")},
)
