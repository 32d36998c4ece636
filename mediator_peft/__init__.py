"""Merge fine-tuned models of one base into a dense backbone plus sparse experts, routed per prompt by uncertainty."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .optional import quiet_missing_kernel
from .registration import register_with_peft

if TYPE_CHECKING:
    from .config import MediatorSettings
    from .merge.offline import build_mediator
    from .merge.plain_merge import MergeReport, merge_models
    from .merge.preflight import BuildPlan, plan_mediator
    from .merge.report import BuildReport
    from .merge.verify import Verification, verify_mediator
    from .registry import register_method
    from .routing.gate import RouteOutput
    from .tuner.config import MediatorConfig
    from .tuner.layer import MediatorLayer
    from .tuner.loading import get_mediator_model, load_mediator
    from .tuner.model import MediatorModel

register_with_peft()
quiet_missing_kernel()

__version__ = "0.2.0.dev0"

__all__ = [
    "BuildPlan",
    "BuildReport",
    "MediatorConfig",
    "MediatorLayer",
    "MediatorModel",
    "MediatorSettings",
    "MergeReport",
    "RouteOutput",
    "Verification",
    "build_mediator",
    "get_mediator_model",
    "load_mediator",
    "merge_models",
    "plan_mediator",
    "register_method",
    "verify_mediator",
]

# Where each name lives. Importing PEFT and transformers takes seconds, so it waits until something needs them.
_HOMES = {
    "BuildPlan": "merge.preflight",
    "BuildReport": "merge.report",
    "MediatorConfig": "tuner.config",
    "MediatorLayer": "tuner.layer",
    "MediatorModel": "tuner.model",
    "MediatorSettings": "config",
    "MergeReport": "merge.plain_merge",
    "RouteOutput": "routing.gate",
    "Verification": "merge.verify",
    "build_mediator": "merge.offline",
    "get_mediator_model": "tuner.loading",
    "load_mediator": "tuner.loading",
    "merge_models": "merge.plain_merge",
    "plan_mediator": "merge.preflight",
    "register_method": "registry",
    "verify_mediator": "merge.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
