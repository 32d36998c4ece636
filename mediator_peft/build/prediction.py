"""Bytes of a build, from shapes alone."""

from __future__ import annotations

from math import prod

import numpy as np

from ..bank.values import VALUES
from .builder import Merge
from .checkpoints import FolderCheckpoint
from .tensor_work import deltas_needed
from .writing import side_files_size

# Configuration, report and card, and what a tensor, a block and a part of a delta add to headers and reports.
_FIXED_BYTES, _BYTES_A_TENSOR, _BYTES_A_BLOCK, _BYTES_A_PART = 14_000, 150, 500, 140

_SEEN_BITS = (
    (0.0, 0.0), (0.0005, 0.012), (0.001, 0.016), (0.002, 0.039), (0.005, 0.0835), (0.01, 0.143), (0.02, 0.228),
    (0.03, 0.286), (0.05, 0.367), (0.07, 0.428), (0.1, 0.506), (0.15, 0.624), (0.2, 0.735), (0.3, 0.887), (0.4, 0.975),
    (0.5, 1.0), (0.6, 0.975), (0.7, 0.887), (0.8, 0.735), (0.85, 0.624), (0.9, 0.506), (0.95, 0.367), (0.98, 0.228),
    (0.99, 0.143), (1.0, 0.0),
)  # fmt: skip


def predicted_bytes(merge: Merge) -> int:
    """Bytes of the whole output, taking every block that may be routed for routed."""
    return backbone_bytes(merge) + adapter_bytes(merge) + side_bytes(merge)


def backbone_bytes(merge: Merge) -> int:
    """Bytes of the backbone's weights."""
    job = merge.job
    return job.dtype.itemsize * sum(prod(job.base.tensors[name].shape) for name in job.names)


def side_bytes(merge: Merge) -> int:
    """Bytes of headers, settings, reports, and the files copied from the base."""
    base = merge.job.base
    copied = side_files_size(base.folder) if isinstance(base, FolderCheckpoint) else 0
    return (
        _FIXED_BYTES + copied + _BYTES_A_TENSOR * len(merge.job.names) + _BYTES_A_BLOCK * merge.job.structure.num_blocks
    )


def adapter_bytes(merge: Merge, routed: frozenset[int] | None = None) -> int:
    """Bytes of the adapter's weights.

    Args:
        merge: the work.
        routed: blocks that will be routed; None for all that may be.
    """
    config, itemsize = merge.config, merge.job.dtype.itemsize
    total = 0.0
    for task in merge.tasks:
        if task.density is None or (
            routed is not None and merge.blocks[task.name.removesuffix(".weight")] not in routed
        ):
            continue
        shape = merge.job.base.tensors[task.name].shape
        outputs = shape[1] if task.is_transposed else shape[0]
        parts = 1 + len(VALUES[config.values].part_names) + (task.bias is not None)
        besides = _BYTES_A_PART * parts + (4 * outputs if task.bias else 0)
        densities = [task.density] * len(deltas_needed(config))
        if config.for_quantization is not None:
            densities.append(config.correction_density)
        for density in densities:
            total += delta_bytes(prod(shape), outputs, density, config.values, itemsize) + besides
    return int(total)


def delta_bytes(entries: int, outputs: int, density: float, values: str, itemsize: int) -> float:
    """Bytes on disk of one packed delta: an entropy-coded bitmap, and the kept values."""
    bitmap = entries * _coded_bits(density) / 8
    kept = density * entries
    if values == "sign":
        return bitmap + kept / 8 + 4 * outputs
    if values in ("int8", "nf4"):
        return bitmap + kept * (1 if values == "int8" else 0.5) + 4 * kept / 64
    return bitmap + kept * (4 if density == 1.0 else itemsize)


def _coded_bits(density: float) -> float:
    """Bits an entry of a random bitmap after compression, between the densities that were tried."""
    densities, bits = zip(*_SEEN_BITS, strict=True)
    return float(np.interp(density, densities, bits))
