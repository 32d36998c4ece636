"""Packing the deltas of a family of experts: what they have in common once, and thin residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..bank.sparse_delta import SparseDelta
from ..config import MediatorSettings
from ..deferred import torch
from ..storage import FloatType
from .delta_packing import pack_delta

if TYPE_CHECKING:
    from torch import Tensor


MIN_COSINE = 0.3
"""Mean cosine of deltas from which on experts become a family: from .2 to .3 on, a shared delta with residuals is
nearer to the experts than their own deltas of the same bytes (docs/forms.md)."""

RESIDUAL_DENSITY = 0.05


class Groups(NamedTuple):
    """Which experts share what."""

    aliases: Mapping[str, str] = {}
    """Expert → the expert that it equals, whose delta stands for both."""

    families: Mapping[str, tuple[str, ...]] = {}
    """Shared delta → the stored columns that have residuals to it."""

    notes: tuple[str, ...] = ()
    """For the report."""

    @property
    def members(self) -> frozenset[str]:
        """All stored columns that are residuals."""
        return frozenset(name for group in self.families.values() for name in group)


NO_GROUPS = Groups()


def pack_family(
    config: MediatorSettings,
    tensor: str,
    shared: str,
    deltas: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    densities: tuple[float, float],
    dtype: FloatType,
) -> dict[str, SparseDelta]:
    r"""One tensor's deltas of a family: :math:`F = \operatorname{thin} \frac1m \sum_k \Delta_k`, then each
    :math:`\operatorname{thin}(\Delta_k - F)`.

    Args:
        config: how deltas are thinned and packed.
        tensor: its name; with the seed and a column's name it decides what is drawn.
        shared: name of the shared delta.
        deltas: member → whole delta (O, I) float32.
        biases: member → delta of the bias (O,), for all members or none.
        densities: of the shared delta and of residuals.
        dtype: storage dtype.

    Returns:
        The shared delta and the members' residuals, by name.
    """
    order = sorted(deltas)
    mean = torch.stack([deltas[member] for member in order]).mean(dim=0)
    bias = torch.stack([biases[member] for member in order]).mean(dim=0) if biases else None
    packed = {shared: pack_delta(config, f"{tensor}/{shared}", mean, densities[0], dtype, bias)}
    for member in order:
        packed[member] = residual(
            config, f"{tensor}/{member}", deltas[member], biases.get(member), packed[shared], densities[1], dtype
        )
    return packed


def residual(
    config: MediatorSettings,
    name: str,
    delta: Tensor,
    bias: Tensor | None,
    shared: SparseDelta,
    density: float,
    dtype: FloatType,
) -> SparseDelta:
    """What a member's delta (O, I) float32 has beside the shared one, thinned out."""
    rest = None if bias is None or shared.bias is None else bias - shared.bias.cpu()
    return pack_delta(config, name, delta - shared.dense().cpu(), density, dtype, rest)


def residual_density(density: float, wanted: float = RESIDUAL_DENSITY) -> float:
    """Share of a residual's entries that is kept beside a shared delta of this density: all where that has all."""
    return 1.0 if density == 1.0 else wanted
