"""Checks that base and experts belong together. All faults are found before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint, TensorInfo
from ..checkpoints.fused_parts import Part, parts_of, split_checkpoint, transposed_tensors
from ..checkpoints.lora import LoraCheckpoint
from ..checkpoints.name_mapping import named_as_in_model
from ..checkpoints.opening import MeanCheckpoint
from ..checkpoints.stray_tensors import leave_out_strays
from ..checkpoints.tensor_inventory import Outline, outline_of
from ..checkpoints.tied_head import settle_heads, tied_sources
from ..checkpoints.vocabulary import aligned
from ..errors import CheckpointError, CheckpointMismatchError, UnsupportedError
from ..storage import FLOAT32, FloatType
from ..structure import Structure
from .config_comparison import compare_configs

_LISTED = 8


class Job(NamedTuple):
    """Checkpoints that were found to belong together."""

    base: Checkpoint
    experts: dict[str, Checkpoint]
    structure: Structure
    names: list[str]
    """Tensors to merge: those of the base, without names that are tied to another."""

    dtype: FloatType
    """In which differences are taken and the backbone is stored: the coarsest of the experts'."""

    notes: tuple[str, ...] = ()
    """What was done to make them fit."""

    parameters: frozenset[str] = frozenset()
    """Those of the names that are parameters of the model: no buffers, and nothing that it does not know."""

    always: Mapping[str, Any] = {}
    """Name → always-on delta (``AlwaysOn``) that every prompt gets."""

    parts: Mapping[str, Part] = {}
    """Those of the names that are parts of fused tensors → where these lie; see :func:`split_job`."""

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the backbone's files → shape: the names, with fused tensors in the place of their parts."""
        tensors = self.base.whole.tensors
        return {name: tensors[name].shape for name in dict.fromkeys(map(self.stored_name, self.names))}

    def stored_name(self, name: str) -> str:
        """The tensor of the backbone's files that holds a tensor to merge."""
        return self.parts[name].tensor if name in self.parts else name


def check_job(base: Checkpoint, experts: Mapping[str, Checkpoint], may_untie: bool = False) -> Job:
    """Compare base and experts by their headers alone.

    Args:
        base: what the experts were fine-tuned from.
        experts: name → checkpoint.
        may_untie: whether the output may have an ``lm_head`` that the base ties to the embedding.

    Raises:
        CheckpointMismatchError: tensors, shapes, dtypes or settings differ; every fault is listed.
        UnsupportedError: the architecture is not supported.
    """
    job, faults = examine_job(base, experts, may_untie)
    if faults:
        raise CheckpointMismatchError(
            "base and experts do not belong together:\n- "
            + "\n- ".join(faults)
            + "\nFine-tune all experts from one base; where tokens were added, resize the embeddings of base and "
            "experts to one vocabulary."
        )
    return job


def split_job(job: Job) -> Job:
    """The job with each matrix of fused experts as a tensor of its own, as far as they can get deltas.

    Each is then merged as a linear layer is: its own threshold, sign consensus, density and conflict.
    """
    parts = {name: part for name, part in parts_of(job.structure.layers).items() if part.tensor in job.base.tensors}
    if not parts or job.parts:
        return job
    fused = {part.tensor for part in parts.values()}
    always = {
        name: entry._replace(
            checkpoint=split_checkpoint(entry.checkpoint, parts), reference=split_checkpoint(entry.reference, parts)
        )
        for name, entry in job.always.items()
    }
    return job._replace(
        base=split_checkpoint(job.base, parts),
        experts={name: split_checkpoint(expert, parts) for name, expert in job.experts.items()},
        names=[name for name in job.names if name not in fused] + list(parts),
        always=always,
        parts=parts,
    )


def examine_job(base: Checkpoint, experts: Mapping[str, Checkpoint], may_untie: bool = False) -> tuple[Job, list[str]]:
    """As :func:`check_job`, but the faults are given back.

    Raises:
        CheckpointError: the base is an adapter.
        UnsupportedError: the architecture is not supported.
    """
    if isinstance(base, LoraCheckpoint):
        raise CheckpointError(base.no_base())
    outline = outline_of(base)
    base, experts = _named_as_in_model(base, experts, outline)
    # The mean of the experts is what they are.
    first = [] if isinstance(base, MeanCheckpoint) else [base]
    whole = [*first, *(expert for expert in experts.values() if not isinstance(expert, LoraCheckpoint))]
    leave_out_strays(whole, outline)
    untied = settle_heads(whole, outline, may_untie)
    if untied:
        outline = outline_of(base)
    tied = set(outline.tied)
    needed = outline.names - tied
    faults = []
    for expert in experts.values():
        if isinstance(expert, LoraCheckpoint):
            faults += expert.bind(base, tied_sources(outline), transposed_tensors(outline.structure.layers))
    seen = {name: aligned(expert, base) for name, expert in experts.items()}
    experts = {name: expert for name, (expert, _) in seen.items()}
    compared = compare_configs(base, experts.values())
    notes = (*untied, *(note for _, note in seen.values() if note is not None), *compared.notes)
    faults += compared.faults
    names = [name for name in base.tensors if name not in tied]
    missing = sorted(needed - set(names))
    if missing:
        _refuse_other_class(base, outline)
    faults += _listed(f"{base.label} lacks tensors that {outline.class_name} has", missing)
    reference = {name: base.tensors[name] for name in names}
    for expert in experts.values():
        faults += _tensor_faults(expert, reference, base.label, tied)
    for checkpoint in (base, *experts.values()):
        odd = [name for name in reference if name in checkpoint.tensors and checkpoint.tensors[name].dtype is None]
        faults += _listed(f"{checkpoint.label} has tensors that are no plain floating point (quantised?)", odd)
    dtypes = {info.dtype for expert in experts.values() for info in expert.tensors.values() if info.dtype}
    dtype = coarsest(sorted(dtypes, key=str) or [FLOAT32])
    parameters = (outline.names - outline.buffers) & set(names)
    return Job(base, experts, outline.structure, names, dtype, notes, parameters), faults


def _named_as_in_model(
    base: Checkpoint, experts: Mapping[str, Checkpoint], outline: Outline
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """All checkpoints with the names of the model; a mean of experts is one of these same checkpoints."""
    named = {name: named_as_in_model(expert, outline) for name, expert in experts.items()}
    if isinstance(base, MeanCheckpoint):
        seen = {id(expert): named[name] for name, expert in experts.items()}
        return MeanCheckpoint([seen[id(member)] for member in base.members]), named
    return named_as_in_model(base, outline), named


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


def coarsest(dtypes: Sequence[FloatType]) -> FloatType:
    """The dtype with the fewest digits, e.g. bfloat16 of (float32, bfloat16)."""
    return min(dtypes, key=lambda dtype: dtype.num_digits)


def _refuse_other_class(base: Checkpoint, outline: Outline) -> None:
    """Name the class of a base that lacks tensors since it is no causal language model.

    Raises:
        UnsupportedError: its configuration names another class.
    """
    named = base.raw_config.get("architectures") or getattr(base.config, "architectures", None)
    if isinstance(named, list) and named and outline.class_name not in named:
        raise UnsupportedError(
            f"{base.label} ({base.source}) is a {named[0]}, no causal language model ({outline.class_name}); these "
            "alone are supported."
        )


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return [f"{what}: {', '.join(items[:_LISTED])}{more}"]
