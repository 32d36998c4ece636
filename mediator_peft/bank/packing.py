"""Positions and signs as bits, and bits as compact bytes on disk."""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

from ..errors import AdapterError

# Level 1 codes literals by their entropy and hardly looks for repetitions, of which a random bitmap has none.
_LEVEL = 1


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans to bits, eight a byte, the first in the lowest bit; each row is padded to whole bytes.

    Args:
        bits: (..., n) bool

    Returns:
        (..., ceil(n / 8)) uint8
    """
    packed = np.packbits(bits.cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed).to(bits.device)


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """The reverse of :func:`pack_bits`.

    Args:
        packed: (..., ceil(num_bits / 8)) uint8
        num_bits: length of the last dimension before packing.

    Returns:
        (..., num_bits) bool
    """
    if packed.device.type == "cpu":
        unpacked = np.unpackbits(packed.numpy(), axis=-1, count=num_bits, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    weights = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> weights) & 1
    return bits.flatten(-2)[..., :num_bits].bool()


def count_bits(packed: Tensor) -> int:
    """Number of ones in a packed bitmap."""
    return int(np.bitwise_count(packed.cpu().numpy()).sum(dtype=np.int64)) if packed.numel() else 0


def compress(data: Tensor) -> Tensor:
    """Entropy-code bytes for the disk.

    Args:
        data: any shape, uint8.

    Returns:
        (n,) uint8, one zstandard frame that states its size.
    """
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(data.contiguous().cpu().numpy().tobytes())
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, num_bytes: int, name: str) -> Tensor:
    """The bytes that :func:`compress` was given, flat.

    Args:
        frame: (n,) uint8
        num_bytes: how many bytes must come out.
        name: what an error calls the tensor.

    Raises:
        AdapterError: the frame is damaged or holds another number of bytes.
    """
    try:
        data = zstandard.ZstdDecompressor().decompress(frame.cpu().numpy().tobytes(), max_output_size=num_bytes)
    except zstandard.ZstdError as fault:
        raise AdapterError(f"tensor {name!r} of the adapter file is damaged ({fault}). Copy the file again.") from fault
    if len(data) != num_bytes:
        raise AdapterError(
            f"tensor {name!r} of the adapter file holds {len(data)} bytes, {num_bytes} were expected. It belongs to a "
            "backbone of other shapes, or the file is damaged."
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
