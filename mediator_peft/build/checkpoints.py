"""Opening checkpoints lazily: names, shapes and dtypes at once, weights one tensor at a time."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .headers import DTYPES, Stored, read_header, read_into, read_json
from .outline import is_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_WANTED = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja"]


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for anything but plain floating point."""


class Checkpoint(ABC):
    """Weights of one model, read one tensor at a time."""

    label: str
    """What messages call it, e.g. ``expert 'math'``."""

    source: str
    """Where it lies."""

    tensors: dict[str, TensorInfo]

    @property
    def raw_config(self) -> Mapping[str, Any]:
        """What its ``config.json`` says, word for word; empty for a model in memory."""
        return {}

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor, on the CPU, in its own dtype: (stop - start, *rest). Not to be kept."""

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Tensor:
        """Rows of one tensor from several places, (start, stop) each, one below the other. Not to be kept."""
        return torch.cat([self.read_rows(name, start, stop).clone() for start, stop in groups])

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in its own dtype."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape).clone()

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What this model adds to a tensor of its base, where that is known as a product; None elsewhere.

        Returns:
            (rows, r) and (r, columns), float32, in the layout in which the tensor is stored.
        """
        return None

    @property
    def files(self) -> list[Path]:
        """The files of weights that it is read from; none for a model in memory."""
        return []

    def place(self, name: str) -> tuple[Path, int] | None:
        """The file in which a tensor lies, and where it ends there; None where it lies in no plain file."""
        return None

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The model's configuration."""


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
        except (OSError, ValueError, KeyError) as fault:
            faults.append(f"its config.json cannot be read: {str(fault).splitlines()[0]}")
            return PretrainedConfig()

    _index_file, _single_file = INDEX_FILE, SINGLE_FILE

    def _weight_files(self, faults: list[str]) -> list[Path]:
        index = self.folder / self._index_file
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                outside = [name for name in names if Path(name).name != name]
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
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

    read_groups = Checkpoint.read_groups


class MeanCheckpoint(Checkpoint):
    """The mean of some checkpoints, for want of a base."""

    def __init__(self, members: Sequence[Checkpoint]) -> None:
        self.label = self.source = "the mean of the experts"
        self.members = members
        self.tensors = dict(members[0].tensors)

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self.members[0].raw_config

    @property
    def config(self) -> PretrainedConfig:
        return self.members[0].config

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = [member.read_rows(name, start, stop) for member in self.members]
        return torch.stack([row.float() for row in rows]).mean(dim=0).to(rows[0].dtype)


class ModelCheckpoint(Checkpoint):
    """The weights of a model that is already loaded."""

    def __init__(self, model: nn.Module, label: str = "base") -> None:
        self.label = label
        self.source = str(getattr(model, "name_or_path", "") or "a loaded model")
        self._model_config: PretrainedConfig = model.config  # type: ignore[assignment]
        self._state = model.state_dict()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None)
            for name, tensor in self._state.items()
        }

    @property
    def config(self) -> PretrainedConfig:
        return self._model_config

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._state[name].detach()
        return (tensor.reshape(1) if tensor.ndim == 0 else tensor)[start:stop].cpu()


def open_checkpoints(paths: Mapping[str, str], allow_pickle: bool = False) -> dict[str, Checkpoint]:
    """Open several checkpoints.

    Args:
        paths: label → folder or hub id (``org/model`` or ``org/model@revision``).
        allow_pickle: also read ``.bin`` files.

    Raises:
        CheckpointError: any of them cannot be opened; the faults of all are listed at once.
    """
    opened: dict[str, Checkpoint] = {}
    faults = []
    for label, path in paths.items():
        try:
            opened[label] = open_checkpoint(str(path), label, allow_pickle)
        except CheckpointError as fault:
            faults.append(str(fault))
    if faults:
        raise CheckpointError("\n".join(faults))
    return opened


def open_checkpoint(path: str, label: str, allow_pickle: bool = False) -> Checkpoint:
    """Open one checkpoint, of whatever kind it is.

    Raises:
        CheckpointError: it cannot be opened.
    """
    from .lora import ADAPTER_CONFIG, LoraCheckpoint

    folder = resolve(path, label)
    source = pinned_source(path, folder)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return LoraCheckpoint(folder, label, source)
    has_safetensors = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if allow_pickle and not has_safetensors and any(folder.glob("*.bin")):
        return PickleCheckpoint(folder, label, source)
    return FolderCheckpoint(folder, label, source)


def pinned_source(path: str, folder: Path) -> str:
    """A hub id with the commit it was resolved to; a local path as it is."""
    if Path(path).expanduser().is_dir():
        return path
    return f"{path.partition('@')[0]}@{folder.name}"


def resolve(path: str, label: str) -> Path:
    """A local folder as it is; a hub id as the folder of its downloaded snapshot.

    Raises:
        CheckpointError: neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    repository, _, revision = path.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(f"{label}: no folder {path!r}. Give a folder or a hub id such as 'org/model@revision'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        raise CheckpointError(
            f"{label}: {path!r} is no folder, and the hub did not give it: {str(fault).splitlines()[0]}"
        ) from fault
