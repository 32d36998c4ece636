"""verify_mediator(): checks that an output is complete, and compares it with its inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from ..checkpoints.adapter_files import WEIGHTS_FILE, backbone_of, bank_key, find_adapter, read_settings
from ..checkpoints.checksums import accept_files, all_problems, is_merged_model, write_merged_checksums
from ..checkpoints.fingerprint import check_fingerprint
from ..checkpoints.fused_parts import parts_of, split_checkpoint, transposed_tensors
from ..checkpoints.headers import read_header
from ..checkpoints.lora import LoraCheckpoint
from ..checkpoints.name_mapping import named_as_in_model
from ..checkpoints.opening import Checkpoint, Reading, open_checkpoint
from ..checkpoints.tensor_inventory import outline_of
from ..checkpoints.tied_head import supply_head
from ..config import MediatorSettings
from ..deferred import torch
from ..errors import AdapterError, BackboneMismatchError, CheckpointError, UnsupportedError
from ..storage import BFLOAT16, FLOAT_TYPES, widened
from .builder import single_thread
from .tensor_work import deltas_needed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Verification:
    """What was checked, and what was found."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Expert → ``max_difference`` of any weight, the ``tensor`` where it is, ``relative_error`` of all weights, and
    ``is_exact``."""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong. Differences from the experts are no fault: sparse deltas leave something out."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"is_ok": self.is_ok, **asdict(self)}


def verify_mediator(
    path: str | os.PathLike[str],
    against: Mapping[str, str | os.PathLike[str]] | None = None,
    base: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Verification:
    """Check an output: its files by checksum, the backbone by fingerprint, and its weights against the experts.

    Args:
        path: what ``build_mediator`` wrote, or ``merge_models``: then its files are compared with their checksums.
        against: expert name (or ``"base"``) → checkpoint: backbone plus the whole delta is compared with it, tensor by
            tensor. With density 1, ``encoding="float"``, all blocks routed and experts that differ from the base in
            targeted layers only, the difference is 0.
        base: needed where an expert in ``against`` is a LoRA.
        allow_pickle: also read ``.bin`` files.

    Returns:
        What was found. Damage does not raise; it is listed.

    Raises:
        AdapterError: there is no adapter at all, or it has no expert of a name in ``against``.
        CheckpointError: something in ``against`` cannot be read.
    """
    merged, found = Path(path).expanduser(), Verification()
    if is_merged_model(merged):
        if against:
            raise AdapterError(f"{str(path)!r} is a merged model without experts; there is nothing to compare.")
        _check_files(merged, merged, found)
        return found
    adapter = find_adapter(merged)
    try:
        config = read_settings(adapter)
    except AdapterError as fault:
        # Without it, where the backbone lies is not known.
        found.problems.append(str(fault))
        return found
    folder = Path(backbone_of(adapter, config.base_model_name_or_path))
    _check_files(folder, adapter, found)
    _check_adapter(adapter, found)
    try:
        backbone = open_checkpoint(str(folder), "the backbone")
        outline = outline_of(backbone)
        backbone = named_as_in_model(backbone, outline)
    except (CheckpointError, UnsupportedError) as fault:
        found.problems.append(str(fault))
        return found
    _check_fingerprint(backbone, config, found)
    parts = parts_of(outline.structure.layers)
    transposed = {layer.name for layer in outline.structure.layers if layer.is_transposed}
    for name, other in (against or {}).items():
        if name not in config.columns:
            raise AdapterError(f"this adapter has no expert {name!r}; it has {config.columns}.")
        expert = open_checkpoint(str(other), f"expert {name!r}", Reading(allow_pickle))
        if isinstance(expert, LoraCheckpoint):
            if base is None:
                raise CheckpointError(f"expert {name!r} is a LoRA: give its base as well (base=).")
            source = named_as_in_model(open_checkpoint(str(base), "base", Reading(allow_pickle)), outline)
            supply_head(source, backbone.tensors)
            expert.bind(source, {}, transposed_tensors(outline.structure.layers))
        else:
            expert = named_as_in_model(expert, outline)
            supply_head(expert, backbone.tensors)
        try:
            with single_thread():
                sides = split_checkpoint(backbone, parts), split_checkpoint(expert, parts)
                found.differences[name] = _compare(*sides, adapter, config, name, transposed)
        except (AdapterError, OSError) as fault:
            found.problems.append(f"expert {name!r}: {fault}")
    return found


def accept_output(path: str | os.PathLike[str]) -> Verification:
    """Take an output's files as they are now for what was written: new checksums, after an edit on purpose.

    Args:
        path: what ``build_mediator`` or ``save_pretrained`` wrote.

    Returns:
        What :func:`verify_mediator` finds afterwards.

    Raises:
        AdapterError: there is no adapter, its configuration cannot be read, or it names the experts in another order
            than that of the router's tensors.
    """
    if is_merged_model(Path(path).expanduser()):
        write_merged_checksums(Path(path).expanduser())
        return verify_mediator(path)
    adapter = find_adapter(Path(path).expanduser())
    folder = Path(backbone_of(adapter, read_settings(adapter).base_model_name_or_path))
    accept_files(adapter, folder if folder.is_dir() else None)
    return verify_mediator(path)


_LISTED = 5


def _check_files(folder: Path, adapter: Path, found: Verification) -> None:
    try:
        found.problems += all_problems(adapter, folder, found.checked)
    except AdapterError as fault:
        found.problems.append(str(fault))


def _check_adapter(adapter: Path, found: Verification) -> None:
    """Numbers of the deltas and of the router must be finite, and the router's tensors must be of one router."""
    try:
        odd = list(_odd_tensors(adapter / WEIGHTS_FILE))
    except (ValueError, OSError) as fault:
        found.problems.append(f"{WEIGHTS_FILE} is missing or damaged: {fault}")
        return
    if odd:
        found.problems.append(f"{WEIGHTS_FILE} holds NaN or infinite values in {', '.join(odd[:_LISTED])}")


