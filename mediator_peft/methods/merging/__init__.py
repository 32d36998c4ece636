"""Merge methods: how task vectors become the one that is added to the base. One file and one row each."""

from __future__ import annotations

from .average import AVERAGE
from .base import BASE
from .row import MergeMethod, Parameter, TensorContext, TensorMethod, TensorView
from .task_arithmetic import TASK_ARITHMETIC
from .ties import TIES

__all__ = ["MERGE_METHODS", "MergeMethod", "Parameter", "TensorContext", "TensorMethod", "TensorView"]

MERGE_METHODS: dict[str, MergeMethod] = {
    "average": AVERAGE,
    "base": BASE,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
}
