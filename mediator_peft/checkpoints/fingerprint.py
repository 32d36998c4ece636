"""Fingerprint of a backbone: shapes and sampled values of a few tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..deferred import torch
from ..errors import BackboneMismatchError, CheckpointError, UnsupportedError
from ..kernels.build_loops import rounded
from ..storage import FLOAT_TYPES, Array, FloatType, as_array, code_of, widened
from .name_mapping import named_as_in_model
from .opening import open_checkpoint
from .tensor_inventory import Outline
from .tied_head import supply_head

if TYPE_CHECKING:
    from torch import Tensor


_NUM_TENSORS = 24
_NUM_VALUES = 16


def sampled_names(names: Iterable[str]) -> list[str]:
    """The tensors that are sampled: evenly spaced among the sorted names."""
    ordered = sorted(names)
    step = max(1, len(ordered) // _NUM_TENSORS)
    return ordered[::step]


def sample(tensor: Array | Tensor) -> dict[str, Any]:
    """Shape of a tensor and values evenly spaced over it."""
    flat = tensor.reshape(-1)
    step = max(1, len(flat) // _NUM_VALUES)
    # An odd stride does not run down one column.
    values = flat[:: step | 1][:_NUM_VALUES]
    few = values if isinstance(values, np.ndarray) else as_array(values.cpu())
    return {"shape": list(tensor.shape), "values": widened(few).tolist()}


def holds_numbers(tensor: Array | Tensor) -> bool:
    """Whether a tensor holds its own numbers: subclasses hold codes, or one device's part."""
    if isinstance(tensor, np.ndarray):
        return True
    is_here = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return is_here and tensor.is_floating_point() and tensor.dtype.itemsize >= 2


def _kind_of(tensor: Array | Tensor) -> FloatType:
    array = tensor if isinstance(tensor, np.ndarray) else as_array(tensor.detach().reshape(-1)[:0].cpu())
    return FLOAT_TYPES[code_of(array)]


def fingerprint_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Samples of a backbone: tensor name → what :func:`sample` gives."""
    return {name: sample(state[name]) for name in sampled_names(state)}


def difference_from_sample(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str | None:
    """What of a backbone in memory differs from its fingerprint; None where nothing does."""
    try:
        check_fingerprint(expected, state, "it")
    except BackboneMismatchError as fault:
        return str(fault).partition(":")[0]
    return None


def difference_from_files(state: Mapping[str, Tensor], folder: Path, outline: Outline) -> str | None:
    """What of a backbone in memory differs from its files, all values compared; None where nothing does.

    Values of the files are rounded to the dtype in memory before they are compared. Tensors that are quantised or not
    in memory are passed over. A tensor that the files do not have, under whatever name transformers reads it from,
    differs.

    Args:
        state: tensor name → tensor of the backbone in memory.
        folder: of its files.
        outline: of the backbone in memory.
    """
    try:
        stored = named_as_in_model(open_checkpoint(str(folder), "the backbone"), outline)
        supply_head(stored, outline.names)
    except (CheckpointError, UnsupportedError):
        return "its folder cannot be read as this model"
    for name, tensor in state.items():
        if not holds_numbers(tensor):
            continue
        if name not in stored.tensors:
            return f"{name!r} is not in its files"
        if stored.tensors[name].shape != tuple(tensor.shape):
            return f"{name!r} has shape {list(tensor.shape)}, was {list(stored.tensors[name].shape)}"
        if not torch.equal(stored.tensor(name).to(tensor.dtype), tensor.detach().cpu()):
            return f"{name!r} has other values"
    return None


def check_fingerprint(expected: Mapping[str, Any], state: Mapping[str, Array | Tensor], where: str) -> int:
    """Compare a backbone with the one an adapter was built on.

    A backbone may be loaded in another dtype: the expected values are rounded to it before they are compared.
    Quantised tensors and those that hold no data are passed over; embeddings and norms are never quantised.

    Args:
        expected: tensor name → what :func:`sample` gave.
        state: tensor name → tensor of the backbone at hand.
        where: what the message calls the backbone.

    Returns:
        How many tensors were compared.

    Raises:
        BackboneMismatchError: a tensor is missing or differs.
    """
    num_compared = 0
    for name, known in expected.items():
        tensor = state.get(name)
        if tensor is None:
            raise BackboneMismatchError(
                f"this adapter belongs to a backbone with a tensor {name!r}, which {where} has not. Load the backbone "
                "that the adapter was built with (base_model_name_or_path in adapter_config.json)."
            )
        if not holds_numbers(tensor):
            continue
        found = sample(tensor)
        values = widened(rounded(np.array(known["values"], np.float32), _kind_of(tensor))).tolist()
        if found["shape"] != known["shape"] or found["values"] != values:
            raise BackboneMismatchError(
                f"{where} is not the backbone this adapter was built on: {name!r} has shape {found['shape']} and "
                f"values {found['values'][:3]}..., the adapter expects {known['shape']} and {values[:3]}.... Load the "
                "backbone that the adapter was built with (base_model_name_or_path in adapter_config.json); the base "
                "and the experts themselves are not it, unless merge_method is 'base'."
            )
        num_compared += 1
    return num_compared
