"""Drop entries at random and rescale the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep each entry with probability ``density`` and divide it by ``density``.

    DARE, https://arxiv.org/abs/2311.03099, equation 2 with a drop rate of 1 - density.

    Args:
        delta: (*shape)
        density: share kept, in (0, 1]; 1 keeps every entry as it is.
        generator: on the CPU; None draws from torch's own.

    Returns:
        (*shape), a new tensor.
    """
    if density >= 1:
        return delta.clone()
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return torch.where(kept, delta / density, 0)
