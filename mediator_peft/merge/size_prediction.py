"""Predicts the bytes of a build from shapes and samples."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.adapter_files import bank_key
from ..checkpoints.output_folder import side_files_size
from ..config import ALWAYS_PREFIX, CORRECTION, FALLBACK_EXPERT
from ..methods.encoding import ENCODINGS
from ..methods.sparsifying import SPARSIFIERS
from .delta_packing import factor_dtype, own_factors, rank_of
from .family_packing import residual_density
from .merge_job import Merge
from .tensor_work import Task, deltas_stored

# Configuration, report and card, and what a tensor and a block add to headers and reports.
_FIXED_BYTES, _BYTES_A_TENSOR, _BYTES_A_BLOCK = 14_000, 150, 500
# Of a part of a delta in the header of the file: its name, and all else.
_BYTES_BESIDE_NAME = 67

# Of what uneven positions spare by their entropy, the share that is spared on the disk: by gaps, and by a bitmap.
_SPARED_BY_GAPS, _SPARED_BY_BITMAP, _MOST_GAPS = 0.8, 0.3, 0.08

_THIN, _TABLE_BYTES = 0.045, 60
"""Below this density the compressor writes a table of some bytes for the gaps of each mask."""

# Bits an entry of random positions, in the shorter of their two forms.
_SEEN_BITS = (
    (0.0, 0.0), (0.0005, 0.0091), (0.001, 0.0151), (0.002, 0.0239), (0.005, 0.0465), (0.01, 0.0826), (0.02, 0.1433),
    (0.03, 0.1963), (0.05, 0.2903), (0.07, 0.3706), (0.1, 0.4751), (0.12, 0.5354), (0.15, 0.6211), (0.2, 0.7351),
    (0.25, 0.8181), (0.3, 0.8875), (0.4, 0.9754), (0.5, 1.0), (0.6, 0.975), (0.7, 0.887), (0.8, 0.735), (0.85, 0.624),
    (0.9, 0.506), (0.95, 0.367), (0.98, 0.228), (0.99, 0.143), (1.0, 0.0),
)  # fmt: skip
_SEEN_CURVE = tuple(np.array(_SEEN_BITS).T)


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
    copied = 0 if base.folder is None else side_files_size(base.folder)
    return (
        _FIXED_BYTES
        + copied
        + _BYTES_A_TENSOR * len(merge.job.stored)
        + _BYTES_A_BLOCK * merge.job.structure.num_blocks
    )


def adapter_bytes(merge: Merge, routed: frozenset[int] | None = None) -> int:
    """Bytes of the adapter's weights.

    Args:
        merge: the work.
        routed: blocks that will be routed; None for all that may be.
    """
    total, columns = 0.0, _columns(merge)
    for task in merge.tasks:
        if task.density is None or (
            routed is not None and merge.blocks[task.name.removesuffix(".weight")] not in routed
        ):
            continue
        bias_bytes = 4 * _shape(merge, task)[0] if task.bias else 0
        parts = ["mask", *ENCODINGS[merge.config.encoding].part_names, *(["bias"] if task.bias else [])]
        layer = task.name.removesuffix(".weight")
        for column in columns:
            names = sum(len(bank_key(layer, f"{column}:{part}")) + _BYTES_BESIDE_NAME for part in parts)
            total += _column_bytes(merge, task, column) + bias_bytes + names
    return int(total)


def _columns(merge: Merge) -> list[str]:
    """Names of all deltas that will be stored, shared and always-on ones among them."""
    groups = merge.groups
    own = [column for column in deltas_stored(merge.config) if column not in groups.aliases]
    return [*groups.families, *own, *(ALWAYS_PREFIX + name for name in merge.job.always)]


def _shape(merge: Merge, task: Task) -> tuple[int, int]:
    """(O, I) of a matrix."""
    shape = merge.job.base.tensors[task.name].shape
    rows, columns = shape[0], prod(shape[1:])
    return (columns, rows) if task.is_transposed else (rows, columns)


def _column_bytes(merge: Merge, task: Task, column: str) -> float:
    """Bytes on disk of one delta."""
    config, shape, itemsize = merge.config, _shape(merge, task), merge.job.dtype.itemsize
    if column == CORRECTION:
        return delta_bytes(prod(shape), shape[0], config.correction_density, config.encoding, itemsize)
    # What is shared, a residual or always on was not sampled: its positions count as random ones.
    is_residual = column in merge.groups.members
    magnitudes = None if is_residual else merge.samples.get(task.name, {}).get(column)
    is_own = column in merge.job.experts or column == FALLBACK_EXPERT
    density = task.density_of(column) if is_own else task.density or 0.0
    density = residual_density(density) if is_residual else density
    nonzero = 1.0 if magnitudes is None else 1 - int(np.searchsorted(magnitudes, 0, "right")) / magnitudes.size
    if SPARSIFIERS[config.sparsifier].is_low_rank:
        checkpoint = merge.job.base if column == FALLBACK_EXPERT else merge.job.experts[column]
        factors = own_factors(config, checkpoint, task.name, task.is_transposed)
        if factors is not None:
            return sum(factor.nbytes for factor in factors)
        rank = rank_of(config, shape, density) if nonzero else 1
        return rank * sum(shape) * factor_dtype(config, density).itemsize
    number_size = 4 if density == 1.0 else itemsize
    if config.sparsifier != "magnitude":
        return delta_bytes(prod(shape), shape[0], density * nonzero, config.encoding, number_size)
    density = min(density, nonzero)
    bits = None if magnitudes is None else _uneven_bits(density, magnitudes)
    return delta_bytes(prod(shape), shape[0], density, config.encoding, number_size, bits)


def delta_bytes(
    entries: int, outputs: int, density: float, encoding: str, number_size: int, position_bits: float | None = None
) -> float:
    """Bytes on disk of one packed delta: entropy-coded positions, and the kept values.

    Args:
        entries: of the matrix.
        outputs: rows of the matrix.
        density: share of entries kept.
        encoding: a key of ``ENCODINGS``.
        number_size: bytes of a number that is kept as it is.
        position_bits: bits an entry that positions take; None for random ones.
    """
    whole = ENCODINGS[encoding].total_bytes(entries, density * entries)
    if whole is not None:
        return whole
    positions = entries * (_coded_bits(density) if position_bits is None else position_bits) / 8
    if 0 < density < _THIN:
        positions += _TABLE_BYTES
    kept = density * entries
    return positions + ENCODINGS[encoding].value_bytes(kept, outputs, number_size)


def _uneven_bits(density: float, magnitudes: NDArray[np.float32]) -> float:
    """Bits an entry of the positions of the largest entries, by a sample of them.

    Where many magnitudes are equal, as between weights of 16 bits, those at the edge are kept in the first rows alone:
    the mask is denser there, and takes less room.
    """
    size, plain = magnitudes.size, _coded_bits(density)
    edge = magnitudes[min(size - 1, max(0, int((1 - density) * size)))]
    low, high = (int(np.searchsorted(magnitudes, edge, side)) for side in ("left", "right"))
    above, equal = (size - high) / size, (high - low) / size
    first = min(1.0, max(0.0, (density - above) / equal))
    uneven = first * _coded_bits(above + equal) + (1 - first) * _coded_bits(above)
    return plain - (_SPARED_BY_GAPS if density < _MOST_GAPS else _SPARED_BY_BITMAP) * max(0.0, plain - uneven)


def _coded_bits(density: float) -> float:
    """Bits an entry of random positions on disk, between the densities that were tried."""
    return float(np.interp(density, *_SEEN_CURVE))
