"""Task arithmetic."""

from __future__ import annotations

from torch import Tensor

from .summing import sum_in_order

SCALE = 0.4
"""Chosen for many tasks at once, without data to tune it on; the papers tune it where they can."""


def task_arithmetic(task_vectors: Tensor) -> Tensor:
    r"""Scaled sum of the task vectors, :math:`\lambda \sum_k \tau_k`.

    *Editing Models with Task Arithmetic*, https://arxiv.org/abs/2212.04089. It leaves λ to a validation set; here it is
    :data:`SCALE`.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    return sum_in_order(task_vectors).mul_(SCALE)