def _odd_tensors(path: Path) -> Iterator[str]:
    """Tensors of a file that hold NaN or infinity."""
    stored, _ = read_header(path)
    with open(path, "rb") as file:
        for name, place in stored.items():
            if place.dtype in FLOAT_TYPES:
                file.seek(place.offset)
                array = np.frombuffer(file.read(place.num_bytes), FLOAT_TYPES[place.dtype].array)
                if not np.isfinite(widened(array) if place.dtype == BFLOAT16.code else array).all():
                    yield name


def _check_fingerprint(backbone: Checkpoint, config: MediatorSettings, found: Verification) -> None:
    expected = config.backbone_fingerprint or {}
    try:
        state = {name: backbone.read(name) for name in expected if name in backbone.tensors}
        check_fingerprint(expected, state, "the backbone")
        found.checked.append("fingerprint of the backbone")
    except (BackboneMismatchError, OSError) as fault:
        found.problems.append(str(fault))


def _compare(
    backbone: Checkpoint,
    expert: Checkpoint,
    adapter: Path,
    config: MediatorSettings,
    column: str,
    transposed: set[str],
) -> dict[str, Any]:
    """Backbone plus the whole delta, against the expert rounded to the backbone's dtype."""
    layers = set(config.routed_modules or ())
    if config.column_map is None:
        terms = [(column, 1.0)] if column in deltas_needed(config) else []
    else:
        # An always-on delta is a part of what every expert answers with, and no part of the expert.
        terms = [(stored, row[column]) for stored, row in config.column_map.items() if column in row]
    largest, where, norm, distance = 0.0, "", 0.0, 0.0
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        for name in backbone.tensors:
            ours, dtype = backbone.tensor(name).float(), backbone.tensors[name].dtype
            if name not in expert.tensors or dtype is None or expert.tensors[name].shape != tuple(ours.shape):
                raise AdapterError(f"it has no tensor {name!r} of shape {list(ours.shape)}")
            theirs = expert.tensor(name).to(dtype.torch).float()
            layer, _, part = name.rpartition(".")
            for stored, factor in terms if layer in layers else ():
                ours = ours + factor * _delta(file, layer, part, stored, config, ours, layer in transposed)
            difference = (ours - theirs).abs()
            top = float(difference.max()) if difference.numel() else 0.0
            if top > largest:
                largest, where = top, name
            norm += float(theirs.square().sum(dtype=torch.float64))
            distance += float(difference.square().sum(dtype=torch.float64))
    relative = (distance / norm) ** 0.5 if norm else 0.0
    return {"max_difference": largest, "tensor": where, "relative_error": relative, "is_exact": largest == 0.0}


def _delta(
    file: Any, layer: str, part: str, column: str, config: MediatorSettings, like: Tensor, is_transposed: bool
) -> Tensor:
    from ..bank.layer_bank import LayerBank, from_disk
    from ..bank.packed_arrays import written

    if part == "bias":
        key = f"{column}:bias"
        return from_disk(key, file.get_tensor(bank_key(layer, key)), (len(like), 1)).float()
    rows, columns = like.T.shape if is_transposed else like.shape
    bank = LayerBank((rows, columns), config.encoding, has_bias=False)
    for name in bank.part_names:
        key = f"{column}:{name}"
        _, stored = written(key, layer, lambda place: file.get_tensor(bank_key(layer, place)))
        bank.put_part(key, from_disk(key, stored, bank.shape))
    delta = bank.get(column)
    assert delta is not None
    return delta.dense().T if is_transposed else delta.dense()
