"""The build itself: lists the tasks, runs them, and combines their results into backbone, bank and report."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bank.sparse_delta import SparseDelta
from ..checkpoints.fingerprint import sample, sampled_names
from ..checkpoints.opening import Checkpoint, MeanCheckpoint
from ..config import MediatorSettings
from ..deferred import forget, torch, when_used
from ..errors import ConfigError
from ..methods.conflict import CONFLICT_SCORES
from ..methods.merging import MERGE_METHODS
from ..progress import Progress, no_progress
from ..storage import Array, to_tensor
from ..structure import OUTSIDE, gates_named, select_layers, targets_in_blocks
from .always_on import always_deltas
from .block_plan import BlockPlan, check_block_numbers, choose_blocks
from .budget import shared_out
from .compatibility import Job, split_job
from .families import column_rows, grouped
from .journal import Finished, finished
from .merge_job import Merge
from .model_method import method_for
from .report import BuildReport, summarize_errors
from .tensor_work import BASE, CARRIED, MERGED, Task, TensorWork

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Bank:
    """Deltas by layer and column."""

    deltas: dict[str, dict[str, SparseDelta]] = field(default_factory=dict)
    """Layer name → column → delta."""


def plan_merge(job: Job, config: MediatorSettings, plan: Sequence[BlockPlan] | None = None) -> Merge:
    """List the work.

    Args:
        job: checkpoints that belong together.
        config: what to do.
        plan: decisions block by block, which then take the place of ``routed_layers`` and ``density``.

    Raises:
        ConfigError: a block or module of the configuration is not in the model; the merge method needs a base that is
            not at hand, or its data cannot be used.
    """
    require_experts(config)
    if _is_split(config):
        job = split_job(job)
    layers = {layer.name: layer for layer in select_layers(job.structure, config.target_modules)}
    layers = {name: layer for name, layer in layers.items() if layer.part is None or f"{name}.weight" in job.parts}
    if isinstance(config.routed_layers, (list, tuple)):
        check_block_numbers(config.routed_layers, job.structure.num_blocks)
    if isinstance(config.router_layer, int) and config.router_layer > job.structure.num_blocks:
        raise ConfigError(
            f"router_layer {config.router_layer} is beyond this model, which has {job.structure.num_blocks} blocks."
        )
    densities = _block_densities(config, job.structure.num_blocks, plan)
    blocks = {layer.name: layer.block for layer in (*job.structure.layers, *layers.values())}
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.has_bias}
    kept = job.structure.gates - gates_named(job.structure, config.target_modules)
    is_oriented = MERGE_METHODS[config.merge_method].is_oriented
    all_layers = {layer.name: layer for layer in (*job.structure.layers, *job.structure.gate_layers)}
    tasks = []
    for name in sorted(job.names):
        if name in biases:
            continue
        owner = name.removesuffix(".weight")
        layer = layers.get(owner) if name.endswith(".weight") else None
        read_as = layer or (all_layers.get(owner) if is_oriented and name.endswith(".weight") else None)
        tasks.append(
            Task(
                name=name,
                measure=owner in blocks and name.endswith(".weight"),
                density=densities[layer.block] if layer is not None else None,
                is_transposed=read_as is not None and read_as.is_transposed,
                bias=f"{owner}.bias" if layer is not None and layer.has_bias else None,
                origin=BASE if name in kept else CARRIED if name in job.structure.towers else MERGED,
            )
        )
    merged = [task for task in tasks if task.origin == MERGED]
    oriented = {task.name: task.is_transposed for task in merged} | {task.bias: False for task in merged if task.bias}
    method = method_for(job, config, oriented)
    return Merge(job, config, tasks, blocks, plan, method, frozenset(sampled_names(job.parameters)))


def _is_split(config: MediatorSettings) -> bool:
    """Whether fused experts are merged matrix by matrix: what is measured of them is measured of whole tensors."""
    return MERGE_METHODS[config.merge_method].open_data is None or config.merge_data is None


def _block_densities(
    config: MediatorSettings, num_blocks: int, plan: Sequence[BlockPlan] | None
) -> dict[int, float | None]:
    """Block → density of its deltas; None where it is certain to get none."""
    outside: dict[int, float | None] = {OUTSIDE: config.density}
    if plan is not None:
        return outside | {block.block: block.density if block.routed else None for block in plan}
    certain = set(config.routed_layers) if isinstance(config.routed_layers, (list, tuple)) else None
    return outside | {
        block: config.density if certain is None or block in certain else None for block in range(num_blocks)
    }


def merge_in_memory(
    job: Job, config: MediatorSettings, progress: Progress = no_progress
) -> tuple[Bank, dict[str, Tensor], MediatorSettings, BuildReport]:
    """Merge all tensors and keep everything in memory.

    Returns:
        The bank; the backbone, name → tensor in the storage dtype; the configuration with what the build found out
        filled in; the report.
    """
    started = time.perf_counter()
    with single_thread():
        merge = shared_out(plan_merge(job, config))
        merge = grouped(replace(merge, method=merge.method.prepared(merge.job)))
    job = merge.job
    backbone = {name: np.empty(shape, job.dtype.array) for name, shape in job.stored.items()}
    places = backbone | {name: backbone[part.tensor][part.number] for name, part in job.parts.items()}

    def write(name: str, start: int, rows: Array) -> None:
        places[name].reshape(-1, *rows.shape[1:])[start : start + len(rows)] = rows

    work = TensorWork(job.base, job.experts, config, job.dtype, write, merge.method, merge.groups)
    bank, done = Bank(), []
    with single_thread(), progress("merging", len(merge.tasks)) as advance:
        for task in merge.tasks:
            result = work(task)
            result.deltas |= always_deltas(job, config, task)
            if result.deltas:
                deltas = {column: delta.as_tensors() for column, delta in result.deltas.items()}
                bank.deltas[task.name.removesuffix(".weight")] = deltas
            names = [name for name in (task.name, task.bias) if name in merge.sampled]
            done.append(finished(result, {name: sample(backbone[name]) for name in names if name is not None}))
            advance()
    samples = {name: sample(backbone[name]) for name in merge.sampled_fused}
    built, report = conclude(merge, done, samples)
    bank.deltas = {name: bank.deltas[name] for name in built.routed_modules or []}
    report.seconds = time.perf_counter() - started
    return bank, {name: to_tensor(weight) for name, weight in backbone.items()}, built, report


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch work in this thread alone: results do not depend on the number of cores, and none spins idly."""
    before: list[int] = []

    def keep_to_one() -> None:
        before.append(torch.get_num_threads())
        torch.set_num_threads(1)

    when_used(keep_to_one)
    try:
        yield
    finally:
        forget(keep_to_one)
        for number in before:
            torch.set_num_threads(number)


