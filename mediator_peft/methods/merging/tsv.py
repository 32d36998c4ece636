"""TSV-Merge: leading singular directions of all experts, made orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from .average import average
from .row import LINEAR, MergeMethod, Parameter, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


SCALE = 1.0

_SMALLEST = 1e-10
"""Singular values below this share of the largest one are taken for zero."""


def tsv(task_vectors: Tensor, context: TensorContext, scale: float = SCALE) -> Tensor:
    r"""Sum of the leading singular parts of the task vectors, with singular vectors that do not interfere.

    TSV-M of *Task Singular Vectors*, https://arxiv.org/abs/2412.00081. Of the thin decompositions
    :math:`\tau_k = U_k S_k V_k^T` the r = max(1, min(O, I) // K) leading parts are kept and put side by side; U and V
    are replaced by the nearest matrices with orthonormal columns (Procrustes), :math:`U_\perp = P Q^T` with
    :math:`U = P D Q^T`:

    .. math:: \tau = \alpha\, U_\perp \operatorname{diag}(S_1, \dots, S_K)\, V_\perp^T

    Directions that depend on others (equal experts) have no such matrix of their own: singular values D below 1e-10 of
    the largest are left out. Whatever is no weight of a linear layer of the blocks is averaged: the authors' code
    decomposes embeddings too.

    Args:
        task_vectors: (K, *shape)
        context: of the tensor.
        scale: α

    Returns:
        (*shape)
    """
    if context.kind != LINEAR or task_vectors.ndim != 3:
        return average(task_vectors)
    left, values, right = _leading(task_vectors, max(1, min(task_vectors.shape[1:]) // len(task_vectors)))
    merged = (_orthogonal(left) * values) @ _orthogonal(right.T).T
    return (scale * merged).float()


def _leading(task_vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of all task vectors, side by side: (O, K r), (K r,), (K r, I), float64."""
    parts = [svd(vector) for vector in task_vectors]
    left = torch.cat([part[0][:, :rank] for part in parts], dim=1)
    values = torch.cat([part[1][:rank] for part in parts])
    right = torch.cat([part[2][:rank] for part in parts])
    return left, values, right


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of a matrix (O, I) in float64: (O, q), (q,), (q, I).

    From the eigenvectors of the smaller Gram matrix, a third of the time; singular values below 1e-7 of the largest are
    not told from zero, and get singular vectors of length 0.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix.double() if wide else matrix.T.double()
    squares, vectors = torch.linalg.eigh(small @ small.T)
    values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    is_nothing = values <= 1e-7 * values[:1]
    values = torch.where(is_nothing, 0, values)
    others = (vectors.T @ small) / torch.where(is_nothing, torch.inf, values)[:, None]
    return (vectors, values, others) if wide else (others.T, values, vectors.T)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, (n, r) float64; directions of zero are left out."""
    p, values, q = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > _SMALLEST * values.max().clamp(min=float(np.finfo(np.float64).tiny))
    return p[:, kept] @ q[kept]


TSV = MergeMethod(
    tsv,
    takes_context=True,
    parameters={"scale": Parameter(SCALE, "factor α of the result", "(0, inf)", is_published=True)},
    needs_base=True,
    is_costly=True,
    work=lambda experts, rows, columns: (13 + 2.8 * experts) * rows * columns,
    works_on_linear_alone=True,
    paper="TSV-Merge, arXiv 2412.00081",
    cost="K + 2 singular value decompositions of each matrix",
    good_for="several experts of low-rank changes, as a merged model",
)
