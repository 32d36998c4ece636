"""Merge methods: how task vectors become the one that is added to the base."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .average import average
from .base import keep_base
from .task_arithmetic import task_arithmetic
from .ties import ties

MergeMethod = Callable[[Tensor], Tensor]
"""Task vectors (K, *shape), float32 → merged task vector (*shape)."""

MERGE_METHODS: dict[str, MergeMethod] = {
    "average": average,
    "base": keep_base,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
}

ENTRYWISE = frozenset({"average", "base", "task_arithmetic"})
"""Methods whose result for an entry depends on that entry alone: large tensors can be merged a few rows at a time."""
