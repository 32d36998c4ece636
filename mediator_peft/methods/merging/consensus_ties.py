"""Consensus merging on TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sparsifying.magnitude import keep_largest
from .consensus import LEAST, MASK_WEIGHT, PARAMETERS, SCALE, consensus_of
from .row import MergeMethod, Parameter
from .summing import disjoint_sum
from .ties import DENSITY

if TYPE_CHECKING:
    from torch import Tensor


def consensus_ties(
    task_vectors: Tensor,
    density: float = DENSITY,
    mask_weight: float = MASK_WEIGHT,
    scale: float = SCALE,
    least_experts: int = LEAST,
) -> Tensor:
    r"""As :func:`~.consensus.consensus`, with the disjoint sum of TIES as multi-task vector.

    https://arxiv.org/abs/2405.07813. The authors trim a whole model at once; here each tensor is trimmed by itself, as
    in ``ties``.

    Args:
        task_vectors: (K, *shape)
        density: share of a task vector that is kept for the multi-task vector, in (0, 1].
        mask_weight: λ of the masks.
        scale: α
        least_experts: k_min

    Returns:
        (*shape)
    """
    multitask = disjoint_sum([keep_largest(vector, density) for vector in task_vectors])
    return consensus_of(multitask, task_vectors, mask_weight, scale, least_experts)


CONSENSUS_TIES = MergeMethod(
    consensus_ties,
    parameters={"density": Parameter(DENSITY, "share of a task vector that is kept", "(0, 1]", is_published=True)}
    | PARAMETERS,
    needs_base=True,
    work=lambda experts, rows, columns: (5 + 1.2 * experts) * rows * columns,
    paper="Consensus merging (TALL-masks), arXiv 2405.07813",
    cost="a selection of the largest entries for each tensor and expert",
    good_for="as consensus, where task vectors conflict in sign",
)
