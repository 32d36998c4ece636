"""build_mediator(): from checkpoints to a backbone and a bank of sparse deltas, the steps in order."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..bank.fingerprint import sample, sampled_names
from ..bank.sparse_delta import SparseDelta
from ..config import MediatorConfig
from ..errors import ConfigError
from ..methods.conflict import CONFLICT_SCORES
from ..progress import Progress, no_progress
from ..structure import LinearLayer, select_layers
from .checkpoints import Checkpoint
from .compatibility import Job
from .merging import MergedTensor, deltas_needed, deltas_to_backbone, merge_tensor, sparsify
from .plan import check_block_numbers, choose_blocks
from .report import BuildReport, DeltaError


@dataclass
class Bank:
    """Deltas by layer and expert, and what was learnt on the way."""

    deltas: dict[str, dict[str, SparseDelta]] = field(default_factory=dict)
    """Layer name → column → delta."""

    errors: dict[str, DeltaError] = field(default_factory=dict)
    counts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Block → conflict score name → summed counts."""

    samples: dict[str, dict[str, object]] = field(default_factory=dict)
    """Fingerprint of the backbone."""


def merge_checkpoints(
    job: Job, config: MediatorConfig, emit: Callable[[str, Tensor], None], progress: Progress = no_progress
) -> tuple[Bank, MediatorConfig, BuildReport]:
    """Merge all tensors; the one piece of work behind offline and in-memory builds.

    Args:
        job: checkpoints that belong together.
        config: what to do.
        emit: takes each tensor of the backbone as it is made, in the storage dtype.
        progress: told of each tensor done.

    Returns:
        The bank; the configuration with what the build found out filled in; the report.
    """
    started = time.perf_counter()
    layers = {layer.name: layer for layer in select_layers(job.structure, config.target_modules)}
    if isinstance(config.routed_layers, (list, tuple)):
        check_block_numbers(config.routed_layers, job.structure.num_blocks)
    bank = Bank(errors={name: DeltaError() for name in deltas_needed(config)})
    names = set(sampled_names(job.names))
    for name, merged in _merged_tensors(job, config, layers, bank, progress):
        emit(name, merged)
        if name in names:
            bank.samples[name] = sample(merged)
    conflict = _conflict(bank, job.structure.num_blocks)
    routed = choose_blocks(conflict[config.conflict_score], config.routed_layers, config.conflict_threshold)
    bank.deltas = {name: deltas for name, deltas in bank.deltas.items() if layers[name].block in routed}
    built = _built_config(config, job, layers, routed, bank)
    report = _report(job, built, bank, conflict, routed)
    report.seconds = time.perf_counter() - started
    return bank, built, report


def _merged_tensors(
    job: Job, config: MediatorConfig, layers: Mapping[str, LinearLayer], bank: Bank, progress: Progress
) -> Iterable[tuple[str, Tensor]]:
    """Each backbone tensor in turn; deltas and counts go to the bank on the way."""
    in_blocks = {layer.name: layer.block for layer in job.structure.layers}
    certain = set(config.routed_layers) if isinstance(config.routed_layers, (list, tuple)) else None
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.has_bias}
    todo = [name for name in job.names if name not in biases]
    with progress("merging", len(todo)) as advance:
        for name in todo:
            owner = name.removesuffix(".weight")
            measure = owner in in_blocks
            merged = merge_tensor(name, job.base, job.experts, config, job.dtype, measure)
            if measure:
                _add_counts(bank.counts.setdefault(in_blocks[owner], {}), merged.counts)
            layer = layers.get(owner)
            if layer is not None:
                bias = None
                if layer.has_bias:
                    bias = merge_tensor(f"{owner}.bias", job.base, job.experts, config, job.dtype, False)
                    yield f"{owner}.bias", bias.backbone
                if certain is None or layer.block in certain:
                    bank.deltas[owner] = _layer_deltas(name, layer, merged, bias, config, job.dtype, bank.errors)
            yield name, merged.backbone
            advance()


