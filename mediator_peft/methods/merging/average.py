"""Plain average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .row import MergeMethod
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


def average(task_vectors: Tensor) -> Tensor:
    r"""Mean of the task vectors, :math:`\frac1K \sum_k \tau_k`; added to the base it is the mean of the experts.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    return sum_in_order(task_vectors).div_(len(task_vectors))


AVERAGE = MergeMethod(
    average,
    is_entrywise=True,
    scale_of_sum=lambda num_experts: 1 / num_experts,
    paper="Model soups, arXiv 2203.05482",
    good_for="the backbone that is nearest to all experts: the smallest deltas",
)
