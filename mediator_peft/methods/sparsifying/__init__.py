"""Sparsifiers: which entries of a delta are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .magnitude import keep_largest

Sparsifier = Callable[[Tensor, float, "torch.Generator | None"], Tensor]
"""Delta (*shape), density, generator → thinned delta (*shape); a dropped entry is 0."""

SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": keep_largest,
}
