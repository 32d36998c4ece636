"""Sparsifies and packs one whole delta, with any sparsifier and encoding."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from ..bank.sparse_delta import SparseDelta
from ..checkpoints.checkpoint import Checkpoint
from ..config import MediatorSettings
from ..deferred import torch
from ..methods.encoding.base import Precision
from ..methods.sparsifying import SPARSIFIERS
from ..methods.sparsifying.svd import low_rank, rank_of_density
from ..storage import FloatType

if TYPE_CHECKING:
    from torch import Tensor


def pack_delta(
    config: MediatorSettings, name: str, delta: Tensor, density: float, dtype: FloatType, bias: Tensor | None
) -> SparseDelta:
    """Thin out a whole delta and pack it.

    Args:
        config: how.
        name: of tensor and column: with the seed it decides what is drawn.
        delta: (O, I) float32
        density: share that is kept.
        dtype: storage dtype.
        bias: (O,) float32 or None.
    """
    generator = torch.Generator().manual_seed(crc32(f"{config.seed}/{name}".encode()))
    sparsifier = SPARSIFIERS[config.sparsifier]
    if sparsifier.is_low_rank:
        rank = rank_of(config, (delta.shape[0], delta.shape[1]), density)
        left, right = low_rank(delta, rank, generator)
        stored = factor_dtype(config, density)
        return SparseDelta.from_factors(left.to(stored), right.to(stored), bias)
    kept = sparsifier(delta, density, generator) != 0
    gain = 1 / density if sparsifier.rescales else 1.0
    # At density 1 numbers are kept in float32, so that nothing is lost.
    precision = Precision(None if density == 1.0 else dtype.torch, config.rescale, gain)
    return SparseDelta.from_dense(delta, kept, config.encoding, precision, bias)


def rank_of(config: MediatorSettings, shape: tuple[int, int], density: float) -> int:
    """Rank of a delta (O, I): the configuration's, or the one that goes with its density."""
    return rank_of_density(shape, density) if config.rank is None else min(config.rank, *shape)


def factor_dtype(config: MediatorSettings, density: float) -> torch.dtype:
    """In which the factors of a low-rank delta are stored: float32 where all singular values are kept."""
    return torch.float32 if density == 1.0 and config.rank is None else torch.bfloat16


def own_factors(
    config: MediatorSettings, checkpoint: Checkpoint, name: str, is_transposed: bool
) -> tuple[Tensor, Tensor] | None:
    """The factors (O, r) and (r, I) with which a LoRA expert was trained, where its delta is just their product.

    So it is where the backbone is the base. They are kept in bfloat16 if that loses nothing, else in float32.
    """
    if not SPARSIFIERS[config.sparsifier].is_low_rank or config.merge_method != "base":
        return None
    factors = checkpoint.factors(name)
    if factors is None:
        return None
    left, right = (factors[1].T, factors[0].T) if is_transposed else factors
    halves = [factor.bfloat16() for factor in (left, right)]
    is_exact = all(torch.equal(half.float(), whole) for half, whole in zip(halves, (left, right), strict=True))
    return (halves[0], halves[1]) if is_exact else (left, right)
