"""Routers: one contract, one file and one row each."""

from __future__ import annotations

from .base import Router
from .gaussian import GaussianRouter

ROUTERS: dict[str, type[Router]] = {
    "gaussian": GaussianRouter,
}

__all__ = ["ROUTERS", "Router"]
