"""Bitmaps of positions and signs in memory, and their compressed form on disk."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import zstandard
from numpy.typing import NDArray

from ...deferred import torch
from ...errors import AdapterError
from ..sparsifying.selection import count_ones

if TYPE_CHECKING:
    from torch import Tensor


Bytes = NDArray[np.uint8]

# Level 1 codes literals by their entropy and hardly looks for repetitions, of which a random bitmap has none.
_LEVEL = 1
_OF_THREAD = threading.local()

# Above this share of ones a bitmap is the shorter form; below, both are tried.
_MOST_GAPS = 0.15
# Stands before a frame of gaps; a frame of zstandard never begins so.
_GAPS = b"G"
_LONGEST_GAP = 255


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


def count_bits_by_row(packed: Tensor) -> Tensor:
    """Number of ones in each row of a packed bitmap (O, n), on its device: (O,) int64."""
    ones = torch.tensor([number.bit_count() for number in range(256)], dtype=torch.uint8, device=packed.device)
    # Some rows at a time: looking bytes up takes several for each.
    return torch.cat([ones[part.int()].sum(dim=1) for part in packed.split(4096)])


def compress(data: Bytes) -> Bytes:
    """Entropy-code bytes for the disk.

    Args:
        data: any shape, uint8.

    Returns:
        (n,) uint8, one zstandard frame that states its size.
    """
    frame = _compressor().compress(np.ascontiguousarray(data).data)
    return np.frombuffer(bytearray(frame), np.uint8)


def _compressor() -> zstandard.ZstdCompressor:
    """One a thread: it keeps its tables, which take longer to be made than a small frame."""
    if not hasattr(_OF_THREAD, "compressor"):
        _OF_THREAD.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return _OF_THREAD.compressor


def compress_mask(mask: Bytes) -> Bytes:
    """Entropy-code a bitmap for the disk: its bytes, or the gaps between its ones where that is shorter.

    A code for whole bytes spends a bit at least on eight zeros, so few ones are better told by their distances.

    Args:
        mask: (O, ceil(I / 8)) uint8

    Returns:
        (n,) uint8
    """
    frame = compress(mask)
    if count_ones(mask) > _MOST_GAPS * 8 * mask.size:
        return frame
    bits = np.unpackbits(mask.reshape(-1), bitorder="little")
    gaps = np.diff(np.flatnonzero(bits), prepend=-1) - 1
    # A gap beyond 254 is as many 255 as go into it, and the rest.
    ends = np.cumsum(gaps // _LONGEST_GAP + 1)
    coded = np.full(int(ends[-1]) if ends.size else 0, _LONGEST_GAP, np.uint8)
    coded[ends - 1] = gaps % _LONGEST_GAP
    shorter = np.concatenate([np.frombuffer(_GAPS, np.uint8), compress(coded)])
    return shorter if len(shorter) < len(frame) else frame


def decompress_mask(stored: Bytes, shape: tuple[int, int], name: str) -> Bytes:
    """The bitmap that :func:`compress_mask` was given.

    Args:
        stored: (n,) uint8
        shape: (O, ceil(I / 8)) of the bitmap.
        name: what an error calls the tensor.

    Raises:
        AdapterError: it is damaged or belongs to other shapes.
    """
    num_bytes = shape[0] * shape[1]
    if stored[:1].tobytes() != _GAPS:
        return decompress(stored, num_bytes, name).reshape(shape)
    coded = _expand(stored[1:], 8 * num_bytes, name)
    is_one = coded != _LONGEST_GAP
    places = (np.cumsum(coded + is_one.astype(np.int64), dtype=np.int64) - 1)[is_one]
    if places.size and places[-1] >= 8 * num_bytes:
        raise AdapterError(_other_shape(name, f"positions up to {places[-1]}", f"{8 * num_bytes} at most"))
    bits = np.zeros(8 * num_bytes, np.uint8)
    bits[places] = 1
    return np.packbits(bits, bitorder="little").reshape(shape)


def decompress(frame: Bytes, num_bytes: int, name: str) -> Bytes:
    """The bytes that :func:`compress` was given, flat.

    Args:
        frame: (n,) uint8
        num_bytes: how many bytes must come out.
        name: what an error calls the tensor.

    Raises:
        AdapterError: the frame is damaged or holds another number of bytes.
    """
    data = _expand(frame, num_bytes, name)
    if len(data) != num_bytes:
        raise AdapterError(_other_shape(name, f"{len(data)} bytes", str(num_bytes)))
    return data


def _expand(frame: Bytes, most: int, name: str) -> Bytes:
    """What a frame holds, ``most`` bytes at the most: (n,)."""
    packed = frame.tobytes()
    try:
        size = zstandard.frame_content_size(packed)
        if size > most:
            raise AdapterError(_other_shape(name, f"{size} bytes", f"{most} at most"))
        data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=most)
    except zstandard.ZstdError as fault:
        raise AdapterError(f"tensor {name!r} of the adapter file is damaged ({fault}). Copy the file again.") from fault
    return np.frombuffer(bytearray(data), np.uint8)


def _other_shape(name: str, found: str, expected: str) -> str:
    return (
        f"tensor {name!r} of the adapter file holds {found}, {expected} were expected. It belongs to a backbone of "
        "other shapes, or the file is damaged."
    )
