"""Routers: one contract, one file and one row each."""

from __future__ import annotations

from .base import Router
from .gaussian import GaussianRouter
from .knn import KnnRouter
from .mlp import MlpRouter
from .prototype import PrototypeRouter

ROUTERS: dict[str, type[Router]] = {
    "gaussian": GaussianRouter,
    "knn": KnnRouter,
    "mlp": MlpRouter,
    "prototype": PrototypeRouter,
}

__all__ = ["ROUTERS", "Router"]
