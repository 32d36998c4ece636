"""How the kept entries of a delta are stored: a table of codings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...optional import bitsandbytes_functional
from .bitmaps import pack_bits, unpack_bits
from .scales import NUMBER_SCALES, SIGN_SCALES, RowSums

Parts = dict[str, Tensor]


class Precision(NamedTuple):
    """How finely a coding stores what it keeps; each coding reads what concerns it."""

    dtype: torch.dtype | None = None
    """Of values that are stored as numbers; None keeps float32."""

    rescale: str = "projection"
    """A key of ``SIGN_SCALES``, and of ``NUMBER_SCALES``."""

    gain: float = 1.0
    """What the sparsifier multiplies kept numbers by: 1 / density where they were drawn."""


EXACT = Precision(rescale="mean")
"""Numbers as they are."""


class Encoding(NamedTuple):
    """One way to store kept entries."""

    encode: Callable[[Tensor, Tensor, Precision], Parts]
    """(delta (O, I) float32, kept (O, I) bool, precision) → named parts, each 1-D."""

    decode: Callable[[Parts, Tensor], Tensor]
    """(parts, kept (O, I) bool) → kept entries (num_kept,) float32, row by row."""

    part_names: tuple[str, ...]
    part_sizes: Callable[[int], dict[str, int]]
    """Number of kept entries → entries of the parts that depend on it."""

    in_kernels: bool = True
    """Whether the compiled loops read it; otherwise deltas are unpacked before they are applied."""

    has_positions: bool = True
    """Whether a mask goes with it; otherwise it gives every entry."""


def encode_signs(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """One bit an entry, one scale a row (see ``SIGN_SCALES``).

    Our choice; BitDelta (https://arxiv.org/abs/2402.10193) keeps one sign for every weight and one scale a matrix.

    Args:
        delta: (O, I), before thinning: the norm of the whole row counts.
        kept: (O, I) bool
        precision: which scale.

    Returns:
        ``signs`` (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; ``scales`` (O,) bfloat16:
        rounding them changes no answer that we could measure (docs/forms.md).
    """
    exact = delta.double()
    rows = RowSums(
        exact.square().sum(dim=1).numpy(), torch.where(kept, exact, 0).abs().sum(dim=1).numpy(), kept.sum(dim=1).numpy()
    )
    scales = SIGN_SCALES[precision.rescale](rows)
    return {"signs": pack_bits(delta[kept] < 0), "scales": torch.from_numpy(scales).bfloat16()}


def decode_signs(parts: Parts, kept: Tensor) -> Tensor:
    """``±scale`` of its row for each kept entry."""
    num_kept = kept.sum(dim=1)
    magnitude = torch.repeat_interleave(parts["scales"].float(), num_kept)
    negative = unpack_bits(parts["signs"], len(magnitude))
    return torch.where(negative, -magnitude, magnitude)


def _scaled(delta: Tensor, kept: Tensor, precision: Precision) -> Tensor:
    """The kept entries (num_kept,) float32, as large as ``NUMBER_SCALES`` wants them."""
    if precision.rescale == "mean":
        return delta[kept] * precision.gain
    squares = delta.double().square()
    factors = NUMBER_SCALES[precision.rescale](
        squares.sum(dim=1).numpy(), torch.where(kept, squares, 0).sum(dim=1).numpy()
    )
    return delta[kept] * torch.repeat_interleave(torch.from_numpy(factors).float(), kept.sum(dim=1))


def encode_floats(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """The entries themselves, scaled (see ``NUMBER_SCALES``) and rounded once.

    Returns:
        ``values`` (num_kept,), row by row.
    """
    return {"values": _scaled(delta, kept, precision).to(precision.dtype or torch.float32)}


def decode_floats(parts: Parts, kept: Tensor) -> Tensor:
    """The stored entries as float32."""
    return parts["values"].float()


_BLOCK = 64


def _bitsandbytes() -> Any:
    return bitsandbytes_functional("storing values as int8 or nf4")


def _encode_blocks(values: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Any]]) -> Parts:
    """What a function of bitsandbytes makes of kept entries, of which there may be none."""
    if not len(values):
        return {"codes": torch.empty(0, dtype=torch.uint8), "absmax": torch.empty(0)}
    codes, state = quantize(values.float())
    return {"codes": codes.flatten(), "absmax": state.absmax.float()}


def encode_int8(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """Eight bits an entry by bitsandbytes' block-wise quantisation (https://arxiv.org/abs/2110.02861).

    Returns:
        ``codes`` (num_kept,) uint8, row by row; ``absmax`` (ceil(num_kept / 64),) float32, a scale a block.
    """
    return _encode_blocks(
        _scaled(delta, kept, precision), lambda values: _bitsandbytes().quantize_blockwise(values, blocksize=_BLOCK)
    )


def decode_int8(parts: Parts, kept: Tensor) -> Tensor:
    """The reverse of :func:`encode_int8`."""
    if not len(parts["codes"]):
        return torch.empty(0, device=kept.device)
    functional = _bitsandbytes()
    table = functional.create_dynamic_map().to(parts["codes"].device)
    return functional.dequantize_blockwise(parts["codes"], absmax=parts["absmax"], code=table, blocksize=_BLOCK).float()


def encode_nf4(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """Four bits an entry, as QLoRA stores weights (https://arxiv.org/abs/2305.14314).

    Returns:
        ``codes`` (ceil(num_kept / 2),) uint8, row by row; ``absmax`` (ceil(num_kept / 64),) float32, a scale a block.
    """
    return _encode_blocks(
        _scaled(delta, kept, precision),
        lambda values: _bitsandbytes().quantize_4bit(values, blocksize=_BLOCK, quant_type="nf4"),
    )


def decode_nf4(parts: Parts, kept: Tensor) -> Tensor:
    """The reverse of :func:`encode_nf4`."""
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


def encode_factors(delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
    """A matrix as the product of two thin ones, by all singular values that float32 tells from 0.

    Low-rank sparsifiers give factors at once (``SparseDelta.from_factors``); this is the way from any matrix.

    Returns:
        ``left`` (O * r,), ``right`` (r * I,), each row by row; r is 1 or more.
    """
    left, sizes, right = torch.linalg.svd(torch.where(kept, delta, 0), full_matrices=False)
    limit = float(sizes[0]) * max(delta.shape) * torch.finfo(torch.float32).eps
    rank = max(1, int((sizes > limit).sum()))
    root = sizes[:rank].sqrt()
    dtype = precision.dtype or torch.float32
    return store_factors((left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype))


def store_factors(left: Tensor, right: Tensor) -> Parts:
    """Factors (O, r) and (r, I) as parts."""
    return {"left": left.flatten(), "right": right.flatten()}


def factor_matrices(parts: Parts, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`store_factors`, in float32: (O, r) and (r, I)."""
    return parts["left"].float().reshape(shape[0], -1), parts["right"].float().reshape(-1, shape[1])


def decode_factors(parts: Parts, kept: Tensor) -> Tensor:
    """The product's entries."""
    left, right = factor_matrices(parts, (kept.shape[0], kept.shape[1]))
    return (left @ right)[kept]


def _factors_fault(parts: Parts, shape: tuple[int, int]) -> str | None:
    left, right = len(parts["left"]), len(parts["right"])
    rank = left // shape[0]
    if rank and (left, right) == (rank * shape[0], rank * shape[1]):
        return None
    return f"factors of {left} and {right} numbers for a matrix {shape[0]} x {shape[1]}"


def parts_fault(coding: str, parts: Parts, shape: tuple[int, int], num_kept: int) -> str | None:
    """What of a delta's parts does not fit its shape and mask; None where all fits."""
    if not ENCODINGS[coding].has_positions:
        return _factors_fault(parts, shape)
    for part, expected in ENCODINGS[coding].part_sizes(num_kept).items():
        if len(parts[part]) != expected:
            return f"{len(parts[part])} {part} for {expected} expected"
    return None


ENCODINGS: dict[str, Encoding] = {
    "sign": Encoding(encode_signs, decode_signs, ("signs", "scales"), lambda count: {"signs": -(-count // 8)}),
    "float": Encoding(encode_floats, decode_floats, ("values",), lambda count: {"values": count}),
    "int8": Encoding(
        encode_int8,
        decode_int8,
        ("codes", "absmax"),
        lambda count: {"codes": count, "absmax": -(-count // _BLOCK)},
        in_kernels=False,
    ),
    "nf4": Encoding(
        encode_nf4,
        decode_nf4,
        ("codes", "absmax"),
        lambda count: {"codes": -(-count // 2), "absmax": -(-count // _BLOCK)},
        in_kernels=False,
    ),
    "factors": Encoding(
        encode_factors, decode_factors, ("left", "right"), lambda count: {}, in_kernels=False, has_positions=False
    ),
}
