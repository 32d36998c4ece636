"""Task arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .row import MergeMethod, Parameter
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


SCALE = 0.4
"""Chosen for many tasks at once, without data to tune it on; the papers tune it where they can."""


def task_arithmetic(task_vectors: Tensor, scale: float = SCALE) -> Tensor:
    r"""Scaled sum of the task vectors, :math:`\lambda \sum_k \tau_k`.

    *Editing Models with Task Arithmetic*, https://arxiv.org/abs/2212.04089. It leaves λ to a validation set; the
    default is :data:`SCALE`.

    Args:
        task_vectors: (K, *shape)
        scale: λ

    Returns:
        (*shape)
    """
    return sum_in_order(task_vectors).mul_(scale)


TASK_ARITHMETIC = MergeMethod(
    task_arithmetic,
    is_entrywise=True,
    parameters={"scale": Parameter(SCALE, "factor λ of the sum of the task vectors", "(0, inf)")},
    needs_base=True,
    scale_of_sum=lambda num_experts, scale: scale,
    paper="Task arithmetic, arXiv 2212.04089",
    good_for="a merged model of a few experts, where scale can be tuned",
)
