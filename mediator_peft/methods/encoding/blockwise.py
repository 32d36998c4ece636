"""Kept entries as 8- or 4-bit codes with one scale per block of 64, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...deferred import torch
from ...optional import bitsandbytes_functional
from .base import Encoding, Parts, Precision, rescaled_numbers

if TYPE_CHECKING:
    from torch import Tensor


_BLOCK = 64


def _bitsandbytes() -> Any:
    return bitsandbytes_functional("storing values as int8 or nf4")


def _encode_blocks(values: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Any]]) -> Parts:
    """Codes and scales of kept entries, of which there may be none."""
    if not len(values):
        return {"codes": torch.empty(0, dtype=torch.uint8), "absmax": torch.empty(0)}
    codes, state = quantize(values.float())
    return {"codes": codes.flatten(), "absmax": state.absmax.float()}


class Int8Encoding(Encoding):
    """Eight bits per entry by block-wise dynamic quantisation (https://arxiv.org/abs/2110.02861)."""

    part_names = ("codes", "absmax")

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """``codes`` (num_kept,) uint8, row by row; ``absmax`` (ceil(num_kept / 64),) float32, a scale per block."""
        return _encode_blocks(
            rescaled_numbers(delta, kept, precision),
            lambda values: _bitsandbytes().quantize_blockwise(values, blocksize=_BLOCK),
        )

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """The reverse of :meth:`encode`."""
        if not len(parts["codes"]):
            return torch.empty(0, device=kept.device)
        functional = _bitsandbytes()
        table = functional.create_dynamic_map().to(parts["codes"].device)
        decoded = functional.dequantize_blockwise(parts["codes"], absmax=parts["absmax"], code=table, blocksize=_BLOCK)
        return decoded.float()

    def part_sizes(self, num_kept: int) -> dict[str, int]:
        return {"codes": num_kept, "absmax": -(-num_kept // _BLOCK)}

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        return num_kept + 4 * num_kept / _BLOCK


class Nf4Encoding(Encoding):
    """Four bits per entry, as QLoRA stores weights (https://arxiv.org/abs/2305.14314)."""

    part_names = ("codes", "absmax")

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """``codes`` (ceil(num_kept / 2),) uint8, row by row; ``absmax`` (ceil(num_kept / 64),) float32."""
        return _encode_blocks(
            rescaled_numbers(delta, kept, precision),
            lambda values: _bitsandbytes().quantize_4bit(values, blocksize=_BLOCK, quant_type="nf4"),
        )

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """The reverse of :meth:`encode`."""
        if not len(parts["codes"]):
            return torch.empty(0, device=kept.device)
        functional = _bitsandbytes()
        state = functional.QuantState(
            absmax=parts["absmax"],
            shape=torch.Size([int(kept.sum())]),
            code=functional.get_4bit_type("nf4", device=parts["codes"].device),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        return functional.dequantize_4bit(parts["codes"][:, None], state).flatten().float()

    def part_sizes(self, num_kept: int) -> dict[str, int]:
        return {"codes": -(-num_kept // 2), "absmax": -(-num_kept // _BLOCK)}

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        return num_kept / 2 + 4 * num_kept / _BLOCK
