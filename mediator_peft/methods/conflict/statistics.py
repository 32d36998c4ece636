"""Per-tensor statistics from which conflict scores are computed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sparsifying.magnitude import largest_mask
from ..sparsifying.selection import Bitmap, count_ones

__all__ = ["Statistics", "count_ones", "task_vector_statistics"]


class Statistics(NamedTuple):
    """One tensor of K experts. A score that needs more of it adds a field here."""

    kept: list[Bitmap]
    """K bitmaps of one shape, a one where an expert's task vector is kept after trimming."""

    negative: list[Bitmap]
    """K bitmaps, a one where the task vector is negative, kept or not."""

    energies: NDArray[np.float64]
    """(K,) squared norm of each task vector."""

    energy_of_sum: float
    """Squared norm of the sum of the task vectors."""


def task_vector_statistics(task_vectors: Tensor, density: float) -> Statistics:
    """The statistics of whole task vectors: the plain way, for tests and small things.

    Args:
        task_vectors: (K, *shape)
        density: share of each that is kept.
    """
    rows = task_vectors.float().flatten(1)
    kept = [np.packbits(largest_mask(row, density).numpy(), bitorder="little") for row in rows]
    negative = [np.packbits((row < 0).numpy(), bitorder="little") for row in rows]
    energies = rows.double().square().sum(dim=1).numpy()
    return Statistics(kept, negative, energies, float(torch.sum(rows.double().sum(dim=0).square())))
