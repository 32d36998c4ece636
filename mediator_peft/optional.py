"""Optional packages: imported where they are used, with an error that says what to install."""

from __future__ import annotations

import logging
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


def quiet_missing_kernel() -> None:
    """Report at the level INFO that bitsandbytes found no CPU kernel for 4-bit products; it warns at each import.

    PEFT imports bitsandbytes wherever it is installed, so the warning came with every start, though the kernel is
    optional, serves 4-bit layers alone, and is replaced by an own product of bitsandbytes. Other records pass.
    """
    logger = logging.getLogger(_KERNEL_LOGGER)
    if not any(isinstance(item, _MissingKernel) for item in logger.filters):
        logger.addFilter(_MissingKernel())


_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"


class _MissingKernel(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"):
            return True
        record.levelno, record.levelname = logging.INFO, "INFO"
        return logging.getLogger(_KERNEL_LOGGER).isEnabledFor(logging.INFO)
