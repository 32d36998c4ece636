"""Routers: one contract, one file and one row each."""

from __future__ import annotations

from .base import Router
from .gaussian import GaussianRouter
from .knn import KnnRouter
from .mlp import MlpRouter
from .prototype import PrototypeRouter
from .spectral import SpectralRouter

ROUTERS: dict[str, type[Router]] = {
    "gaussian": GaussianRouter,
    "knn": KnnRouter,
    "mlp": MlpRouter,
    "prototype": PrototypeRouter,
}
"""Routers that are fitted on texts."""

DELTA_ROUTERS: dict[str, type[SpectralRouter]] = {"spectral": SpectralRouter}
"""Routers that are made from the experts' deltas, without texts."""

__all__ = ["DELTA_ROUTERS", "ROUTERS", "Router", "SpectralRouter"]
