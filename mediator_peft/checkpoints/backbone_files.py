"""Safetensors files of the backbone: laid out first, then filled in any order by any process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from ..storage import CODES, Array, FloatType
from .digests import FileDigests
from .fused_parts import Part
from .headers import Stored, lay_out
from .opening import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 1 << 30


class BackboneFiles:
    """Shards of one dtype, in the layout that ``safetensors`` itself would choose.

    Args:
        folder: where they lie.
        shapes: tensor name → shape; with ``shard_bytes`` this fixes where each tensor goes.
        dtype: of all tensors.
        shard_bytes: size from which on a new shard is begun.
        parts: further tensors that are written, as parts of those with a shape → where they lie.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: FloatType,
        shard_bytes: int = SHARD_BYTES,
        *,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self.folder = folder
        self.total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        filled = 0
        for name in sorted(shapes):
            size = prod(shapes[name]) * dtype.itemsize
            if filled and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = (dtype.code, tuple(shapes[name]))
            filled += size
        self.paths = [folder / _file_name(number, len(shards)) for number in range(len(shards))]
        self._heads: dict[Path, bytes] = {}
        self._places: dict[str, tuple[Path, Stored]] = {}
        for path, tensors in zip(self.paths, shards, strict=True):
            self._heads[path], stored = lay_out(tensors)
            self._places.update({name: (path, place) for name, place in stored.items()})
        self._weight_map = {name: path.name for name, (path, _) in sorted(self._places.items())}
        for name, part in (parts or {}).items():
            path, whole = self._places[part.tensor]
            size = whole.num_bytes // whole.shape[0]
            self._places[name] = path, Stored(whole.dtype, whole.shape[1:], whole.offset + part.number * size, size)
        self._descriptors: dict[Path, int] = {}
        self._digests: FileDigests | None = None

    def create(self) -> None:
        """Write the headers and the index, and take the room for the data: a full disk shows itself here."""
        for path, head in self._heads.items():
            end = max(place.offset + place.num_bytes for where, place in self._places.values() if where == path)
            with open(path, "wb") as file:
                file.write(head)
                file.flush()
                _allocate(file.fileno(), max(end, len(head)))
        if len(self.paths) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")

    @property
    def header_bytes(self) -> dict[str, int]:
        """File name → size of what :meth:`create` writes at its start."""
        return {path.name: len(head) for path, head in self._heads.items()}

    def put(self, name: str, tensor: Array) -> None:
        """Write a whole tensor."""
        self.write_rows(name, 0, tensor)

    def watch(self, digests: FileDigests) -> None:
        """Show what is written from now on to the checksums of the files."""
        self._digests = digests

    def write_rows(self, name: str, start: int, rows: Array) -> None:
        """Write rows (r, ...) of a tensor, the first of them being row ``start``."""
        path, place = self._places[name]
        row_bytes = prod(rows.shape[1:]) * rows.itemsize
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = place.offset + start * row_bytes
        _write_at(self._open(path), data, offset)
        if self._digests is not None:
            self._digests.wrote(path, offset, data)

    def read(self, name: str) -> Array:
        """One tensor as it was written; it is mapped, so that only what is looked at is read."""
        path, place = self._places[name]
        if not place.num_bytes:
            return np.empty(place.shape, CODES[place.dtype])
        mapped = np.memmap(path, np.uint8, "c", place.offset, (place.num_bytes,))
        return mapped.view(CODES[place.dtype]).reshape(place.shape)

    def close(self) -> None:
        """Let go of the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDWR)
        return self._descriptors[path]


def _write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write a whole buffer to a place in an open file."""
    done = 0
    while done < len(buffer):
        done += os.pwritev(descriptor, [buffer[done:]], offset + done)


def _file_name(number: int, num_shards: int) -> str:
    return SINGLE_FILE if num_shards == 1 else f"model-{number + 1:05}-of-{num_shards:05}.safetensors"


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as fault:
        if isinstance(fault, OSError) and fault.errno not in (22, 95):  # file systems that cannot take room ahead
            raise
        os.ftruncate(descriptor, size)
