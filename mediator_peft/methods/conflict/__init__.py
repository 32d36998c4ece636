"""Conflict scores: how much experts disagree in a block. Larger means more conflict.

A score is two functions: counts of one tensor, which add up over the tensors of a block, and the block's number from
their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .energy import energy_counts, energy_score
from .sign import sign_counts, sign_score
from .sign_any import sign_any_counts, sign_any_score
from .statistics import Statistics


class ConflictScore(NamedTuple):
    """How one conflict score is computed."""

    counts: Callable[[Statistics], NDArray[np.float64]]
    """Statistics of one tensor → counts that add up over tensors."""

    score: Callable[[NDArray[np.float64]], float]
    """Summed counts → one number for the block."""


CONFLICT_SCORES: dict[str, ConflictScore] = {
    "sign": ConflictScore(sign_counts, sign_score),
    "sign_any": ConflictScore(sign_any_counts, sign_any_score),
    "energy": ConflictScore(energy_counts, energy_score),
}
