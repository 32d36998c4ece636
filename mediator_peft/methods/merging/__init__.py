"""Merge methods: how task vectors become the one that is added to the base. One file and one row each."""

from __future__ import annotations

from .average import AVERAGE
from .base import BASE
from .consensus import CONSENSUS
from .consensus_ties import CONSENSUS_TIES
from .dare import DARE
from .dare_ties import DARE_TIES
from .karcher import KARCHER
from .row import MergeMethod, Parameter, TensorContext, TensorMethod, TensorView
from .slerp import SLERP
from .task_arithmetic import TASK_ARITHMETIC
from .ties import TIES
from .weighted import WEIGHTED
from .widen import WIDEN

__all__ = ["MERGE_METHODS", "MergeMethod", "Parameter", "TensorContext", "TensorMethod", "TensorView"]

MERGE_METHODS: dict[str, MergeMethod] = {
    "average": AVERAGE,
    "base": BASE,
    "consensus": CONSENSUS,
    "consensus_ties": CONSENSUS_TIES,
    "dare": DARE,
    "dare_ties": DARE_TIES,
    "karcher": KARCHER,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "weighted": WEIGHTED,
    "widen": WIDEN,
}
