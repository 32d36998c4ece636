"""Consensus merging on task arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .row import MergeMethod, Parameter
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


MASK_WEIGHT, SCALE, LEAST = 0.4, 0.4, 2

PARAMETERS = {
    "mask_weight": Parameter(MASK_WEIGHT, "λ of the masks, in the paper 0.2 to 0.6 by validation", "(0, inf)"),
    "scale": Parameter(SCALE, "factor α of the result", "(0, inf)"),
    "least_experts": Parameter(LEAST, "how many masks must hold an entry", "[0, inf)", is_published=True),
}


def consensus_of(multitask: Tensor, task_vectors: Tensor, mask_weight: float, scale: float, least: int) -> Tensor:
    """The entries of a multi-task vector that enough experts' masks hold, times ``scale``; changes ``multitask``."""
    count = torch.zeros_like(multitask, dtype=torch.int32)
    for vector in task_vectors:
        count += vector.abs() > mask_weight * (multitask - vector).abs()
    # One expert alone cannot be of one mind with another.
    return multitask.mul_(count >= min(least, len(task_vectors))).mul_(scale)


def consensus(
    task_vectors: Tensor, mask_weight: float = MASK_WEIGHT, scale: float = SCALE, least_experts: int = LEAST
) -> Tensor:
    r"""Sum of the task vectors where at least some experts' masks hold.

    *Localizing Task Information for Improved Model Merging and Compression* (TALL-masks), section on consensus merging,
    https://arxiv.org/abs/2405.07813:

    .. math:: m_k = [\,|\tau_k| > \lambda |t - \tau_k|\,], \qquad \tau = \alpha\, t\, [\,\sum_k m_k \ge k_{min}\,]

    with :math:`t = \sum_k \tau_k`. The authors choose λ for each task and α by validation; without data both are 0.4
    (our choice). With fewer than k_min experts, all masks must hold (our choice).

    Args:
        task_vectors: (K, *shape)
        mask_weight: λ
        scale: α
        least_experts: k_min; 2 drops what one expert alone wants, 1 what none wants, 0 nothing.

    Returns:
        (*shape)
    """
    return consensus_of(sum_in_order(task_vectors), task_vectors, mask_weight, scale, least_experts)


CONSENSUS = MergeMethod(
    consensus,
    is_entrywise=True,
    parameters=PARAMETERS,
    needs_base=True,
    paper="Consensus merging (TALL-masks), arXiv 2405.07813",
    good_for="many experts, each with entries that only it needs",
)