def _layer_deltas(
    name: str,
    layer: LinearLayer,
    merged: MergedTensor,
    bias: MergedTensor | None,
    config: MediatorConfig,
    storage: torch.dtype,
    errors: Mapping[str, DeltaError],
) -> dict[str, SparseDelta]:
    """The packed deltas of one layer, by column."""
    needed = deltas_needed(config)
    with_base = config.columns[-1] in needed and len(config.columns) > len(config.experts)
    experts = list(config.experts)
    weights = deltas_to_backbone(merged, experts, with_base)
    biases = deltas_to_backbone(bias, experts, with_base) if bias is not None else {}
    packed = {}
    for column in needed:
        delta = weights[column].T.contiguous() if layer.is_transposed else weights[column]
        packed[column] = sparsify(name, delta, biases.get(column), column, config, storage)
        errors[column].add(delta, packed[column])
    return packed


def _add_counts(total: dict[str, Tensor], counts: Mapping[str, Tensor]) -> None:
    for key, value in counts.items():
        total[key] = total[key] + value if key in total else value


def _conflict(bank: Bank, num_blocks: int) -> dict[str, list[float]]:
    return {
        name: [score.score(bank.counts[block][name]) for block in range(num_blocks)]
        for name, score in CONFLICT_SCORES.items()
    }


def _built_config(
    config: MediatorConfig, job: Job, layers: Mapping[str, LinearLayer], routed: list[int], bank: Bank
) -> MediatorConfig:
    from dataclasses import fields

    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    settings.update(
        expert_names=list(config.experts),
        routed_modules=[name for name, layer in layers.items() if layer.block in routed],
        num_blocks=job.structure.num_blocks,
        backbone_fingerprint=bank.samples,
        provenance={
            "base": job.base.source,
            "experts": {name: checkpoint.source for name, checkpoint in job.experts.items()},
            "storage_dtype": str(job.dtype).removeprefix("torch."),
        },
    )
    return MediatorConfig(**settings)


def _report(
    job: Job, config: MediatorConfig, bank: Bank, conflict: dict[str, list[float]], routed: list[int]
) -> BuildReport:
    dtypes = {info.dtype for info in job.base.tensors.values() if info.dtype}
    rounded = any(torch.finfo(dtype).eps < torch.finfo(job.dtype).eps for dtype in dtypes)
    notes = []
    storage = str(job.dtype).removeprefix("torch.")
    if rounded:
        notes.append(f"the base was rounded to {storage}, the experts' dtype, before differences were taken")
    if not routed:
        notes.append("no block is routed: the experts agree everywhere, and every prompt gets the backbone")
    elif len(routed) < job.structure.num_blocks:
        notes.append(f"{job.structure.num_blocks - len(routed)} blocks are not routed: every prompt gets the backbone there")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    packed = [delta for deltas in bank.deltas.values() for delta in deltas.values()]
    return BuildReport(
        output=None,
        experts=list(config.experts),
        storage_dtype=storage,
        base_was_rounded=rounded,
        conflict=conflict,
        conflict_score=config.conflict_score,
        routed_blocks=routed,
        num_blocks=job.structure.num_blocks,
        routed_parameters=sum(
            next(iter(deltas.values())).shape[0] * next(iter(deltas.values())).shape[1]
            for deltas in bank.deltas.values()
        ),
        bank_bytes=sum(delta.num_bytes for delta in packed),
        delta_errors={name: error.summary() for name, error in bank.errors.items()},
        peak_memory_bytes=peak,
        notes=notes,
    )


def require_experts(config: MediatorConfig) -> None:
    """Refuse a build without experts.

    Raises:
        ConfigError: there are none.
    """
    if not config.experts:
        raise ConfigError("no experts: give at least one, e.g. {'math': 'path/to/math'}.")


def label_checkpoints(base: str | None, experts: Mapping[str, str]) -> dict[str, str]:
    """Label → path, as messages call them."""
    labelled = {f"expert {name!r}": path for name, path in experts.items()}
    return labelled if base is None else {"base": base, **labelled}


def checkpoints_by_name(opened: Mapping[str, Checkpoint], experts: Iterable[str]) -> dict[str, Checkpoint]:
    """The opened experts, by their own names."""
    return {name: opened[f"expert {name!r}"] for name in experts}
