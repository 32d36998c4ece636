"""Opening checkpoints lazily: names, shapes and dtypes at once, weights one tensor at a time."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ..errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


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

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its own dtype."""

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
        self._config = self._read_config(faults)
        self._files: dict[str, Path] = {}
        self.tensors = {}
        for path in self._weight_files(faults):
            self._read_header(path, faults)
        if faults:
            raise CheckpointError("\n".join(f"{label} ({self.source}): {fault}" for fault in faults))

    @property
    def config(self) -> PretrainedConfig:
        return self._config

    def _read_config(self, faults: list[str]) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as fault:
            faults.append(f"its config.json cannot be read: {str(fault).splitlines()[0]}")
            return PretrainedConfig()

    def _weight_files(self, faults: list[str]) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError) as fault:
                faults.append(f"{INDEX_FILE} is damaged ({fault}). Download or save the checkpoint again.")
                return []
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                faults.append(f"shards named in {INDEX_FILE} are missing: {', '.join(missing)}")
            return [self.folder / name for name in names if name not in missing]
        if (self.folder / SINGLE_FILE).is_file():
            return [self.folder / SINGLE_FILE]
        hint = ""
        if any(self.folder.glob("*.bin")):
            hint = " It holds .bin files: load it once and save it again with save_pretrained()."
        if (self.folder / "adapter_config.json").is_file():
            hint = " It holds an adapter: merge it into its base first with merge_and_unload()."
        faults.append(f"no {SINGLE_FILE} and no {INDEX_FILE}.{hint}")
        return []

    def _read_header(self, path: Path, faults: list[str]) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a file is not a mapping
                    piece = file.get_slice(name)
                    self.tensors[name] = TensorInfo(tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype()))
                    self._files[name] = path
        except (SafetensorError, OSError) as fault:
            faults.append(f"{path.name} is damaged or cut short ({fault}). Download or save it again.")

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


class ModelCheckpoint(Checkpoint):
    """The weights of a model that is already loaded."""

    def __init__(self, model: nn.Module, label: str = "base") -> None:
        self.label = label
        self.source = str(getattr(model, "name_or_path", "") or "a loaded model")
        self._model_config = model.config
        self._state = model.state_dict()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None)
            for name, tensor in self._state.items()
        }

    @property
    def config(self) -> PretrainedConfig:
        return self._model_config

    def read(self, name: str) -> Tensor:
        return self._state[name].detach().cpu()


def open_checkpoints(paths: Mapping[str, str]) -> dict[str, FolderCheckpoint]:
    """Open several checkpoints.

    Args:
        paths: label → folder or hub id (``org/model`` or ``org/model@revision``).

    Raises:
        CheckpointError: any of them cannot be opened; the faults of all are listed at once.
    """
    opened: dict[str, FolderCheckpoint] = {}
    faults = []
    for label, path in paths.items():
        try:
            folder = resolve(str(path), label)
            opened[label] = FolderCheckpoint(folder, label, source=str(path))
        except CheckpointError as fault:
            faults.append(str(fault))
    if faults:
        raise CheckpointError("\n".join(faults))
    return opened


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
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        raise CheckpointError(
            f"{label}: {path!r} is no folder, and the hub did not give it: {str(fault).splitlines()[0]}"
        ) from fault
