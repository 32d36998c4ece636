"""Compiled twins of the inner loops of a build; without numba the same bytes come from numpy and torch, slower."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType


@cache
def compiled() -> ModuleType | None:
    """The loops; None where numba is missing or switched off. The first call imports it."""
    if sys.byteorder != "little":
        return None
    try:
        from . import llvm_build_loops as loops_numba
    except ImportError:
        return None
    return loops_numba
