"""Merge fine-tuned models of one base into a dense backbone plus sparse experts, routed per prompt by uncertainty."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_with_peft

if TYPE_CHECKING:
    from .api import get_mediator_model, load_mediator
    from .build.offline import build_mediator
    from .build.preflight import BuildPlan, plan_mediator
    from .build.report import BuildReport
    from .build.verify import Verification, verify_mediator
    from .config import MediatorConfig
    from .routing.gate import RouteOutput
    from .settings import MediatorSettings
    from .tuner.layer import MediatorLayer
    from .tuner.model import MediatorModel

register_with_peft()

__version__ = "0.1.0"

__all__ = [
    "BuildPlan",
    "BuildReport",
    "MediatorConfig",
    "MediatorLayer",
    "MediatorModel",
    "MediatorSettings",
    "RouteOutput",
    "Verification",
    "build_mediator",
    "get_mediator_model",
    "load_mediator",
    "plan_mediator",
    "verify_mediator",
]

# Where each name lives. Importing PEFT and transformers takes seconds, so it waits until something needs them.
_HOMES = {
    "BuildPlan": "build.preflight",
    "BuildReport": "build.report",
    "MediatorConfig": "config",
    "MediatorLayer": "tuner.layer",
    "MediatorModel": "tuner.model",
    "MediatorSettings": "settings",
    "RouteOutput": "routing.gate",
    "Verification": "build.verify",
    "build_mediator": "build.offline",
    "get_mediator_model": "api",
    "load_mediator": "api",
    "plan_mediator": "build.preflight",
    "verify_mediator": "build.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
