"""Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...deferred import torch
from .row import MergeMethod, Parameter, TensorContext, TensorView
from .side_tensors import FISHER, SideTensors, fault_of_entries, open_side_tensors

if TYPE_CHECKING:
    from torch import Tensor


FLOOR = 1e-6


def fisher(task_vectors: Tensor, context: TensorContext, floor: float = FLOOR, normalise: bool = False) -> Tensor:
    r"""Mean of the task vectors, each entry weighted by its diagonal Fisher information.

    .. math:: \tau = \frac{\sum_k c_k (F_k + \epsilon) \tau_k}{\sum_k c_k (F_k + \epsilon)}

    *Merging Models with Fisher-Weighted Averaging*, https://arxiv.org/abs/2111.09832, section 3. There the floor is the
    number 1e-6; entries of language models are smaller, and the merge would be the average. Here it is relative:
    ``floor`` times the mean of all entries of all experts (our choice). With ``normalise``, c_k is 1 over the 2-norm of
    F_k over the whole model, else 1. Where no expert has any information, the result is the mean.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with side tensors as its data and what :func:`scales` returns as shared.
        floor: see above.
        normalise: see above.

    Returns:
        (r, I)
    """
    shared = context.shared or {}
    epsilon = shared.get("epsilon", 0.0)
    numerator = torch.zeros(task_vectors.shape[1:], dtype=torch.float64)
    denominator, plain = torch.zeros_like(numerator), torch.zeros_like(numerator)
    for expert, vector in zip(context.experts, task_vectors, strict=True):
        weight = context.data.tile(expert, context, *vector.shape) + epsilon
        weight *= shared.get(expert, 1.0)
        numerator += weight * vector
        denominator += weight
        plain += vector
    known = denominator > 0
    merged = torch.where(known, numerator / torch.where(known, denominator, 1.0), plain / len(task_vectors))
    return merged.float()


def scales(views: Sequence[TensorView], floor: float = FLOOR, normalise: bool = False) -> dict[str, float]:
    """``epsilon``, and expert → c_k, from sums over the whole model."""
    contexts = {view.context.name: view.context for view in views}
    totals = next(iter(contexts.values())).data.totals(contexts)
    mean = sum(mean for mean, _ in totals.values()) / len(totals)
    norms = {expert: norm for expert, (_, norm) in totals.items()}
    found = {expert: 1 / norm if normalise and norm > 0 else 1.0 for expert, norm in norms.items()}
    return {**found, "epsilon": floor * mean}


def open_fisher(path: Path, contexts: Mapping[str, TensorContext]) -> SideTensors:
    """Side files of diagonal Fisher information; see :func:`open_side_tensors`."""
    return open_side_tensors(path, contexts, FISHER, fault_of_entries)


FISHER_ROW = MergeMethod(
    fisher,
    is_entrywise=True,
    takes_context=True,
    prepass=scales,
    open_data=open_fisher,
    needs_data=True,
    parameters={
        "floor": Parameter(FLOOR, "added to each weight, in mean weights", "[0, inf)"),
        "normalise": Parameter(False, "weigh each expert by 1 / |F| over the model", is_published=True),
    },
    paper="Fisher-weighted averaging, arXiv 2111.09832",
    data="diagonal Fisher information (measure --statistic fisher)",
    cost="forward and backward pass for each sequence; a side file as large as the expert in float32",
    good_for="experts that depend on different weights",
)
