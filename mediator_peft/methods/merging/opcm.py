"""OPCM: experts one after the other, each projected away from what is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .row import LINEAR, MergeMethod, Parameter, TensorContext
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


SHARE = 0.5


def opcm(task_vectors: Tensor, context: TensorContext, share: float = SHARE) -> Tensor:
    r"""Add the task vectors up one by one, without what lies in the span of the sum so far, at their mean norm.

    Orthogonal projection-based continual merging, https://arxiv.org/abs/2501.09522. With the full decomposition
    :math:`S = U \Sigma V^T` of the sum so far and the next task vector :math:`R = U^T \tau_t V`, R loses its diagonal
    and its first r rows of its first r columns, and :math:`S \leftarrow S + U R V^T`; r counts the singular values
    before the one at which their cumulative share exceeds ``share``. The running scales of the published recursion
    telescope: the result is S at the mean norm of the task vectors. Norms are those of each tensor here, of the whole
    model in the paper (our choice). The diagonal is taken out as in FusionBench; the authors' first code meant to.
    Other tensors than weights of linear layers are added up.

    The order of the experts' names is their order here, and part of the result.

    Args:
        task_vectors: (K, *shape)
        context: of the tensor.
        share: of the sum of the singular values, in [0, 1).

    Returns:
        (*shape)
    """
    if context.kind == LINEAR and task_vectors.ndim == 3:
        total = task_vectors[0].double()
        for vector in task_vectors[1:]:
            total = total + _beside(total, vector.double(), share)
    else:
        total = sum_in_order(task_vectors).double()
    norms = torch.stack([vector.double().norm() for vector in task_vectors])
    length = total.norm()
    return (total * (norms.mean() / length) if length > 0 else total).float()


def _beside(total: Tensor, vector: Tensor, share: float) -> Tensor:
    """What of a task vector (O, I) is left beside a sum.

    With U and V completed to whole bases, what is taken away is known without the completion: the diagonal, and the
    leading square of R.
    """
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    if not values.any():
        return vector
    past = (values.cumsum(0) / values.sum()) > share
    rank = int(past.double().argmax())
    inner = left.T @ vector @ right.T
    taken = torch.diag(inner.diagonal())
    taken[:rank, :rank] = inner[:rank, :rank]
    return vector - left @ taken @ right


OPCM = MergeMethod(
    opcm,
    takes_context=True,
    parameters={
        "share": Parameter(SHARE, "share of the singular values that is kept clear", "[0, 1)", is_published=True)
    },
    needs_base=True,
    is_costly=True,
    is_order_free=False,
    work=lambda experts, rows, columns: (7 + 3.5 * experts) * rows * columns,
    works_on_linear_alone=True,
    paper="OPCM, arXiv 2501.09522",
    cost="K - 1 singular value decompositions of each matrix",
    good_for="experts that come one after the other",
)
