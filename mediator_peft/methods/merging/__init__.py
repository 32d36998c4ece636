"""Merge methods: how task vectors become the one that is added to the base. One file and one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .average import average
from .base import keep_base
from .task_arithmetic import task_arithmetic
from .ties import ties


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge task vectors; a row of ``MERGE_METHODS``."""

    merge: Callable[[Tensor], Tensor]
    """Task vectors (K, *shape), float32 → merged task vector (*shape)."""

    is_entrywise: bool = False
    """Whether an entry of the result depends on that entry of the task vectors alone: then a large tensor is merged a
    few rows at a time; otherwise whole tensors are held in memory."""

    def __call__(self, task_vectors: Tensor) -> Tensor:
        """``merge(task_vectors)``."""
        return self.merge(task_vectors)


MERGE_METHODS: dict[str, MergeMethod] = {
    "average": MergeMethod(average, is_entrywise=True),
    "base": MergeMethod(keep_base, is_entrywise=True),
    "task_arithmetic": MergeMethod(task_arithmetic, is_entrywise=True),
    "ties": MergeMethod(ties),
}
