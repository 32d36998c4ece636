"""Checks that base and experts belong together. All faults are found before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..checkpoints.checkpoint import Checkpoint, TensorInfo
from ..checkpoints.lora import LoraCheckpoint
from ..checkpoints.tensor_inventory import is_known, outline_of
from ..checkpoints.vocabulary import aligned
from ..errors import CheckpointMismatchError
from ..structure import Structure

# Settings that change what the same weights compute.
_MEANINGFUL = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)
# How files of former versions of transformers call some of them.
_FORMER_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "hidden_activation")
_LISTED = 8


class Job(NamedTuple):
    """Checkpoints that were found to belong together."""

    base: Checkpoint
    experts: dict[str, Checkpoint]
    structure: Structure
    names: list[str]
    """Tensors to merge: those of the base, without names that are tied to another."""

    dtype: torch.dtype
    """In which differences are taken and the backbone is stored: the coarsest of the experts'."""

    notes: tuple[str, ...] = ()
    """What was done to make them fit."""


def check_job(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Job:
    """Compare base and experts by their headers alone.

    Raises:
        CheckpointMismatchError: tensors, shapes, dtypes or settings differ; every fault is listed.
        UnsupportedError: the architecture is not supported.
    """
    job, faults = examine_job(base, experts)
    if faults:
        raise CheckpointMismatchError(
            "base and experts do not belong together:\n- "
            + "\n- ".join(faults)
            + "\nFine-tune all experts from one base; where tokens were added, resize the embeddings of base and "
            "experts to one vocabulary."
        )
    return job


def examine_job(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> tuple[Job, list[str]]:
    """As :func:`check_job`, but the faults are given back.

    Raises:
        UnsupportedError: the architecture is not supported.
    """
    outline = outline_of(base)
    tied = set(outline.tied)
    needed = outline.names - tied
    faults = []
    for expert in experts.values():
        if isinstance(expert, LoraCheckpoint):
            faults += expert.bind(base, tied)
    seen = {name: aligned(expert, base) for name, expert in experts.items()}
    experts = {name: expert for name, (expert, _) in seen.items()}
    notes = tuple(note for _, note in seen.values() if note is not None)
    faults += _config_faults(base, experts.values())
    names = [name for name in base.tensors if name not in tied]
    faults += _listed(f"{base.label} lacks tensors that {outline.class_name} has", sorted(needed - set(names)))
    reference = {name: base.tensors[name] for name in names}
    for expert in experts.values():
        faults += _tensor_faults(expert, reference, base.label, tied)
    for checkpoint in (base, *experts.values()):
        odd = [name for name in reference if name in checkpoint.tensors and checkpoint.tensors[name].dtype is None]
        faults += _listed(f"{checkpoint.label} has tensors that are no plain floating point (quantised?)", odd)
    dtypes = {info.dtype for expert in experts.values() for info in expert.tensors.values() if info.dtype}
    dtype = coarsest(sorted(dtypes, key=str) or [torch.float32])
    return Job(base, experts, outline.structure, names, dtype, notes), faults


def _tensor_faults(
    expert: Checkpoint, reference: Mapping[str, TensorInfo], base_label: str, tied: set[str]
) -> list[str]:
    have = {name: info for name, info in expert.tensors.items() if name not in tied}
    faults = _listed(f"{expert.label} lacks tensors of {base_label}", sorted(set(reference) - set(have)))
    faults += _listed(f"{expert.label} has tensors that {base_label} has not", sorted(set(have) - set(reference)))
    return faults + _listed(
        f"{expert.label} has tensors of other shapes than {base_label}",
        [
            f"{name}: {list(info.shape)}, not {list(reference[name].shape)}"
            for name, info in have.items()
            if name in reference and info.shape != reference[name].shape
        ],
    )


def coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype with the fewest digits, e.g. bfloat16 of (float32, bfloat16)."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _config_faults(base: Checkpoint, experts: Iterable[Checkpoint]) -> list[str]:
    faults = []
    for expert in experts:
        if _say_the_same(base.raw_config, expert.raw_config):
            continue
        for key in _MEANINGFUL:
            ours, theirs = getattr(base.config, key, None), getattr(expert.config, key, None)
            if ours != theirs:
                faults.append(f"{expert.label} has {key} = {theirs!r} in config.json, the base has {ours!r}")
    return faults


def _say_the_same(ours: Mapping[str, object], theirs: Mapping[str, object]) -> bool:
    """Whether two ``config.json`` of known models agree word for word; where not, they may still mean it."""
    keys = (*_MEANINGFUL, *_FORMER_NAMES)
    return is_known(ours) and is_known(theirs) and all(ours.get(key) == theirs.get(key) for key in keys)


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return [f"{what}: {', '.join(items[:_LISTED])}{more}"]
