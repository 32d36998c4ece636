"""EMR-Merging: one unified task vector, a mask of signs and one factor for each expert."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..merging.row import TensorContext
from .row import NUMBER_BITS, Baseline, Bits, num_entries


def unify(task_vectors: Tensor) -> Tensor:
    r"""Elected signs, with the largest magnitude among the experts that agree.

    .. math:: \gamma = \operatorname{sgn} \frac1K \sum_k \tau_k, \quad
        \tau_u = \gamma \max_{k:\, \gamma \tau_k > 0} |\tau_k|

    EMR-Merging, https://arxiv.org/abs/2405.17461, section 3.2. A sum of zero elects -1, as in the authors' code.

    Args:
        task_vectors: (K, *shape)

    Returns:
        (*shape)
    """
    sign = torch.where(task_vectors.sum(dim=0) > 0, 1.0, -1.0)
    # One expert at a time: K copies of a large embedding would be gigabytes.
    largest = torch.zeros_like(sign)
    for task_vector in task_vectors:
        torch.maximum(largest, task_vector * sign, out=largest)
    return sign * largest


def masked(unified: Tensor, task_vector: Tensor) -> Tensor:
    r""":math:`m_k \circ \tau_u` with :math:`m_k = [\gamma \tau_k > 0]`, (*shape)."""
    return torch.where(task_vector.sign() == unified.sign(), unified, 0.0)


def rescalers(tensors: Iterable[tuple[Tensor, TensorContext]]) -> Tensor:
    r"""One factor for each expert.

    .. math:: \lambda_k = \sum_{\text{tensors}} \operatorname{mean}|\tau_k| \Big/
        \sum_{\text{tensors}} \operatorname{mean}|m_k \circ \tau_u|

    Means are taken tensor by tensor, as in the authors' code: small tensors count as much as large ones.

    Returns:
        (K,) float64; 1 for an expert of which nothing is kept.
    """
    totals: Tensor | None = None
    for task_vectors, _ in tensors:
        unified = unify(task_vectors)
        means = torch.tensor(
            [[float(part.abs().double().mean()) for part in (own, masked(unified, own))] for own in task_vectors],
            dtype=torch.float64,
        )
        totals = means if totals is None else totals + means
    if totals is None:
        return torch.ones(0, dtype=torch.float64)
    return torch.where(totals[:, 1] > 0, totals[:, 0] / totals[:, 1].clamp(min=1e-300), 1.0)


def restore(task_vectors: Tensor, number: int, context: TensorContext, survey: Tensor) -> Tensor:
    r""":math:`\lambda_k m_k \circ \tau_u`, (*shape)."""
    return masked(unify(task_vectors), task_vectors[number]) * float(survey[number])


def bits(context: TensorContext, num_experts: int) -> Bits:
    """16 for the unified task vector, one a mask; the factors are not counted."""
    return Bits(float(NUMBER_BITS * num_entries(context)), float(num_entries(context)))


EMR = Baseline(
    restore,
    bits,
    paper="EMR-Merging, arXiv 2405.17461",
    text="one unified task vector; a mask and a factor for each expert",
    survey=rescalers,
)
