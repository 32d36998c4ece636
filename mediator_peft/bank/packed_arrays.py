"""A packed delta in plain numpy: as a build makes it, and as files hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AdapterError
from ..methods.encoding import ENCODINGS
from ..methods.encoding.bitmaps import compress_mask
from ..storage import Array, as_array, to_tensor
from .sparse_delta import SparseDelta, full_mask

if TYPE_CHECKING:
    from torch import Tensor

MASK, BIAS = "mask", "bias"
"""Names of the parts that every encoding has or may have."""

# A colon cannot stand in an expert's name, and unlike a dot it can stand in a buffer's.
SEPARATOR = ":"
"""Between an expert's name and the part's in the name of a buffer: ``expert:part``."""

_LONGEST_NAME = 1024

_FACTORS = ("left", "right")
"""Parts that several experts may have in common, as LoRAs with one frozen A do."""


@dataclass(frozen=True)
class PackedArrays:
    """What is stored of one matrix's delta for one expert; see :class:`SparseDelta`, which is the same in torch."""

    shape: tuple[int, int]
    coding: str
    parts: dict[str, Array]
    """``mask`` (empty where the coding has no positions), the coding's own parts, and ``bias`` where there is one."""

    @classmethod
    def of(cls, delta: SparseDelta) -> PackedArrays:
        """A delta's tensors as arrays that share their memory."""
        return cls(delta.shape, delta.coding, {name: as_array(part) for name, part in stored_parts(delta).items()})

    def as_tensors(self) -> SparseDelta:
        """The same in torch, sharing memory."""
        parts = {name: to_tensor(part) for name, part in self.parts.items()}
        mask, bias = parts.pop(MASK), parts.pop(BIAS, None)
        if not ENCODINGS[self.coding].has_positions:
            mask = full_mask(self.shape, mask.device)
        return SparseDelta(self.shape, self.coding, mask, parts, bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything stored, in memory."""
        return sum(part.nbytes for part in self.parts.values())

    def buffers(self, expert: str) -> dict[str, Array]:
        """Its parts under the names of a bank's buffers."""
        return {f"{expert}{SEPARATOR}{name}": part for name, part in self.parts.items()}


def stored_parts(delta: SparseDelta) -> dict[str, Tensor]:
    """What is stored of a delta, by name: a mask always, an empty one where its coding has no positions."""
    bias = {} if delta.bias is None else {BIAS: delta.bias}
    mask = delta.mask if ENCODINGS[delta.coding].has_positions else delta.mask.new_empty(0)
    return {MASK: mask, **delta.parts, **bias}


def to_disk(key: str, array: Array) -> Array:
    """The form in which a buffer of a bank is written: 1-D, bitmaps entropy-coded."""
    if key.endswith(SEPARATOR + MASK):
        return compress_mask(array) if array.size else array
    return np.ascontiguousarray(array.reshape(-1))


def all_to_disk(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Buffers of one layer's bank in the form in which they are written: factors that are equal are stored once.

    In place of a factor that an expert before has, by name, stands that expert's name, as bytes (uint8).

    Args:
        arrays: name of a buffer (``expert:part``) → what it holds.
    """
    written, owners = {}, dict[tuple[str, bytes], str]()
    for key in sorted(arrays):
        expert, _, part = key.rpartition(SEPARATOR)
        stored = to_disk(key, arrays[key])
        if part in _FACTORS and stored.nbytes > len(expert):
            digest = sha256(f"{stored.dtype} ".encode() + stored.tobytes()).digest()
            owner = owners.setdefault((part, digest), expert)
            stored = stored if owner == expert else np.frombuffer(owner.encode(), np.uint8).copy()
        written[key] = stored
    return {key: written[key] for key in arrays}


def written(key: str, layer: str, read: Callable[[str], Array | Tensor | None]) -> tuple[str, Any]:
    """What a file holds of a buffer, under its own name or that of an expert with an equal factor.

    Args:
        key: name of the buffer (``expert:part``).
        layer: named in errors.
        read: name of a buffer → what the file has under it; None for nothing.

    Returns:
        The name under which the numbers are written, and these.

    Raises:
        AdapterError: it refers to what is not there.
    """
    stored = read(key)
    place = _place_of(key, stored)
    if place != key:
        stored = read(place)
    if stored is None or _place_of(place, stored) != place:
        raise AdapterError(f"layer {layer!r}, part {key!r} of the adapter file refers to {place!r}: it is damaged.")
    return place, stored


def _place_of(key: str, stored: Array | Tensor | None) -> str:
    part = key.rpartition(SEPARATOR)[2]
    if part not in _FACTORS or stored is None or not str(stored.dtype).endswith("uint8"):
        return key
    is_name = 0 < len(stored) <= _LONGEST_NAME
    return f"{bytes(as_array(stored)).decode(errors='replace')}{SEPARATOR}{part}" if is_name else key
