"""Plain average."""

from __future__ import annotations

from torch import Tensor

from .summing import sum_in_order


def average(task_vectors: Tensor) -> Tensor:
    r"""Mean of the task vectors, :math:`\frac1K \sum_k \tau_k`; added to the base it is the mean of the experts.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    return sum_in_order(task_vectors).div_(len(task_vectors))
