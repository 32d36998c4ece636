"""RegMean: least squares on the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...deferred import torch
from .average import average
from .row import LINEAR, MergeMethod, Parameter, TensorContext
from .side_tensors import GRAM, SideTensors, fault_of_gram, open_side_tensors

if TYPE_CHECKING:
    from torch import Tensor


OFF_DIAGONAL, RIDGE = 0.9, 1e-4


class Factorised(NamedTuple):
    """Gram matrices of one layer, ready for its rows."""

    grams: list[Tensor]
    """K times (I, I) float64."""

    factor: Tensor
    """Cholesky factor of their sum, (I, I) lower, float64."""


def regmean(
    task_vectors: Tensor, context: TensorContext, off_diagonal: float = OFF_DIAGONAL, ridge: float = RIDGE
) -> Tensor:
    r"""The weight whose outputs are nearest to each expert's outputs on that expert's own inputs.

    .. math:: \tau = \Big(\sum_k \tau_k G_k\Big) \Big(\sum_k G_k\Big)^{-1}, \qquad G_k = X_k^T X_k / N_k

    *Dataless Knowledge Fusion*, https://arxiv.org/abs/2212.09849: off-diagonal entries of G are multiplied by
    ``off_diagonal``, 0.9 there. Each G gets ``ridge`` times its mean diagonal on its diagonal (our choice): that pulls
    to the average, and equal experts are reproduced. Other tensors than weights of linear layers are averaged.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with :class:`Factorised` as its survey, or None.
        off_diagonal: see above; used by the survey.
        ridge: see above; used by the survey.

    Returns:
        (r, I)
    """
    found = context.survey
    if found is None:
        return average(task_vectors)
    total = sum(vector.double() @ gram for vector, gram in zip(task_vectors, found.grams, strict=True))
    assert isinstance(total, torch.Tensor)
    # Float64, so that the number of rows at a time does not reach the rounded result.
    return torch.cholesky_solve(total.T, found.factor).T.float().contiguous()


def factorise(
    tiles: Iterable[tuple[Tensor, TensorContext]],
    context: TensorContext,
    off_diagonal: float = OFF_DIAGONAL,
    ridge: float = RIDGE,
) -> Factorised | None:
    """Gram matrices of a layer and the factor of their sum; None where it is no linear layer or has no inputs."""
    if context.kind != LINEAR or context.data is None:
        return None
    grams = []
    for expert in context.experts:
        gram = context.data.gram(expert, context)
        if gram is None:
            return None
        diagonal = gram.double().diagonal()
        scaled = off_diagonal * gram.double()
        scaled.diagonal().copy_(diagonal + ridge * diagonal.mean())
        grams.append(scaled)
    factor, fault = torch.linalg.cholesky_ex(sum(grams))
    return None if int(fault) else Factorised(grams, factor)


def open_grams(path: Path, contexts: Mapping[str, TensorContext]) -> SideTensors:
    """Side files of Gram matrices; see :func:`open_side_tensors`."""
    return open_side_tensors(path, contexts, GRAM, fault_of_gram)


REGMEAN = MergeMethod(
    regmean,
    is_entrywise=True,
    is_oriented=True,
    takes_context=True,
    survey=factorise,
    open_data=open_grams,
    needs_data=True,
    parameters={
        "off_diagonal": Parameter(OFF_DIAGONAL, "factor of off-diagonal entries of G", "[0, 1]", is_published=True),
        "ridge": Parameter(RIDGE, "added to the diagonal of each G, in mean diagonals", "[0, inf)"),
    },
    # K Gram matrices, their sum and its factor in float64, and one in float32 with its copy.
    work=lambda experts, rows, columns: (2 * experts + 8) * columns**2,
    works_on_linear_alone=True,
    paper="RegMean, arXiv 2212.09849",
    data="Gram matrices of layer inputs (measure --statistic gram)",
    cost="forward passes; a Cholesky factor and K + 1 products with I x I matrices for each layer",
    good_for="better merged models than the average from unlabelled prompts, without gradients",
)
