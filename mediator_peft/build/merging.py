"""What happens to one tensor: difference, conflict, merge, sparse deltas. No files, no order, no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ..bank.sparse_delta import SparseDelta
from ..config import FALLBACK_EXPERT, MediatorConfig
from ..errors import CheckpointError
from ..methods.conflict import CONFLICT_SCORES
from ..methods.merging import MERGE_METHODS
from ..methods.sparsifying import SPARSIFIERS
from ..methods.sparsifying.magnitude import largest_mask
from .checkpoints import Checkpoint


class MergedTensor(NamedTuple):
    """What one tensor became."""

    backbone: Tensor
    """(*shape) in the storage dtype."""

    counts: dict[str, Tensor]
    """Conflict score name → counts; empty where conflict is not measured."""

    task_vectors: Tensor
    """(K, *shape) float32, experts in the order of their sorted names."""

    base: Tensor
    """(*shape) float32, the base rounded to the storage dtype."""


def read_checked(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a checkpoint.

    Raises:
        CheckpointError: it holds NaN or infinity, or cannot be read.
    """
    try:
        tensor = checkpoint.read(name)
    except Exception as fault:
        raise CheckpointError(f"{checkpoint.label} ({checkpoint.source}): cannot read {name!r}: {fault}") from fault
    # A sum is finite only if every term is; it costs one pass and no copy.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        num_bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{checkpoint.label} ({checkpoint.source}): tensor {name!r} holds {num_bad} NaN or infinite values. "
            "Its fine-tuning diverged or the file is damaged; leave this expert out or save it again."
        )
    return tensor


def merge_tensor(
    name: str,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    config: MediatorConfig,
    dtype: torch.dtype,
    measure_conflict: bool,
) -> MergedTensor:
    """Read one tensor of all checkpoints; merge it into the backbone and count conflict.

    Differences are taken between weights of one storage dtype: the base, and experts of a finer dtype, are first
    rounded to ``dtype``. Experts are taken in the order of their names, so that their given order changes nothing.
    """
    base_weight = read_checked(base, name).to(dtype).float()
    weights = [read_checked(experts[expert], name).to(dtype).float() for expert in sorted(experts)]
    task_vectors = torch.stack(weights).sub_(base_weight)
    merged = MERGE_METHODS[config.merge_method](task_vectors)
    backbone = (base_weight + merged).to(dtype)
    counts = {}
    if measure_conflict:
        flat = task_vectors.flatten(1)
        signs = torch.stack(
            [row.sign().mul_(largest_mask(row, config.conflict_density)).to(torch.int8) for row in flat]
        )
        counts = {key: score.counts(flat, signs) for key, score in CONFLICT_SCORES.items()}
    return MergedTensor(backbone, counts, task_vectors, base_weight)


def deltas_to_backbone(merged: MergedTensor, expert_names: list[str], with_base: bool) -> dict[str, Tensor]:
    """What each expert (and the base) adds to the rounded backbone: name → (*shape) float32."""
    to_base = merged.base - merged.backbone.float()
    deltas = {name: merged.task_vectors[row] + to_base for row, name in enumerate(sorted(expert_names))}
    # In the order of the columns.
    ordered = {name: deltas[name] for name in expert_names}
    return {**ordered, FALLBACK_EXPERT: to_base} if with_base else ordered


def sparsify(
    name: str, delta: Tensor, bias: Tensor | None, expert: str, config: MediatorConfig, storage: torch.dtype
) -> SparseDelta:
    """Thin out and pack one expert's delta of one matrix.

    Args:
        name: the tensor's name; with the expert's name and the seed it fixes whatever is drawn.
        delta: (O, I) float32
        bias: (O,) float32 or None
        expert: whose delta this is.
        config: sparsifier, density, values, seed.
        storage: dtype of the checkpoints. Values kept as numbers are stored in it, and in float32 at density 1, so
            that nothing is lost there.
    """
    generator = torch.Generator().manual_seed(crc32(f"{config.seed}/{name}/{expert}".encode()))
    kept = SPARSIFIERS[config.sparsifier](delta, config.density, generator) != 0
    exact = config.density == 1.0
    return SparseDelta.from_dense(delta, kept, config.values, None if exact else storage, bias)


def deltas_needed(config: MediatorConfig) -> list[str]:
    """Columns that have a delta: the base has none where the backbone is the base."""
    if config.merge_method == "base":
        return [name for name in config.columns if name != FALLBACK_EXPERT]
    return config.columns
