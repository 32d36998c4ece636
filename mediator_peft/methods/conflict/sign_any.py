"""Sign conflict of all experts at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .statistics import Statistics, count_ones


def sign_any_counts(statistics: Statistics) -> NDArray[np.float64]:
    """Entries kept by two experts or more, and those among them whose signs are not unanimous: (2,)."""
    once = np.zeros_like(statistics.kept[0])
    shared, plus, minus = once.copy(), once.copy(), once.copy()
    for kept, negative in zip(statistics.kept, statistics.negative, strict=True):
        shared |= once & kept
        once |= kept
        minus |= kept & negative
        plus |= kept & ~negative
    return np.array([count_ones(shared), count_ones(plus & minus)], np.float64)


def sign_any_score(counts: NDArray[np.float64]) -> float:
    """Share of shared entries that are not unanimous, in [0, 1]; 0 where nothing is shared (our choice)."""
    return float(counts[1] / counts[0]) if counts[0] > 0 else 0.0
