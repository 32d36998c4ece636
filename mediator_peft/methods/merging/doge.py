"""DOGE task arithmetic: one shift of all task vectors that makes them conflict less, outside of a shared subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from ..sparsifying.magnitude import largest_mask
from .average import average
from .row import LINEAR, MergeMethod, Parameter, TensorContext
from .tsv import svd

if TYPE_CHECKING:
    from torch import Tensor


LENGTH, DENSITY, STEPS, RATE, PARTS = 0.4, 0.3, 400, 1e-4, 6

_FAST, _SLOW, _TINY = 0.9, 0.999, 1e-8


def doge(
    task_vectors: Tensor,
    context: TensorContext,
    length: float = LENGTH,
    density: float = DENSITY,
    steps: int = STEPS,
    rate: float = RATE,
    parts: int = PARTS,
) -> Tensor:
    r"""Task arithmetic of task vectors that are shifted together and trimmed.

    *Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent*, https://arxiv.org/abs/2501.01230, as
    FusionBench's code by its authors has it. With :math:`\lambda_k = \eta / |\tau_k|_F`, :math:`S = \sum_k \lambda_k
    \tau_k` and :math:`\Lambda = \sum_k \lambda_k`, Adam minimises over Δ, from 0,

    .. math:: \sum_k \sum_r \langle \tau_k, \tau_k - S - \Lambda \Delta \rangle_r^2

    (inner products of rows), each gradient without its part in the first min(O, I) // ``parts`` left singular vectors
    of the leading ones of all task vectors. The result is :math:`\sum_k \lambda_k (\tau_k + \Delta) M_k`, M_k the
    largest entries of :math:`\tau_k`. η is an absolute length in the paper (0.07 for CLIP); here it is ``length`` times
    the mean norm of the task vectors (our choice), and entries are trimmed in each matrix, not over the model. What is
    no weight of a linear layer of the blocks is averaged here, and stays the base's there.

    Args:
        task_vectors: (K, O, I), or another shape.
        context: of the tensor.
        length: η, in mean norms of the task vectors.
        density: share of the entries that is kept.
        steps: of Adam.
        rate: its learning rate, in units of the weights.
        parts: the shared subspace has 1 / ``parts`` of the dimensions.

    Returns:
        (*shape)
    """
    if context.kind != LINEAR or task_vectors.ndim != 3:
        return average(task_vectors)
    norms = task_vectors.flatten(1).double().norm(dim=1)
    moved = task_vectors[norms > 0]
    if not len(moved):
        return torch.zeros_like(task_vectors[0])
    weights = (length * norms.mean() / norms[norms > 0]).float()
    shift = _shift(moved, weights, _shared_subspace(moved, parts), steps, rate)
    merged = torch.zeros_like(shift)
    for vector, weight in zip(moved, weights, strict=True):
        merged += weight * torch.where(largest_mask(vector, density), vector + shift, 0)
    return merged


def _shared_subspace(task_vectors: Tensor, parts: int) -> Tensor:
    """Orthonormal columns (O, min(O, I) // parts) of what the leading left singular vectors have in common."""
    least = min(task_vectors.shape[1:])
    rank = max(1, least // len(task_vectors))
    leading = [svd(vector)[0][:, :rank] for vector in task_vectors]
    return torch.linalg.svd(torch.cat(leading, dim=1), full_matrices=False)[0][:, : least // parts].float()


def _shift(task_vectors: Tensor, weights: Tensor, subspace: Tensor, steps: int, rate: float) -> Tensor:
    """Δ by Adam: (O, I). What of the inner products does not depend on Δ is computed once."""
    total, weight = torch.tensordot(weights, task_vectors, dims=1), float(weights.sum())
    constant = (task_vectors * (task_vectors - total)).sum(dim=2, keepdim=True)
    shift = torch.zeros_like(total)
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    for step in range(1, steps + 1):
        gradient = torch.zeros_like(shift)
        for vector, own in zip(task_vectors, constant, strict=True):
            gradient -= (2 * weight * (own - weight * (vector * shift).sum(dim=1, keepdim=True))) * vector
        gradient -= subspace @ (subspace.T @ gradient)
        first.mul_(_FAST).add_(gradient, alpha=1 - _FAST)
        second.mul_(_SLOW).addcmul_(gradient, gradient, value=1 - _SLOW)
        scale = (second / (1 - _SLOW**step)).sqrt_().add_(_TINY)
        shift.addcdiv_(first, scale, value=-rate / (1 - _FAST**step))
    return shift


DOGE = MergeMethod(
    doge,
    takes_context=True,
    is_oriented=True,
    parameters={
        "length": Parameter(LENGTH, "η in mean norms of the task vectors; published: 0.07, absolute", "(0, inf)"),
        "density": Parameter(DENSITY, "share of the entries that is kept", "(0, 1]", is_published=True),
        "steps": Parameter(STEPS, "steps of Adam", "[0, 100000]", is_published=True),
        "rate": Parameter(RATE, "learning rate of Adam", "(0, inf)", is_published=True),
        "parts": Parameter(
            PARTS, "the shared subspace has this part of the dimensions", "[1, 100000]", is_published=True
        ),
    },
    needs_base=True,
    is_costly=True,
    work=lambda experts, rows, columns: (21 + experts) * rows * columns,
    works_on_linear_alone=True,
    paper="DOGE TA, arXiv 2501.01230",
    cost="K + 1 singular value decompositions and 400 steps for each matrix: slow",
    good_for="research comparisons, where time does not matter",
)
