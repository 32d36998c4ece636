"""Sparsifiers: which entries of a delta are kept. One file and one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...deferred import torch
from .dare import drop_and_rescale
from .magnitude import keep_largest
from .svd import keep_singular

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sparsifier:
    """One way to choose what is kept of a delta; a row of ``SPARSIFIERS``."""

    keep: Callable[[Tensor, float, torch.Generator | None], Tensor]
    """Delta (*shape), density, generator → sparse delta (*shape); a dropped entry is 0."""

    rescales: bool = False
    """Whether ``keep`` divides what it keeps by the density."""

    is_low_rank: bool = False
    """Whether singular values are kept in place of entries: such deltas are stored as ``"factors"``."""

    def __call__(self, delta: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
        """``keep(delta, density, generator)``."""
        return self.keep(delta, density, generator)


SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": Sparsifier(keep_largest),
    "dare": Sparsifier(drop_and_rescale, rescales=True),
    "svd": Sparsifier(keep_singular, is_low_rank=True),
}
