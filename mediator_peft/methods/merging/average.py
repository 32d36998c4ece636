"""Plain average."""

from __future__ import annotations

from torch import Tensor


def average(task_vectors: Tensor) -> Tensor:
    r"""Mean of the task vectors, :math:`\frac1K \sum_k \tau_k`; added to the base it is the mean of the experts.

    Summed in the order of the experts, so that an entry's rounding does not depend on how many stand beside it.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    total = task_vectors[0].clone()
    for vector in task_vectors[1:]:
        total += vector
    return total.div_(len(task_vectors))