def conclude(
    merge: Merge, done: Sequence[Finished], samples: Mapping[str, dict[str, Any]]
) -> tuple[MediatorSettings, BuildReport]:
    """Decide which blocks are routed and sum up, once every tensor is finished.

    Args:
        merge: the work.
        done: what each of its tasks became, in their order.
        samples: for the fingerprint, of ``merge.sampled_fused``.
    """
    job, config = merge.job, merge.config
    num_blocks = job.structure.num_blocks
    conflict = _conflict(merge, done)
    if merge.plan is not None:
        routed = [block.block for block in merge.plan if block.routed]
    elif merge.routed is not None:
        routed = merge.routed
    else:
        routed = choose_blocks(conflict[config.conflict_score], config.routed_layers, config.conflict_threshold)
    in_bank = [
        (task.name.removesuffix(".weight"), info)
        for task, info in zip(merge.tasks, done, strict=True)
        if task.density is not None and _is_routed(merge, task, info, routed)
    ]
    carried = {name for name, _ in in_bank}
    samples = {**samples, **{name: value for info in done for name, value in info.samples.items()}}
    built = replace(
        config,
        expert_names=list(config.experts),
        target_modules=targets_in_blocks(job.structure, config.target_modules),
        routed_modules=[layer.name for layer in (*job.structure.layers, *job.structure.outer) if layer.name in carried],
        num_blocks=num_blocks,
        backbone_fingerprint={name: samples[name] for name in sorted(samples)},
        provenance=sources(job),
        column_map=column_rows(merge),
        density=config.density if merge.density is None else merge.density,
    )
    return built, _report(merge, conflict, routed, [info for _, info in in_bank])


def _is_routed(merge: Merge, task: Task, info: Finished, routed: Sequence[int]) -> bool:
    """Whether a matrix with deltas keeps them: with its block; outside of the blocks, by its own conflict score."""
    block, config = merge.blocks[task.name.removesuffix(".weight")], merge.config
    if block != OUTSIDE:
        return block in routed
    score = CONFLICT_SCORES[config.conflict_score].score(info.counts[config.conflict_score])
    return config.routed_layers != "auto" or score >= config.conflict_threshold


def _conflict(merge: Merge, done: Sequence[Finished]) -> dict[str, list[float]]:
    totals: dict[int, dict[str, NDArray[np.float64]]] = {}
    for task, info in zip(merge.tasks, done, strict=True):
        if task.measure:
            total = totals.setdefault(merge.blocks[task.name.removesuffix(".weight")], {})
            for name, counts in info.counts.items():
                total[name] = total[name] + counts if name in total else counts
    return {
        name: [
            # A block may have nothing that is measured.
            score.score(totals[block][name]) if block in totals else 0.0
            for block in range(merge.job.structure.num_blocks)
        ]
        for name, score in CONFLICT_SCORES.items()
    }


def sources(job: Job) -> dict[str, object]:
    """Where base and experts came from, for a configuration."""
    return {
        "base": job.base.source,
        "experts": {name: checkpoint.source for name, checkpoint in job.experts.items()},
        "storage_dtype": str(job.dtype),
    }


