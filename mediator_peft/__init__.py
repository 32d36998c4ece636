"""Merge fine-tuned models of one base into a dense backbone plus sparse experts, routed per prompt by uncertainty."""

from .api import get_mediator_model, load_mediator
from .build.offline import build_mediator
from .build.report import BuildReport
from .config import MediatorConfig
from .registration import register
from .routing.gate import RouteOutput
from .tuner.layer import MediatorLayer
from .tuner.model import MediatorModel

register(MediatorConfig, MediatorModel)

__version__ = "0.1.0"

__all__ = [
    "BuildReport",
    "MediatorConfig",
    "MediatorLayer",
    "MediatorModel",
    "RouteOutput",
    "build_mediator",
    "get_mediator_model",
    "load_mediator",
]
