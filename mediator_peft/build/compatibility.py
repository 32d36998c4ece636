"""Whether base and experts belong together; every fault is found before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import CheckpointMismatchError, UnsupportedError
from ..structure import Structure, find_structure
from .checkpoints import Checkpoint, TensorInfo
from .lora import LoraCheckpoint

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


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model without weights, on the meta device.

    Raises:
        UnsupportedError: transformers has no causal language model for this configuration.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as fault:
        raise UnsupportedError(
            f"no causal language model for model type {config.model_type!r}: {str(fault).splitlines()[0]}"
        ) from fault


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
    model = skeleton(base.config)
    structure = find_structure(model)
    tied = _tied_names(model, base.config)
    needed = {name for name in model.state_dict() if name not in tied}
    faults = []
    for expert in experts.values():
        if isinstance(expert, LoraCheckpoint):
            faults += expert.bind(base, tied)
    faults += _config_faults(base, experts.values())
    names = [name for name in base.tensors if name not in tied]
    faults += _listed(f"{base.label} lacks tensors that {type(model).__name__} has", sorted(needed - set(names)))
    reference = {name: base.tensors[name] for name in names}
    for expert in experts.values():
        faults += _tensor_faults(expert, reference, base.label, tied)
    for checkpoint in (base, *experts.values()):
        odd = [name for name in reference if name in checkpoint.tensors and checkpoint.tensors[name].dtype is None]
        faults += _listed(f"{checkpoint.label} has tensors that are no plain floating point (quantised?)", odd)
    dtypes = {info.dtype for expert in experts.values() for info in expert.tensors.values() if info.dtype}
    return Job(base, dict(experts), structure, names, coarsest(sorted(dtypes, key=str) or [torch.float32])), faults


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


def _tied_names(model: nn.Module, config: PretrainedConfig) -> set[str]:
    """Names that only repeat another tensor, e.g. ``lm_head.weight`` of tied embeddings."""
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def _config_faults(base: Checkpoint, experts: Iterable[Checkpoint]) -> list[str]:
    faults = []
    for expert in experts:
        for key in _MEANINGFUL:
            ours, theirs = getattr(base.config, key, None), getattr(expert.config, key, None)
            if ours != theirs:
                faults.append(f"{expert.label} has {key} = {theirs!r} in config.json, the base has {ours!r}")
    return faults


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return [f"{what}: {', '.join(items[:_LISTED])}{more}"]
