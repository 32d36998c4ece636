"""Opens checkpoints of every kind: folders, LoRA adapters, models in memory, the mean of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint, TensorInfo
from .folders import INDEX_FILE, SINGLE_FILE, FolderCheckpoint, PickleCheckpoint
from .hub import pinned_source, resolve
from .lora import ADAPTER_CONFIG, LoraCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "FolderCheckpoint",
    "LoraCheckpoint",
    "MeanCheckpoint",
    "ModelCheckpoint",
    "PickleCheckpoint",
    "TensorInfo",
    "open_checkpoint",
    "open_checkpoints",
    "pinned_source",
    "resolve",
]


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
    folder = resolve(path, label)
    source = pinned_source(path, folder)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return LoraCheckpoint(folder, label, source)
    has_safetensors = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if allow_pickle and not has_safetensors and any(folder.glob("*.bin")):
        return PickleCheckpoint(folder, label, source)
    return FolderCheckpoint(folder, label, source)


class MeanCheckpoint(Checkpoint):
    """The mean of some checkpoints, for want of a base."""

    def __init__(self, members: Sequence[Checkpoint]) -> None:
        self.label = "the mean of the experts"
        self.source = "the mean of the experts"
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
