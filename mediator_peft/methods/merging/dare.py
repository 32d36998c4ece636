"""DARE: drop entries of the task vectors at random, rescale the others, and add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .drawing import drawn_mask
from .row import MergeMethod, Parameter, TensorContext
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


DENSITY = 0.5
"""Share of entries that is kept: the paper drops up to 0.9, published examples 0.1 to 0.7."""

SCALE = 0.4
"""As in task arithmetic."""

DENSITY_PARAMETER = Parameter(DENSITY, "probability p with which an entry is kept", "(0, 1]")


def dropped_and_rescaled(task_vectors: Tensor, context: TensorContext, density: float) -> Tensor:
    r"""Each entry is kept with probability p and divided by it: :math:`d_k = b_k \tau_k / p`. (K, r, I)"""
    rows = task_vectors.reshape(len(task_vectors), task_vectors.shape[1], -1)
    shape = (rows.shape[1], rows.shape[2])
    kept = [
        torch.where(drawn_mask(context, expert, shape, density), vector / density, 0)
        for expert, vector in zip(context.experts, rows, strict=True)
    ]
    return torch.stack(kept).reshape(task_vectors.shape)


def dare(task_vectors: Tensor, context: TensorContext, density: float = DENSITY, scale: float = SCALE) -> Tensor:
    r"""Scaled sum of thinned task vectors, :math:`\lambda \sum_k b_k \tau_k / p`.

    *Language Models are Super Mario*, https://arxiv.org/abs/2311.03099. Each tensor, matrix or not, is thinned. The
    expectation is task arithmetic with the same λ.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: names them and says where they are, which decides the draw.
        density: p, in (0, 1]; the paper's drop rate is 1 - p.
        scale: λ

    Returns:
        (r, I)
    """
    return sum_in_order(dropped_and_rescaled(task_vectors, context, density)).mul_(scale)


DARE = MergeMethod(
    dare,
    is_entrywise=True,
    takes_context=True,
    parameters={
        "density": DENSITY_PARAMETER,
        "scale": Parameter(SCALE, "factor λ of the sum", "(0, inf)"),
    },
    needs_base=True,
    paper="DARE, arXiv 2311.03099",
    data="none; draws by seed",
    good_for="task vectors with many small redundant entries, as of instruction tuning",
)
