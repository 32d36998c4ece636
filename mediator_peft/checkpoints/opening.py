"""Opens checkpoints of every kind: folders, LoRA adapters, models in memory, the mean of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError
from ..storage import Array, as_array, float_type, narrowed, widened
from .checkpoint import Checkpoint, TensorInfo
from .dequantizing import DequantizedCheckpoint
from .folders import (
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    FolderCheckpoint,
    PickleCheckpoint,
    quantization_method,
)
from .headers import read_json
from .hub import pinned_source, resolve
from .lora import ADAPTER_CONFIG, LoraCheckpoint, find_lora

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = [
    "INDEX_FILE",
    "PLAIN",
    "SINGLE_FILE",
    "Checkpoint",
    "FolderCheckpoint",
    "LoraCheckpoint",
    "MeanCheckpoint",
    "ModelCheckpoint",
    "PickleCheckpoint",
    "Reading",
    "TensorInfo",
    "open_checkpoint",
    "open_checkpoints",
    "pinned_source",
    "resolve",
]


@dataclass(frozen=True)
class Reading:
    """What may be read beside plain safetensors."""

    allow_pickle: bool = False
    """Also ``.bin`` files, with ``weights_only=True``: plain tensors, no code."""

    dequantize: bool = False
    """Also quantised weights, as what they stand for."""


PLAIN = Reading()
"""Safetensors alone."""


def open_checkpoints(paths: Mapping[str, str], reading: Reading = PLAIN) -> dict[str, Checkpoint]:
    """Open several checkpoints.

    Args:
        paths: label → folder or hub id (``org/model`` or ``org/model@revision``).
        reading: what may be read.

    Raises:
        CheckpointError: any of them cannot be opened; the faults of all are listed at once.
    """
    opened: dict[str, Checkpoint] = {}
    faults = []
    for label, path in paths.items():
        try:
            opened[label] = open_checkpoint(str(path), label, reading)
        except CheckpointError as fault:
            faults.append(str(fault))
    if faults:
        raise CheckpointError("\n".join(faults))
    return opened


def open_checkpoint(path: str, label: str, reading: Reading = PLAIN) -> Checkpoint:
    """Open one checkpoint, of whatever kind it is.

    Raises:
        CheckpointError: it cannot be opened.
    """
    if not path.strip():
        raise CheckpointError(f"{label}: the path is empty. Give a folder or a hub id such as 'org/model@revision'.")
    try:
        folder = resolve(path, label)
        return _open_folder(folder, label, pinned_source(path, folder), reading)
    except OSError as fault:
        raise CheckpointError(f"{label} ({path}): cannot be read: {fault.strerror or fault}") from fault


def _open_folder(folder: Path, label: str, source: str, reading: Reading) -> Checkpoint:
    has_safetensors = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    has_pickle = any((folder / name).is_file() for name in (PICKLE_FILE, PICKLE_INDEX_FILE))
    adapter = find_lora(folder, label)
    if adapter is not None:
        if has_safetensors or has_pickle:
            raise CheckpointError(
                f"{label} ({source}): it holds both the weights of a whole model and an adapter ({ADAPTER_CONFIG}). "
                "Give a folder with the one that is meant."
            )
        return LoraCheckpoint(adapter, label, source, reading.allow_pickle)
    if reading.allow_pickle and not has_safetensors and has_pickle:
        return PickleCheckpoint(folder, label, source)
    if reading.dequantize and quantization_method(read_json(folder / "config.json")) is not None:
        return DequantizedCheckpoint(folder, label, source)
    return FolderCheckpoint(folder, label, source)


class MeanCheckpoint(Checkpoint):
    """The mean of some checkpoints, for want of a base."""

    def __init__(self, members: Sequence[Checkpoint]) -> None:
        self.label = "the mean of the experts"
        self.source = "the mean of the experts"
        self.members = members

    @property
    def tensors(self) -> dict[str, TensorInfo]:  # type: ignore[override]
        """Those of the first member, as they are now."""
        return self.members[0].tensors

    @property
    def whole(self) -> Checkpoint:
        return MeanCheckpoint([member.whole for member in self.members])

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self.members[0].raw_config

    @property
    def config(self) -> PretrainedConfig:
        return self.members[0].config

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        rows = [member.read_rows(name, start, stop) for member in self.members]
        with np.errstate(over="ignore", invalid="ignore"):
            return narrowed(np.stack([widened(each) for each in rows]).mean(axis=0), rows[0].dtype)


class ModelCheckpoint(Checkpoint):
    """The weights of a model that is already loaded."""

    def __init__(self, model: nn.Module, label: str = "base") -> None:
        self.label = label
        self.source = str(getattr(model, "name_or_path", "") or "a loaded model")
        self._model_config: PretrainedConfig = model.config  # type: ignore[assignment]
        self._state = model.state_dict()
        if any(".lora_A." in name for name in self._state):
            raise CheckpointError(
                f"{label} ({self.source}): the model carries a LoRA. Merge it with merge_and_unload() first."
            )
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), float_type(tensor.dtype)) for name, tensor in self._state.items()
        }

    @property
    def config(self) -> PretrainedConfig:
        return self._model_config

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._state[name].detach()
        return as_array((tensor.reshape(1) if tensor.ndim == 0 else tensor)[start:stop].cpu())
