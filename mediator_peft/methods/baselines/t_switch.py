"""T-Switch: the largest entries of a task vector as mask and signs, with one factor that restores its norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..merging.row import Parameter, TensorContext
from .row import Baseline, Bits, num_entries

_NUM_BINS = 1 << 15


class Switches(NamedTuple):
    """What is known of every expert's task vector."""

    lowest_bins: NDArray[np.int64]
    """(K,) number of the bin from which on entries are kept."""

    knobs: NDArray[np.float64]
    """(K,) magnitude of every kept entry."""


def bins(task_vector: Tensor) -> Tensor:
    """Magnitudes as ascending whole numbers: exponent and 7 bits of the fraction, as bfloat16 cuts them off."""
    return task_vector.abs().contiguous().view(torch.int32) >> 16


def find_switches(tensors: Iterable[tuple[Tensor, TensorContext]], density: float) -> Switches:
    r"""One threshold and one factor for each expert, over the whole model.

    .. math:: \lambda_k = \|\tau_k\| / \sqrt{n_k}

    Binary Task Switch, https://arxiv.org/abs/2412.00054. The threshold has a resolution of one part in 128: the bins of
    the largest entries that together hold the wanted share, zeros never (our choice; one pass, no sorting).

    Args:
        tensors: of the whole model.
        density: share of all entries that is kept.
    """
    counts: NDArray[np.int64] | None = None
    squares: NDArray[np.float64] | None = None
    for task_vectors, _ in tensors:
        found = np.stack([np.bincount(bins(each).flatten().numpy(), minlength=_NUM_BINS) for each in task_vectors])
        square = np.array([float(each.double().square().sum()) for each in task_vectors])
        counts = found if counts is None else counts + found
        squares = square if squares is None else squares + square
    if counts is None or squares is None:
        return Switches(np.zeros(0, np.int64), np.zeros(0))
    wanted = np.ceil(density * counts.sum(axis=1))
    above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # entries in this bin and all larger ones
    lowest = np.maximum(1, (above >= wanted[:, None]).sum(axis=1) - 1)
    kept = above[np.arange(len(above)), lowest]
    return Switches(lowest, np.sqrt(squares / np.maximum(kept, 1)))


def restore(task_vectors: Tensor, number: int, context: TensorContext, survey: Switches, *, density: float) -> Tensor:
    r""":math:`\lambda_k S_A \circ S_P`: the factor, with the entry's sign, where it is kept.

    Returns:
        (*shape)
    """
    own = task_vectors[number]
    return torch.where(bins(own) >= int(survey.lowest_bins[number]), own.sign() * float(survey.knobs[number]), 0.0)


def bits(context: TensorContext, num_experts: int, density: float) -> Bits:
    """One for the mask and one for each sign."""
    return Bits(0.0, num_entries(context) * (1 + density))


T_SWITCH = Baseline(
    restore,
    bits,
    paper="T-Switch, arXiv 2412.00054",
    text="mask, signs and one factor for each task vector",
    survey=find_switches,
    parameters={"density": Parameter(0.35, "share of all entries that is kept; published: 0.3 to 0.4", "(0, 1]")},
)
