"""Twin-Merging: a shared model by task arithmetic, and what each expert has beyond it as a matrix of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ..merging.row import Parameter, TensorContext
from ..merging.summing import sum_in_order
from ..sparsifying.svd import low_rank
from .row import NUMBER_BITS, Baseline, Bits, num_entries


def rank_of(shape: tuple[int, ...], rank_share: float) -> int:
    """Singular values of a matrix that are kept, one at the least."""
    return max(1, round(rank_share * min(shape)))


def restore(
    task_vectors: Tensor, number: int, context: TensorContext, survey: None, *, scale: float, rank_share: float
) -> Tensor:
    r"""The shared model and all of one expert's exclusive part.

    .. math:: \theta^* = \theta_0 + \lambda \sum_j \tau_j, \quad v_k = \operatorname{svd}_r(\theta_k - \theta^*), \quad
        \theta^* + v_k

    Twin-Merging, https://arxiv.org/abs/2406.15479, algorithm 1. The paper mixes the exclusive parts by a router's
    softmax; this is the mix of a router that is sure. Vectors (norms, biases) are kept whole (our choice).

    Returns:
        (*shape)
    """
    shared = scale * sum_in_order(task_vectors)
    exclusive = task_vectors[number] - shared
    if exclusive.ndim != 2:
        return shared + exclusive
    generator = torch.Generator().manual_seed(0)
    left, right = low_rank(exclusive, rank_of(tuple(exclusive.shape), rank_share), generator)
    return shared + left @ right


def bits(context: TensorContext, num_experts: int, scale: float, rank_share: float) -> Bits:
    """Two factors in 16 bits; the shared model takes the place of the base."""
    shape = context.stored_shape
    numbers = rank_of(shape, rank_share) * sum(shape) if len(shape) == 2 else num_entries(context)
    return Bits(0.0, float(NUMBER_BITS * numbers))


TWIN = Baseline(
    restore,
    bits,
    paper="Twin-Merging, arXiv 2406.15479",
    text="task arithmetic as the shared model; the rest of each expert as a matrix of low rank",
    parameters={
        "scale": Parameter(0.3, "λ of the shared model", is_published=True),
        "rank_share": Parameter(0.1, "share of the singular values that is kept", "(0, 1]", is_published=True),
    },
)
