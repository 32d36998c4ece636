"""Sign conflict of all experts at once."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_any_counts(task_vectors: Tensor, signs: Tensor) -> Tensor:
    """Entries kept by two experts or more, and those among them whose signs are not unanimous.

    Args:
        task_vectors: (K, n), not used by this score.
        signs: (K, n) in {-1, 0, 1}, 0 where trimmed.

    Returns:
        (2,) float64
    """
    num_kept = (signs != 0).sum(dim=0)
    shared = num_kept >= 2
    split = shared & (signs.sum(dim=0, dtype=torch.int32).abs() < num_kept)
    return torch.tensor([int(shared.sum()), int(split.sum())], dtype=torch.float64)


def sign_any_score(counts: Tensor) -> float:
    """Share of shared entries that are not unanimous, in [0, 1]; 0 where nothing is shared (our choice)."""
    return float(counts[1] / counts[0]) if counts[0] > 0 else 0.0
