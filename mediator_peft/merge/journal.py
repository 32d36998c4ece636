"""Resume journal: the result of each tensor as one small file, so that a killed build continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bank.packed_arrays import all_to_disk
from ..checkpoints.adapter_files import bank_key
from ..checkpoints.folders import read_into
from ..checkpoints.headers import Stored, lay_out, read_header
from ..storage import code_of
from .signed_selection import Errors
from .tensor_work import TensorResult

_META = "mediator"

_MOST_FILES = 200
"""Files of tensors that are open at the same time."""


@dataclass
class Finished:
    """What the builder must know of a tensor that is done."""

    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For the fingerprint: tensor name → shape and some values."""

    num_parameters: int = 0
    """Entries of the matrix that got deltas; 0 without."""

    num_bytes: int = 0
    """Of its deltas in memory."""

    def to_json(self) -> str:
        """As text that gives the same numbers back."""
        plain = {**vars(self), "counts": {name: count.tolist() for name, count in self.counts.items()}}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> Finished:
        """The reverse of :meth:`to_json`."""
        plain = json.loads(text)
        plain["counts"] = {name: np.array(count, np.float64) for name, count in plain["counts"].items()}
        plain["errors"] = {name: Errors(*numbers) for name, numbers in plain["errors"].items()}
        return cls(**plain)


def finished(result: TensorResult, samples: dict[str, dict[str, Any]]) -> Finished:
    """The small part of a result."""
    shapes = {delta.shape for delta in result.deltas.values()}
    return Finished(
        counts=result.counts,
        errors=result.errors,
        samples=samples,
        num_parameters=sum(rows * columns for rows, columns in shapes),
        num_bytes=sum(delta.num_bytes for delta in result.deltas.values()),
    )


class JournalStore:
    """The files of finished tensors in one folder. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[int, Finished] = {}
        self._places: dict[int, dict[str, Stored]] = {}
        """Where the deltas lie in the files that this process wrote."""

    def path(self, number: int) -> Path:
        """File of one tensor."""
        return self.folder / f"{number:06}.safetensors"

    def put(self, number: int, layer: str, result: TensorResult, info: Finished) -> None:
        """Keep one tensor's result."""
        arrays = {key: array for column, delta in result.deltas.items() for key, array in delta.buffers(column).items()}
        tensors = {bank_key(layer, key): array for key, array in all_to_disk(arrays).items()}
        shapes = {name: (code_of(array), array.shape) for name, array in tensors.items()}
        head, places = lay_out(shapes, {_META: info.to_json()})
        target = self.path(number)
        partial = target.with_suffix(f".{os.getpid()}")
        with open(partial, "wb") as file:
            file.write(head)
            for name in sorted(tensors, key=lambda name: places[name].offset):
                file.write(tensors[name].view(np.uint8).data)
        os.replace(partial, target)
        self._known[number], self._places[number] = info, places

    def get(self, number: int) -> Finished | None:
        """The small part of one tensor's result; None where it is not finished or its file is damaged."""
        if number in self._known:
            return self._known[number]
        try:
            _, metadata = read_header(self.path(number))
            return Finished.from_json(metadata[_META])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def join(self, numbers: Iterable[int], target: Path) -> None:
        """Write the deltas of these tensors into one safetensors file, as the library itself would lay it out."""
        sources: dict[str, tuple[str, Stored]] = {}
        for number in numbers:
            path, places = self.path(number), self._places.get(number)
            if places is None:
                places, _ = read_header(path)
            file = str(path)
            sources.update({name: (file, stored) for name, stored in places.items()})
        _join(sources, target)


def _join(sources: Mapping[str, tuple[str, Stored]], target: Path) -> None:
    shapes = {name: (stored.dtype, stored.shape) for name, (_, stored) in sources.items()}
    # Nothing routed and no router yet: PEFT wants a file all the same.
    head, places = lay_out(shapes or {"empty": ("F32", (0,))})
    descriptors: dict[str, int] = {}
    # Fresh memory for each would take longer than the copying.
    space = memoryview(bytearray(max((stored.num_bytes for _, stored in sources.values()), default=0)))
    try:
        with open(target, "wb") as file:
            file.write(head)
            for name in sorted(sources, key=lambda name: places[name].offset):
                path, stored = sources[name]
                if path not in descriptors:
                    # A mixture of experts has more matrices than a process may have files.
                    if len(descriptors) >= _MOST_FILES:
                        _close_all(descriptors)
                    descriptors[path] = os.open(path, os.O_RDONLY)
                read_into(descriptors[path], space[: stored.num_bytes], stored.offset)
                file.write(space[: stored.num_bytes])
    finally:
        _close_all(descriptors)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
