"""Predicts the memory of a build and chooses the number of workers within a limit."""

from __future__ import annotations

import re
import sys
from math import prod
from pathlib import Path

from ..errors import ConfigError, OutOfMemoryError
from ..methods.merging import MERGE_METHODS
from ..methods.merging.row import LINEAR
from .builder import peak_memory
from .merge_job import Merge
from .tensor_work import Task, is_one_pass
from .tiles import FUSED_TILES, TILE_ENTRIES, is_fused

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}

# Bytes an entry: three bitmaps, and candidates for the smallest kept entry.
_SELECTION = 0.375 + 0.45
# What libraries load when they are first used, and what the allocator keeps of buffers of many sizes.
_KEPT_BYTES = 80_000_000
# What torch takes once it is loaded.
_TORCH_BYTES = 200_000_000
# While one selection is settled: a byte an entry, and positions of kept ones.
_SETTLING = 3.5


def parse_bytes(size: int | str | None) -> int | None:
    """``"4GiB"``, ``"500 MB"`` or a number of bytes.

    Raises:
        ConfigError: anything else.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if isinstance(size, bool) or not found or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"max_memory {size!r} is no size. Write it like '4GiB', '500MB' or as a number of bytes.")
    try:
        return int(float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        raise ConfigError(f"max_memory {str(size)[:20]!r}… is more than any machine has.") from None


def task_memory(merge: Merge, task: Task) -> int:
    """Bytes that merging one tensor takes at most, beside the process itself."""
    config, num_experts = merge.config, len(merge.config.experts)
    shape = merge.job.base.tensors[task.name].shape
    entries = prod(shape)
    row = entries // max(1, shape[0]) if shape else 1
    if is_fused(merge.method.of_tensor(task.name, task.is_transposed)):
        # Rows as they are read and as they are stored, of base, experts and backbone.
        tile = max(min(entries, FUSED_TILES * TILE_ENTRIES), row) * (4 + merge.job.dtype.itemsize) * (num_experts + 3)
    else:
        tile = 4 * max(TILE_ENTRIES, row) * (2 * num_experts + 11)
    is_fast = is_one_pass(config)
    num_selections = num_experts * task.measure + (num_experts + 1) * (task.density is not None and is_fast)
    work = entries * (_SELECTION * num_selections + _SETTLING * (num_selections > 0))
    if task.density is not None and not is_fast:
        work += entries * 4 * 4
    if task.is_transposed:
        work += entries * merge.job.dtype.itemsize * (num_experts + 3)
    row_of_table = MERGE_METHODS[config.merge_method]
    if not row_of_table.is_entrywise:
        # Task vectors and base, and the pages of the files that were read for them.
        work += entries * (4 + merge.job.dtype.itemsize) * (num_experts + 1)
    context = merge.method.contexts.get(task.name)
    is_linear = context is not None and context.kind == LINEAR and len(shape) == 2
    sides = (row, entries // max(1, row)) if task.is_transposed else (entries // max(1, row), row)
    work += 4 * row_of_table.work_numbers(num_experts, *sides, is_linear)
    held = sum(checkpoint.held_bytes(task.name) for checkpoint in (merge.job.base, *merge.job.experts.values()))
    return int(tile + work + held)


def predicted_memory(merge: Merge, workers: int = 1) -> int:
    """Bytes of all processes together, with what this one holds already."""
    largest = max(task_memory(merge, task) for task in merge.tasks)
    coming = _TORCH_BYTES if "torch" not in sys.modules and merge.needs_torch else 0
    return workers * (resident_memory() + largest + _KEPT_BYTES + coming)


def workers_within(merge: Merge, workers: int, max_memory: int | None) -> int:
    """As many of the wanted workers as fit into the limit.

    Raises:
        OutOfMemoryError: not even one does.
    """
    if max_memory is None:
        return workers
    need = predicted_memory(merge)
    if need > max_memory:
        largest = max(merge.tasks, key=lambda task: task_memory(merge, task))
        raise OutOfMemoryError(
            f"max_memory is {max_memory / 1e9:.2f} GB; this build needs about {need / 1e9:.2f} GB, most of it for "
            f"{largest.name!r}. Allow more; encoding='sign', sparsifier='magnitude' and an entrywise merge method need "
            "the least."
        )
    return max(1, min(workers, max_memory // need))


def resident_memory() -> int:
    """Resident memory of this process now, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory()
