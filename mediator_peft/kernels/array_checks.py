"""What arrays must be like before their addresses are given to the native kernels."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .numpy_kernels import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@cache
def stored_as(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of :func:`as_array` for a tensor's: bfloat16 is seen as its bits."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(np.uint16) if name == "bfloat16" else np.dtype(name)


def check(name: str, array: Array | Tensor, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...]) -> None:
    """Refuse what the native kernels cannot read: they know nothing but an address.

    Raises:
        ValueError: dtype, shape or layout is another.
    """
    if isinstance(array, np.ndarray):
        fits = array.dtype in dtypes and array.flags.c_contiguous and array.flags.aligned
    else:
        fits = stored_as(array.dtype) in dtypes and array.is_contiguous() and array.device.type == "cpu"
    if not fits or tuple(array.shape) != shape:
        names = " or ".join(dtype.name for dtype in dtypes)
        raise ValueError(
            f"{name} must be an aligned, contiguous {names} array {shape}, got {array.dtype} {tuple(array.shape)}."
        )


def check_writable(name: str, array: Array, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...]) -> None:
    """The same, of what is written.

    Raises:
        ValueError: dtype, shape or layout is another, or the array is read-only.
    """
    check(name, array, dtypes, shape)
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only.")
