"""Conflict scores: how much experts disagree in a block. Larger means more conflict.

A score is two functions: counts of one tensor, which add up over the tensors of a block, and the block's number from
their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .energy import energy_counts, energy_score
from .sign import sign_counts, sign_score
from .sign_any import sign_any_counts, sign_any_score


class ConflictScore(NamedTuple):
    """How one conflict score is computed."""

    counts: Callable[[Tensor, Tensor], Tensor]
    """(task vectors (K, n) float32, trimmed signs (K, n) in {-1, 0, 1}) → float64 counts that add up over tensors."""

    score: Callable[[Tensor], float]
    """Summed counts → one number for the block."""


CONFLICT_SCORES: dict[str, ConflictScore] = {
    "sign": ConflictScore(sign_counts, sign_score),
    "sign_any": ConflictScore(sign_any_counts, sign_any_score),
    "energy": ConflictScore(energy_counts, energy_score),
}
