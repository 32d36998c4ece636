"""Merge fine-tuned models of one base into a dense backbone plus sparse experts, routed per prompt by uncertainty."""

from .api import get_mediator_model, load_mediator
from .build.offline import build_mediator
from .build.preflight import BuildPlan, plan_mediator
from .build.report import BuildReport
from .build.verify import Verification, verify_mediator
from .config import MediatorConfig
from .registration import register
from .routing.gate import RouteOutput
from .tuner.layer import MediatorLayer
from .tuner.model import MediatorModel

register(MediatorConfig, MediatorModel)

__version__ = "0.1.0"

__all__ = [
    "BuildPlan",
    "BuildReport",
    "MediatorConfig",
    "MediatorLayer",
    "MediatorModel",
    "RouteOutput",
    "Verification",
    "build_mediator",
    "get_mediator_model",
    "load_mediator",
    "plan_mediator",
    "verify_mediator",
]
