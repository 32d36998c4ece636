"""The PEFT tuner: routed layers around a backbone. Importing this package registers the method with PEFT."""

from ..registration import register
from .config import MediatorConfig
from .model import MediatorModel
from .peft_entry import extend_peft

__all__ = ["MediatorConfig", "MediatorModel"]

register(MediatorConfig, MediatorModel)
extend_peft()