def _report(
    merge: Merge, conflict: dict[str, list[float]], routed: list[int], in_bank: Sequence[Finished]
) -> BuildReport:
    job, config = merge.job, merge.config
    notes = input_notes(merge)
    if not routed:
        notes.append("no block is routed: the experts agree everywhere, and every prompt gets the backbone")
    elif len(routed) < job.structure.num_blocks:
        num_averaged = job.structure.num_blocks - len(routed)
        notes.append(f"{num_averaged} blocks are not routed: every prompt gets the backbone there")
    if merge.plan is not None:
        notes.append("which blocks are routed, and at which density, was read from a plan")
    if merge.density is not None:
        where = "under one threshold" if config.density_scope == "model" else "the same share of every matrix"
        fitted = "" if config.budget is None else f", fitted to a budget of {config.budget}"
        notes.append(f"{merge.density:.4f} of all routed entries are kept, {where}{fitted}, by samples of the matrices")
    notes += merge.groups.notes
    columns = list(in_bank[0].errors) if in_bank else []
    return BuildReport(
        output=None,
        experts=list(config.experts),
        storage_dtype=str(job.dtype),
        base_was_rounded=base_was_rounded(job),
        conflict=conflict,
        conflict_score=config.conflict_score,
        routed_blocks=routed,
        num_blocks=job.structure.num_blocks,
        routed_parameters=sum(info.num_parameters for info in in_bank),
        bank_bytes=sum(info.num_bytes for info in in_bank),
        delta_errors={column: summarize_errors([info.errors[column] for info in in_bank]) for column in columns},
        peak_memory_bytes=peak_memory(),
        notes=notes,
    )


def base_was_rounded(job: Job) -> bool:
    """Whether the base came in a finer dtype than that in which the backbone is stored."""
    dtypes = {info.dtype for info in job.base.tensors.values() if info.dtype}
    return any(dtype.num_digits > job.dtype.num_digits for dtype in dtypes)


def input_notes(merge: Merge) -> list[str]:
    """What was done to make base and experts fit, and what is merged how."""
    job, notes = merge.job, [*merge.job.notes, *_structure_notes(merge)]
    if base_was_rounded(job):
        notes.append(f"the base was rounded to {job.dtype}, the experts' dtype, before differences were taken")
    if isinstance(job.base, MeanCheckpoint):
        notes.append("no base was given: differences were taken to the mean of the experts")
    if merge.config.depth_scaling is not None:
        method = merge.method
        notes.append(
            f"depth_scaling: block l of L is scaled by {method.alpha:.6g} + {method.beta:.6g} * l / (L - 1), all else "
            f"by {method.alpha:.6g}"
        )
    return notes


def _structure_notes(merge: Merge) -> list[str]:
    """What becomes of the tensors of a mixture of experts, and of those outside of the language model."""
    notes = [*_fused_notes(merge)]
    origins = [task.origin for task in merge.tasks]
    if BASE in origins:
        notes.append(
            f"{origins.count(BASE)} tensors of the mixture of experts' gates are the base's, since averaged gates "
            "choose other experts; name the gates in target_modules to merge them"
        )
    if CARRIED in origins:
        notes.append(f"{origins.count(CARRIED)} tensors outside of the language model are the base's: equal in all")
    return notes


def _fused_notes(merge: Merge) -> Iterator[str]:
    """Which fused tensors of mixtures of experts are merged matrix by matrix, and why others are not."""
    structure, parts = merge.job.structure, merge.job.parts
    fused = set(structure.fused)
    with_deltas = {
        parts[task.name].tensor for task in merge.tasks if task.density is not None and task.name in parts
    } & fused  # fmt: skip
    split = {part.tensor for part in parts.values()} & fused
    if with_deltas:
        number = sum(task.density is not None and merge.job.stored_name(task.name) in fused for task in merge.tasks)
        yield (
            f"{len(with_deltas)} fused tensors of the mixture of experts ({min(with_deltas)}, ...) are merged as "
            f"{number} linear layers, each with deltas where its block is routed"
        )
    if all(task.density is None for task in merge.tasks) and split:
        yield f"{len(split)} fused tensors of the mixture of experts ({min(split)}, ...) are merged matrix by matrix"
        split, fused = set(), fused - split
    reasons = {
        "they are not named in target_modules, or their blocks are not to be routed": split - with_deltas,
        "their module has another interface than transformers' use_experts_implementation": set(structure.unsplit),
        f"merge_method {merge.config.merge_method!r} reads merge_data, which has numbers for whole tensors": (
            fused - split - set(structure.unsplit)
        ),
    }
    for reason, names in reasons.items():
        if names:
            yield (
                f"{len(names)} fused tensors of the mixture of experts ({min(names)}, ...) are averaged and get no "
                f"deltas ({reason}): every prompt gets the average there"
            )


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_experts(config: MediatorSettings) -> None:
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
