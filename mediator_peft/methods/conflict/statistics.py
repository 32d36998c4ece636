"""Per-tensor statistics from which conflict scores are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..sparsifying.magnitude import largest_entries
from ..sparsifying.selection import Bitmap, Floats, count_ones

__all__ = ["Statistics", "task_vector_statistics"]


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

    count_ones: Callable[[Bitmap], int] = count_ones
    """Number of ones in a bitmap."""


def task_vector_statistics(task_vectors: Floats, density: float) -> Statistics:
    """The statistics of whole task vectors: the plain way, for tests and small things.

    Args:
        task_vectors: (K, *shape) float32
        density: share of each that is kept.
    """
    rows = task_vectors.reshape(len(task_vectors), -1)
    kept = [np.packbits(largest_entries(row, density), bitorder="little") for row in rows]
    negative = [np.packbits(row < 0, bitorder="little") for row in rows]
    energies = np.square(rows, dtype=np.float64).sum(axis=1)
    return Statistics(kept, negative, energies, float(np.square(rows.sum(axis=0, dtype=np.float64)).sum()))
