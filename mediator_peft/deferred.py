"""torch, imported when it is first used: it takes longer than everything else that a build needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

_waiting: list[Callable[[], None]] = []


class _Deferred:
    """Stands for a module until it is needed."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = import_module(self._module)
        while _waiting:
            with suppress(IndexError):  # another thread may be faster
                _waiting.pop(0)()
        # Kept, so that the next look-up is an ordinary one.
        found = self.__dict__[name] = getattr(module, name)
        return found


if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch, nn = _Deferred("torch"), _Deferred("torch.nn")

__all__ = ["forget", "nn", "torch", "when_used"]


def when_used(action: Callable[[], None]) -> None:
    """Call an action before torch is next used by a module that has it from here: at once where it is loaded."""
    if "torch" in sys.modules:
        action()
    else:
        _waiting.append(action)


def forget(action: Callable[[], None]) -> None:
    """Do not call it any more."""
    if action in _waiting:
        _waiting.remove(action)
