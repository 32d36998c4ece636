"""Weights after quantization and dequantization by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..deferred import torch
from ..optional import bitsandbytes_functional

if TYPE_CHECKING:
    from torch import Tensor


def round_to_nf4(weight: Tensor) -> Tensor:
    """Four bits by quantiles of a normal distribution, a scale for every 64 weights."""
    return _four_bits(weight, "nf4")


def round_to_fp4(weight: Tensor) -> Tensor:
    """Four bits as floating point, a scale for every 64 weights."""
    return _four_bits(weight, "fp4")


def round_to_int8(weight: Tensor) -> Tensor:
    """Eight bits, a scale a row, as LLM.int8() (https://arxiv.org/abs/2208.07339) stores weights."""
    functional = bitsandbytes_functional("quantisation")
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return functional.int8_vectorwise_dequant(codes, scales).float()


def _four_bits(weight: Tensor, kind: str) -> Tensor:
    functional = bitsandbytes_functional("quantisation")
    codes, state = functional.quantize_4bit(weight.contiguous(), quant_type=kind)
    return functional.dequantize_4bit(codes, state).float()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": round_to_nf4,
    "fp4": round_to_fp4,
    "int8": round_to_int8,
}
"""Name → function: weight (O, I) in its storage dtype → (O, I) float32."""
