"""Tensors by the names they have in the model, whatever they are called in the files.

Names differ where a checkpoint was written for another class (GPT-2 without ``transformer.``), by a former version of
transformers, or in a form that is converted while it is loaded (one matrix for each expert of a mixture of experts).
All of it is asked of transformers: its renamings, its conversions and what it ignores; none is listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..deferred import torch
from ..errors import UnsupportedError
from ..storage import FLOAT32, Array, as_array, float_type
from .checkpoint import Checkpoint, TensorInfo
from .folders import FolderCheckpoint
from .tensor_inventory import Outline, loading_faults, skeleton

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class _Conversion(NamedTuple):
    """Tensors of the files that together become tensors of the model."""

    converter: Any
    """A ``WeightConverter`` of transformers, without tensors."""

    target: str
    """The model's tensor that it is known by."""

    sources: tuple[tuple[str, str], ...]
    """Tensors of the files, and for each the pattern of the converter that it matched; in the converter's order."""


class NamedCheckpoint(Checkpoint):
    """A checkpoint seen with the names of the model.

    Args:
        stored: the checkpoint as its files have it.
        names: tensor of the model → the tensor of the files that it is, under another name or the same.
        conversions: tensor of the model → what it is made from.
        made: tensor of the model → shape and dtype, for all that are made.
        model: the model that the names are of; may lie on the meta device.
    """

    folder: Path

    def __init__(
        self,
        stored: FolderCheckpoint,
        names: Mapping[str, str],
        conversions: Mapping[str, _Conversion],
        made: Mapping[str, TensorInfo],
        model: Any,
    ) -> None:
        self.label, self.source, self.folder = stored.label, stored.source, stored.folder
        self.stored, self._names, self._conversions, self._model = stored, dict(names), dict(conversions), model
        self.unlisted = frozenset(name for name, stored_name in names.items() if stored_name in stored.unlisted)
        self.tensors = {name: stored.tensors[stored_name] for name, stored_name in names.items()} | dict(made)
        self._made_as: dict[str, str] = {}
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self.stored.raw_config

    @property
    def config(self) -> PretrainedConfig:
        return self.stored.config

    @property
    def files(self) -> list[Path]:
        return self.stored.files

    def take_as(self, name: str, source: str) -> None:
        self.tensors[name] = self.tensors[source]
        if source in self._names:
            self._names[name] = self._names[source]
        else:
            self._conversions[name], self._made_as[name] = self._conversions[source], self._made_as.get(source, source)

    def set_untied(self) -> None:
        self.stored.set_untied()

    def place(self, name: str) -> tuple[Path, int] | None:
        return self.stored.place(self._names[name]) if name in self._names else None

    def held_bytes(self, name: str) -> int:
        conversion = self._conversions.get(name)
        if conversion is None:
            return 0
        infos = (self.stored.tensors[source] for source, _ in conversion.sources)
        # What is read, and what is made of it.
        return 2 * sum(prod(info.shape) * (info.dtype or FLOAT32).itemsize for info in infos)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self.read_groups(name, [(start, stop)])

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        if name in self._names:
            self._held = ("", {})
            return self.stored.read_groups(self._names[name], groups)
        tensor = self._converted(name)
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        return as_array(torch.cat([tensor[start:stop] for start, stop in groups or [(0, 0)]]))

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        if name not in self._names:
            return None
        self._held = ("", {})
        return self.stored.read_part(self._names[name], number, groups)

    def _converted(self, name: str) -> Tensor:
        """One tensor that is made from others; all that come of the same tensors are held until another is read."""
        conversion = self._conversions[name]
        if self._held[0] != conversion.target:
            self._held = ("", {})
            read = {source: self.stored.tensor(source) for source, _ in conversion.sources}
            self._held = (conversion.target, _convert(conversion, read, self._model))
        return self._held[1][self._made_as.get(name, name)]


def named_as_in_model(checkpoint: Checkpoint, outline: Outline) -> Checkpoint:
    """A checkpoint seen with the names of the model; itself where it has these.

    Args:
        checkpoint: of any kind; LoRA adapters and loaded models have the model's names already.
        outline: of the model.

    Raises:
        UnsupportedError: transformers cannot convert its tensors.
    """
    if not isinstance(checkpoint, FolderCheckpoint):
        return checkpoint
    if outline.model is None and outline.names - outline.tied <= checkpoint.tensors.keys():
        return checkpoint  # known by heart, and nothing is missing
    model: Any = outline.model or skeleton(checkpoint.config)
    names, conversions = _mapping(checkpoint, model)
    if len(names) == len(checkpoint.tensors) and all(name == stored for name, stored in names.items()):
        return checkpoint
    made: dict[str, TensorInfo] = {}
    of_tensor: dict[str, _Conversion] = {}
    for conversion in conversions:
        for name, info in _shapes(conversion, checkpoint, model).items():
            made[name], of_tensor[name] = info, conversion
    return NamedCheckpoint(checkpoint, names, of_tensor, made, model)


def _mapping(checkpoint: FolderCheckpoint, model: Any) -> tuple[dict[str, str], list[_Conversion]]:
    """What each tensor of the files becomes: the steps that transformers takes when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    sources: dict[str, list[tuple[str, str]]] = {}
    unexpected: list[str] = []
    for stored in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name not in state:
            unexpected.append(stored)
        elif pattern is None:
            names.setdefault(name, stored)
        else:
            sources.setdefault(name, []).append((stored, pattern))
    for stored in loading_faults(model, (), unexpected)[1]:
        names.setdefault(stored, stored)
    conversions = [
        _Conversion(by_pattern[found[0][1]], name, tuple(found)) for name, found in sources.items() if name not in names
    ]
    return names, conversions


def _shapes(conversion: _Conversion, checkpoint: Checkpoint, model: Any) -> dict[str, TensorInfo]:
    """What a conversion makes, without reading anything."""
    infos = {source: checkpoint.tensors[source] for source, _ in conversion.sources}
    dtypes = {info.dtype for info in infos.values()}
    empty = {
        source: torch.empty(info.shape, dtype=info.dtype.torch if info.dtype else torch.uint8, device="meta")
        for source, info in infos.items()
    }
    made = _convert(conversion, empty, model)
    return {
        name: TensorInfo(tuple(tensor.shape), None if None in dtypes else float_type(tensor.dtype))
        for name, tensor in made.items()
    }


def _convert(conversion: _Conversion, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    converter = deepcopy(conversion.converter)
    for source, pattern in conversion.sources:
        converter.add_tensor(conversion.target, source, pattern, tensors[source])
    try:
        made = converter.convert(conversion.target, model=model, config=model.config)
    except Exception as fault:  # whatever tensors of unfit shapes may raise
        reason = (str(fault) or type(fault).__name__).splitlines()[0]
        raise UnsupportedError(
            f"transformers cannot make {conversion.target!r} of {type(model).__name__} from "
            f"{conversion.sources[0][0]!r} and its like: {reason}"
        ) from fault
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
