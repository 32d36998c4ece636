"""Optional packages: imported where they are used, with an error that says what to install."""

from __future__ import annotations

from typing import Any

from .errors import MissingPackageError


def bitsandbytes_functional(wanted_for: str) -> Any:
    """The module ``bitsandbytes.functional``.

    Args:
        wanted_for: what needs it; the message begins with it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError:
        raise MissingPackageError(f"{wanted_for} needs bitsandbytes: pip install 'mediator_peft[bnb]'") from None
    return functional
