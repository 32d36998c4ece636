"""Baselines: published ways to keep several experts of one base, to compare with. One file and one row each."""

from __future__ import annotations

from .bitdelta import BITDELTA
from .delta_come import DELTA_COME
from .emr import EMR
from .experts import EXPERTS
from .row import Baseline, Bits
from .t_switch import T_SWITCH
from .tall import TALL
from .twin import TWIN

__all__ = ["BASELINES", "Baseline", "Bits"]

BASELINES: dict[str, Baseline] = {
    "experts": EXPERTS,
    "emr": EMR,
    "tall": TALL,
    "bitdelta": BITDELTA,
    "delta-come": DELTA_COME,
    "t-switch": T_SWITCH,
    "twin": TWIN,
}
"""Name → how an expert comes back. None of them has a router of its own here; see ``evaluation.baselines``."""
