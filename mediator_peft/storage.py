"""Floating-point types of stored weights, and weights of these types as numpy arrays.

numpy has no bfloat16: an array of it is one of uint16 with the same bits. Stored weights are never of integers, so that
an array's dtype says what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class FloatType:
    """One floating-point type."""

    name: str
    """As torch and ``config.json`` call it."""

    code: str
    """As the safetensors format calls it."""

    array: np.dtype[Any]
    """Of arrays that hold it."""

    num_digits: int
    """Binary digits of its significand."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.array.itemsize

    @property
    def torch(self) -> torch.dtype:
        """The same type of torch."""
        found: torch.dtype = getattr(torch, self.name)
        return found

    def __str__(self) -> str:
        return self.name


BFLOAT16 = FloatType("bfloat16", "BF16", np.dtype(np.uint16), 8)
FLOAT16 = FloatType("float16", "F16", np.dtype(np.float16), 11)
FLOAT32 = FloatType("float32", "F32", np.dtype(np.float32), 24)
FLOAT64 = FloatType("float64", "F64", np.dtype(np.float64), 53)

FLOAT_TYPES = {kind.code: kind for kind in (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)}
"""By their safetensors names."""

CODES = {"U8": np.dtype(np.uint8), **{code: kind.array for code, kind in FLOAT_TYPES.items()}}
"""safetensors name → dtype of arrays, of every type that the library writes."""


def code_of(array: Array) -> str:
    """What safetensors calls the type of an array's numbers."""
    return next(code for code, dtype in CODES.items() if dtype == array.dtype)


def float_type(dtype: torch.dtype) -> FloatType | None:
    """The type that torch calls so; None for anything but plain floating point."""
    return next((kind for kind in FLOAT_TYPES.values() if str(dtype) == f"torch.{kind.name}"), None)


def to_tensor(array: Array) -> Tensor:
    """An array as a tensor that shares its memory; uint16 is bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16.array else tensor


def as_array(tensor: Array | Tensor) -> Array:
    """A tensor on the CPU as an array that shares its memory; bfloat16 is uint16. Arrays stay."""
    if isinstance(tensor, np.ndarray):
        return tensor
    plain = tensor.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def widened(values: Array) -> NDArray[np.float32]:
    """Numbers as float32.

    Args:
        values: (*shape) float32, float16 or uint16 (the bits of bfloat16).
    """
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def narrowed(values: NDArray[np.float32], dtype: Any) -> Array:
    """Float32 rounded to nearest even.

    Args:
        values: (*shape)
        dtype: float32, float16 or uint16 (the bits of bfloat16).
    """
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
