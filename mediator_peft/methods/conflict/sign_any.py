"""Sign conflict of all experts at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .sign import CHANCE
from .statistics import Statistics


def sign_any_counts(statistics: Statistics) -> NDArray[np.float64]:
    """Entries kept by two experts or more, those among them whose signs are not unanimous, and all kept ones: (3,)."""
    once = np.zeros_like(statistics.kept[0])
    shared, plus, minus = once.copy(), once.copy(), once.copy()
    for kept, negative in zip(statistics.kept, statistics.negative, strict=True):
        shared |= once & kept
        once |= kept
        below = kept & negative
        minus |= below
        plus |= kept ^ below
    count_ones = statistics.count_ones
    changed = count_ones(once) if len(statistics.kept) > 1 else 0  # one expert has nothing to conflict with
    return np.array([count_ones(shared), count_ones(plus & minus), changed], np.float64)


def sign_any_score(counts: NDArray[np.float64]) -> float:
    """Share of shared entries that are not unanimous, in [0, 1] (our choice).

    0.5 where entries changed and none is shared, see ``sign_score``; 0 where nothing changed.
    """
    if counts[0] > 0:
        return float(counts[1] / counts[0])
    return CHANCE if counts[2] > 0 else 0.0
