"""Merge methods: how task vectors become the one that is added to the base. One file and one row each."""

from __future__ import annotations

from .average import AVERAGE
from .base import BASE
from .consensus import CONSENSUS
from .consensus_ties import CONSENSUS_TIES
from .dare import DARE
from .dare_ties import DARE_TIES
from .doge import DOGE
from .fisher import FISHER_ROW
from .karcher import KARCHER
from .opcm import OPCM
from .ota import OTA
from .pcb import PCB
from .regmean import REGMEAN
from .row import MergeMethod, Parameter, TensorContext, TensorMethod, TensorView
from .slerp import SLERP
from .task_arithmetic import TASK_ARITHMETIC
from .ties import TIES
from .tsv import TSV
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
    "doge": DOGE,
    "fisher": FISHER_ROW,
    "karcher": KARCHER,
    "opcm": OPCM,
    "ota": OTA,
    "pcb": PCB,
    "regmean": REGMEAN,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "tsv": TSV,
    "weighted": WEIGHTED,
    "widen": WIDEN,
}
