"""Making PEFT know the method. The one place that touches PEFT's tables.

``import mediator_peft`` is enough for ``PeftModel.from_pretrained`` to load an adapter, and yet does not import PEFT,
which takes seconds: a build needs none of it. If PEFT is there already, the method is registered at once; otherwise as
soon as anybody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import PeftType

METHOD = "mediator"
PREFIX = "mediator_"


def peft_type() -> PeftType:
    """PEFT's member for this method.

    ``register_peft_method`` accepts members of the enumeration only, and PEFT reads ``.value`` of them in places, so a
    plain string in its tables is not enough: the enumeration gets one member more, unless PEFT has one of its own.
    """
    from peft.utils import PeftType

    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        # From Python 3.12 on, members are attributes of the class and no longer looked up among the names.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter config and tuner into PEFT's tables, once."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)


def register_with_peft() -> None:
    """Register now if PEFT has been imported, else when it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    # If a module of ours imported PEFT, the tuner package is half imported now: its last line registers then.
    if f"{__package__}.tuner" not in sys.modules:
        import_module(f"{__package__}.tuner")


class _WhenImported(MetaPathFinder):
    """Stands in front of the other finders until somebody imports PEFT."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads a module as its own loader does, and registers the method."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is what it would be without us.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
