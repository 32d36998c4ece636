"""OTA: averaging by the second moments of Adam, with the mask of FFG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from .row import MergeMethod, Parameter, TensorContext, TensorView
from .side_tensors import MOMENTS, SideTensors, fault_of_entries, open_side_tensors

if TYPE_CHECKING:
    from torch import Tensor


POWER, DENSITY = 0.5, 0.4
EPSILON = 1e-26
"""Added to each weight: where all second moments are 0 the result is the mean."""

_WEIGHTED, _MEAN = "weighted", "mean"
_SHIFT = 45  # of a float64: the exponent and 7 bits of the mantissa are left


def ota(
    task_vectors: Tensor,
    context: TensorContext,
    power: float = POWER,
    density: float = DENSITY,
    combine: str = _WEIGHTED,
) -> Tensor:
    r"""Mean of the task vectors, entries weighted by powers of Adam's second moments, the least salient left out.

    .. math:: M_k = [v_k \tau_k^2 \ge t_k], \qquad P_k = (v_k^p + \epsilon) M_k, \qquad
        \tau = \frac{\sum_k P_k \tau_k}{\sum_k P_k}

    *OTA-Merging* with FFG, https://arxiv.org/abs/2509.11167. An entry that no mask has stays the base's. The thresholds
    :math:`t_k` are searched there by validation score; here they keep the share ``density`` of all entries of the model
    (our choice; the paper's keep 0.3 to 0.4), found from a histogram with bins 0.8 % wide. With ``combine="mean"`` the
    masked task vectors are averaged over all K experts. Diagonal Fisher information may stand for second moments.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with side tensors as its data and what :func:`thresholds` returns as shared.
        power: p.
        density: share of entries that a mask has; used by :func:`thresholds`. 1 masks none.
        combine: ``"weighted"`` or ``"mean"``.

    Returns:
        (r, I)
    """
    limits = context.shared or {}
    numerator = torch.zeros(task_vectors.shape[1:], dtype=torch.float64)
    denominator = torch.zeros_like(numerator)
    for expert, vector in zip(context.experts, task_vectors, strict=True):
        moments = context.data.tile(expert, context, *vector.shape)
        mask = moments * vector.double().square() >= limits.get(expert, 0.0)
        weight = mask * (moments.pow(power) + EPSILON) if combine == _WEIGHTED else mask.double()
        numerator += weight * vector
        denominator += weight
    if combine == _MEAN:
        return (numerator / len(task_vectors)).float()
    known = denominator > 0
    return torch.where(known, numerator / torch.where(known, denominator, 1.0), 0.0).float()


def thresholds(
    views: Sequence[TensorView], power: float = POWER, density: float = DENSITY, combine: str = _WEIGHTED
) -> dict[str, float]:
    """Expert → the saliency that the share ``density`` of its entries reaches, over the whole model."""
    if density == 1:
        return {}
    experts = views[0].context.experts
    counts = np.zeros((len(experts), 1 << (63 - _SHIFT)), dtype=np.int64)
    for view in views:
        for task_vectors, context in view.tiles():
            for number, (expert, vector) in enumerate(zip(experts, task_vectors, strict=True)):
                saliency = context.data.tile(expert, context, *vector.shape) * vector.double().square()
                # Bits of a float that is not negative are in the order of its value.
                bins = saliency.numpy().reshape(-1).view(np.int64) >> _SHIFT
                found, times = np.unique(bins, return_counts=True)
                counts[number, found] += times
    return {expert: _reached(counts[number], density) for number, expert in enumerate(experts)}


def _reached(counts: np.ndarray, density: float) -> float:
    """The lower edge of the bin in which the share ``density``, counted from above, is reached."""
    from_above = counts[::-1].cumsum()
    wanted = density * from_above[-1]
    place = len(counts) - 1 - int(np.searchsorted(from_above, wanted))
    return float(np.int64(place << _SHIFT).view(np.float64))


def open_moments(path: Path, contexts: Mapping[str, TensorContext]) -> SideTensors:
    """Side files of second moments: whole, as ``<name>`` or ``<name>.exp_avg_sq``, or ``<name>.rows`` and
    ``<name>.columns`` with their sums over columns and rows; see :func:`open_side_tensors`."""
    return open_side_tensors(path, contexts, MOMENTS, fault_of_entries)


OTA = MergeMethod(
    ota,
    is_entrywise=True,
    takes_context=True,
    prepass=thresholds,
    open_data=open_moments,
    needs_data=True,
    parameters={
        "power": Parameter(POWER, "power p of the second moments", "(0, 2]", is_published=True),
        "density": Parameter(DENSITY, "share of an expert's entries that its mask has", "(0, 1]"),
        "combine": Parameter(_WEIGHTED, "weighted by second moments, or plain mean", choices=(_WEIGHTED, _MEAN)),
    },
    paper="OTA-Merging with FFG, arXiv 2509.11167",
    data="Adam's exp_avg_sq of each expert by tensor name, or its Fisher information",
    cost="two passes; side files as large as the experts, or row and column sums",
    good_for="experts whose optimiser states were kept, from runs of one recipe",
)
