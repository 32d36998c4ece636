"""Sparsifiers: which entries of a delta are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dare import drop_and_rescale
from .magnitude import keep_largest
from .svd import keep_singular

Sparsifier = Callable[[Tensor, float, "torch.Generator | None"], Tensor]
"""Delta (*shape), density, generator → thinned delta (*shape); a dropped entry is 0."""

SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": keep_largest,
    "dare": drop_and_rescale,
    "svd": keep_singular,
}

RESCALING = frozenset({"dare"})
"""Sparsifiers that divide what they keep by the density."""

LOW_RANK = frozenset({"svd"})
"""Sparsifiers that keep singular values in place of entries; their deltas are stored as factors."""
