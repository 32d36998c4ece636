"""Checkpoints in Hugging Face folders. Headers are validated; weights are read some rows at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, TensorInfo
from .headers import DTYPES, Stored, read_header, read_into, read_json
from .tensor_inventory import is_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LISTED = 8


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder of safetensors files, sharded or not.

    Raises:
        CheckpointError: the folder, its configuration, its index or one of its files is missing or damaged; all such
            faults are listed at once.
    """

    def __init__(self, folder: Path, label: str, source: str | None = None) -> None:
        self.folder = folder
        self.label = label
        self.source = source or str(folder)
        faults: list[str] = []
        self._raw_config = read_json(folder / "config.json")
        # transformers is asked at once where it may refuse, and else only where its answer is needed.
        self._config = None if is_known(self._raw_config) else self._read_config(faults)
        if self._raw_config.get("quantization_config"):
            faults.append(
                "its config.json has a quantization_config. Give the unquantised checkpoint; if its weights are plain, "
                "delete that entry."
            )
        self._stored: dict[str, tuple[Path, Stored]] = {}
        self._descriptors: dict[Path, int] = {}
        self._buffer = np.empty(0, np.uint8)
        self.tensors = {}
        for path in self._weight_files(faults):
            self._read_header(path, faults)
        if faults:
            raise CheckpointError("\n".join(f"{label} ({self.source}): {fault}" for fault in faults))

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self._raw_config

    @property
    def config(self) -> PretrainedConfig:
        if self._config is None:
            faults: list[str] = []
            self._config = self._read_config(faults)
            if faults:
                raise CheckpointError(f"{self.label} ({self.source}): {faults[0]}")
        return self._config

    def _read_config(self, faults: list[str]) -> PretrainedConfig:
        from transformers import AutoConfig, PretrainedConfig

        try:
            return AutoConfig.from_pretrained(self.folder)
        except Exception as fault:  # whatever a damaged configuration may raise
            reason = " ".join(str(fault).split()) or type(fault).__name__
            faults.append(f"its config.json cannot be read: {reason}")
            return PretrainedConfig()

    _index_file, _single_file = INDEX_FILE, SINGLE_FILE

    def _weight_files(self, faults: list[str]) -> list[Path]:
        index = self.folder / self._index_file
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                outside = [name for name in names if Path(name).name != name]
            except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
                faults.append(f"{index.name} is damaged ({fault!r}). Download or save the checkpoint again.")
                return []
            if outside:
                faults.append(f"{index.name} names files outside the folder: {', '.join(outside)}")
                return []
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                faults.append(f"shards named in {index.name} are missing: {', '.join(missing)}")
            return [self.folder / name for name in names if name not in missing]
        if (self.folder / self._single_file).is_file():
            return [self.folder / self._single_file]
        hint = ""
        if any(self.folder.glob("*.bin")):
            hint = " It holds .bin files: allow them (allow_pickle=True), or save it again with save_pretrained()."
        faults.append(f"no {self._single_file} and no {self._index_file}.{hint}")
        return []

    def _read_header(self, path: Path, faults: list[str]) -> None:
        try:
            found, _ = read_header(path)
        except (ValueError, OSError) as fault:
            faults.append(f"{path.name} is damaged or cut short ({fault}). Download or save it again.")
            return
        twice = sorted(self._stored.keys() & found.keys())
        if twice:
            others = sorted({self._stored[name][0].name for name in twice})
            faults.append(f"{path.name} has tensors that {', '.join(others)} has as well: {', '.join(twice[:_LISTED])}")
        for name, stored in found.items():
            self.tensors[name] = TensorInfo(stored.shape, DTYPES.get(stored.dtype))
            self._stored[name] = (path, stored)

    @property
    def files(self) -> list[Path]:
        return sorted({path for path, _ in self._stored.values()})

    def place(self, name: str) -> tuple[Path, int] | None:
        found = self._stored.get(name)
        return None if found is None else (found[0], found[1].offset + found[1].num_bytes)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read_groups(name, [(start, stop)])

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Tensor:
        path, stored = self._stored[name]
        num_rows = sum(stop - start for start, stop in groups)
        row_bytes = stored.num_bytes // max(1, stored.shape[0] if stored.shape else 1)
        size = row_bytes * num_rows
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        buffer = self._buffer[:size]
        view, place = buffer.data, 0
        descriptor = self._open(path) if size else -1
        for start, stop in groups if size else ():
            end = place + row_bytes * (stop - start)
            read_into(descriptor, view[place:end], stored.offset + start * row_bytes)
            place = end
        return torch.from_numpy(buffer).view(DTYPES[stored.dtype]).reshape(num_rows, *stored.shape[1:])

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class PickleCheckpoint(FolderCheckpoint):
    """A Hugging Face folder of ``.bin`` files, read with ``weights_only=True``: plain tensors and no code."""

    _index_file, _single_file = "pytorch_model.bin.index.json", "pytorch_model.bin"

    def _read_header(self, path: Path, faults: list[str]) -> None:
        if not hasattr(self, "_state"):
            self._state: dict[str, Tensor] = {}
            self._paths: list[Path] = []
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        except Exception as fault:  # whatever a damaged pickle may raise
            reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
            faults.append(f"{path.name} is damaged, or holds more than tensors ({reason}).")
            return
        self._paths.append(path)
        self._state.update(found)
        for name, tensor in found.items():
            self.tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None)

    @property
    def files(self) -> list[Path]:
        return self._paths

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._state[name]
        return (tensor.reshape(1) if tensor.ndim == 0 else tensor)[start:stop]

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Tensor:
        return Checkpoint.read_groups(self, name, groups)
