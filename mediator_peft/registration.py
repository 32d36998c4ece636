"""Making PEFT know the method. The one place that touches PEFT's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.utils import PeftType

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

METHOD = "mediator"
PREFIX = "mediator_"


def peft_type() -> PeftType:
    """PEFT's member for this method.

    ``register_peft_method`` accepts members of the enumeration only, and PEFT reads ``.value`` of them in places, so a
    plain string in its tables is not enough: the enumeration gets one member more, unless PEFT has one of its own.
    """
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter config and tuner into PEFT's tables, once."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
