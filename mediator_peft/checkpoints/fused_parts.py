"""Fused experts of a mixture of experts, seen one matrix at a time.

A tensor ``experts.gate_up_proj`` (E, O, I) of the model is E tensors ``experts.gate_up_proj.0.weight`` and so on to all
that merges, and ``experts.gate_up_proj_bias`` (E, O) is ``experts.gate_up_proj.0.bias`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..storage import FLOAT32, Array
from ..structure import LinearLayer
from .checkpoint import Checkpoint, TensorInfo
from .opening import MeanCheckpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


_NOTHING = np.empty(0, np.float32)


class Part(NamedTuple):
    """One entry of a tensor's first dimension."""

    tensor: str
    number: int


def parts_of(layers: Iterable[LinearLayer]) -> dict[str, Part]:
    """Name of each part's tensor → where it lies; of those layers that are parts of fused tensors."""
    found = {}
    for layer in layers:
        if layer.part is not None:
            found[f"{layer.name}.weight"] = Part(layer.part.tensor, layer.part.number)
            if layer.part.bias is not None:
                found[f"{layer.name}.bias"] = Part(layer.part.bias, layer.part.number)
    return found


def transposed_tensors(layers: Iterable[LinearLayer]) -> set[str]:
    """Fused tensors that hold their matrices as (inputs, outputs)."""
    return {layer.part.tensor for layer in layers if layer.part is not None and layer.is_transposed}


class SplitCheckpoint(Checkpoint):
    """A checkpoint that has the parts of fused tensors in their place.

    Args:
        whole: with the model's own tensors.
        parts: name of a part → where it lies.
    """

    def __init__(self, whole: Checkpoint, parts: Mapping[str, Part]) -> None:
        self.label, self.source, self.folder, self.unlisted = whole.label, whole.source, whole.folder, whole.unlisted
        self._whole, self._parts = whole, {name: part for name, part in parts.items() if part.tensor in whole.tensors}
        fused = {part.tensor for part in self._parts.values()}
        self.tensors = {name: info for name, info in whole.tensors.items() if name not in fused}
        for name, part in self._parts.items():
            info = whole.tensors[part.tensor]
            self.tensors[name] = TensorInfo(info.shape[1:], info.dtype)
        self._held: tuple[str, Array] = ("", _NOTHING)

    @property
    def whole(self) -> Checkpoint:
        return self._whole

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self._whole.raw_config

    @property
    def config(self) -> PretrainedConfig:
        return self._whole.config

    @property
    def is_tied(self) -> bool:
        return self._whole.is_tied

    @property
    def files(self) -> list[Path]:
        return self._whole.files

    def place(self, name: str) -> tuple[Path, int] | None:
        part = self._parts.get(name)
        return self._whole.place(name if part is None else part.tensor)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return None if name in self._parts else self._whole.factors(name)

    def held_bytes(self, name: str) -> int:
        part = self._parts.get(name)
        if part is None:
            return self._whole.held_bytes(name)
        info = self.tensors[name]
        own = prod(info.shape) * (info.dtype or FLOAT32).itemsize
        return own + self._whole.held_bytes(part.tensor)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._parts:
            return self._whole.read_rows(name, start, stop)
        return self.read_groups(name, [(start, stop)])

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        if name not in self._parts:
            return self._whole.read_groups(name, groups)
        if len(self.tensors[name].shape) == 2:
            rows = self._whole.read_part(*self._parts[name], groups)
            if rows is not None:
                return rows
        return np.concatenate([self._matrix(name)[start:stop] for start, stop in groups or [(0, 0)]])

    def _matrix(self, name: str) -> Array:
        """One part, which is held until another is read: it is asked for some rows at a time."""
        if self._held[0] != name:
            self._held = ("", _NOTHING)
            tensor, number = self._parts[name]
            # What was read may lie in a buffer that the next reading uses.
            self._held = (name, self._whole.read_rows(tensor, number, number + 1)[0].copy())
        return self._held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": ("", _NOTHING)}


def split_checkpoint(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> Checkpoint:
    """A checkpoint with parts in the place of fused tensors; of the mean of several, each of these."""
    if not parts:
        return checkpoint
    if isinstance(checkpoint, MeanCheckpoint):
        return MeanCheckpoint([split_checkpoint(member, parts) for member in checkpoint.members])
    return SplitCheckpoint(checkpoint, parts)
