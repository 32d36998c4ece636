"""How dense each delta is, where that must be known of all before the work: one threshold for the model, a budget.

All of it is read off samples of the matrices, so it costs a look at some rows and no second reading. What it decides
stands in the tasks, and a build that was killed, or shared out, decides the same again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import FALLBACK_EXPERT
from ..errors import ConfigError
from ..methods.conflict import CONFLICT_SCORES
from ..methods.conflict.statistics import task_vector_statistics
from ..structure import OUTSIDE
from .block_plan import choose_blocks
from .merge_job import Merge
from .size_prediction import adapter_bytes, backbone_bytes
from .tensor_work import Task, deltas_needed
from .tiles import TensorTiles, Workspace

_SAMPLED = 4096
"""Entries of a delta by which its share above a threshold is told."""

_LOWEST, _STEPS, _HALVINGS = 0.001, 24, 16
_UNITS = {"": 1, "b": 1, "k": 3, "m": 6, "g": 9, "t": 12}


class _Delta(NamedTuple):
    """One column's delta of one matrix, by a sample."""

    task: Task
    column: str
    entries: int
    magnitudes: NDArray[np.float32]
    """(s,) ascending."""


def shared_out(merge: Merge, scores: Sequence[float] | None = None) -> Merge:
    """Settle which blocks are routed and how dense every delta is.

    With ``density_scope="matrix"`` and no budget, each density is known by itself and the work is left as it is.

    Args:
        merge: the work, as planned.
        scores: conflict score of each block, where it was estimated already.

    Raises:
        ConfigError: the budget cannot be met; the message says what can.
    """
    config = merge.config
    if config.budget is None and config.density_scope == "matrix":
        return merge
    routed = _routed(merge, scores)
    merge = replace(merge, routed=routed, tasks=[_only_in(task, merge, set(routed)) for task in merge.tasks])
    merge = sampled(merge)
    deltas = [
        _Delta(task, column, prod(merge.job.base.tensors[task.name].shape), magnitudes)
        for task in merge.tasks
        if task.density is not None
        for column, magnitudes in merge.samples[task.name].items()
    ]
    if not deltas:
        return merge
    total = sum(delta.entries for delta in deltas)
    wanted = sum(delta.entries * (delta.task.density or 0.0) for delta in deltas) / total
    densities = _by_threshold(deltas) if config.density_scope == "model" else _in_proportion(deltas, wanted)

    def at(level: float) -> Merge:
        return _with_densities(merge, deltas, densities(level))

    level = wanted if config.budget is None else _fitting_level(merge, at)
    merge = at(level)
    tasks = {task.name: task for task in merge.tasks}
    kept = sum(delta.entries * tasks[delta.task.name].density_of(delta.column) for delta in deltas)
    return replace(merge, density=min(1.0, kept / total))


def estimated_scores(merge: Merge) -> list[float]:
    """The conflict score of each block, from some rows of each matrix."""
    job, config = merge.job, merge.config
    checkpoints = [job.base, *(job.experts[name] for name in sorted(job.experts))]
    score = CONFLICT_SCORES[config.conflict_score]
    space = Workspace()
    totals: dict[int, Any] = {}
    for task in merge.tasks:
        if not task.measure:
            continue
        # Merged by a method that needs no more than the sample; the score does not look at the merge.
        tiles = TensorTiles(task.name, checkpoints, job.dtype, "average", space, task.is_transposed)
        size = prod(tiles.shape)
        sample = tiles.sample()
        weight = size / max(1, sample.backbone.size)
        counts = score.counts(task_vector_statistics(sample.task_vectors(), config.conflict_density)) * weight
        block = merge.blocks[task.name.removesuffix(".weight")]
        totals[block] = totals[block] + counts if block in totals else counts
    return [score.score(totals[block]) if block in totals else 0.0 for block in range(job.structure.num_blocks)]


def block_densities(merge: Merge) -> dict[int, float]:
    """Routed block → share of all entries of its deltas that is kept."""
    kept: dict[int, list[float]] = {}
    for task in merge.tasks:
        if task.density is not None:
            total = kept.setdefault(merge.blocks[task.name.removesuffix(".weight")], [0.0, 0.0])
            entries = prod(merge.job.base.tensors[task.name].shape)
            total[0] += task.density * entries
            total[1] += entries
    return {block: min(1.0, some / entries) for block, (some, entries) in kept.items()}


def _routed(merge: Merge, scores: Sequence[float] | None) -> list[int]:
    config, num_blocks = merge.config, merge.job.structure.num_blocks
    if merge.plan is not None:
        return [block.block for block in merge.plan if block.routed]
    needs_scores = config.routed_layers != "all" and not isinstance(config.routed_layers, (list, tuple))
    if scores is None:
        scores = estimated_scores(merge) if needs_scores else [0.0] * num_blocks
    return choose_blocks(scores, config.routed_layers, config.conflict_threshold)


def _only_in(task: Task, merge: Merge, routed: set[int]) -> Task:
    """A task that makes deltas only where its block is routed."""
    # What is targeted outside of the blocks is decided by its own score.
    if task.density is None or merge.blocks[task.name.removesuffix(".weight")] in {*routed, OUTSIDE}:
        return task
    return task._replace(density=None)


def sampled(merge: Merge) -> Merge:
    """The same work with a sample of every delta that will be made, which makes predictions of bytes sharper."""
    job, config = merge.job, merge.config
    names = sorted(job.experts)
    checkpoints = [job.base, *(job.experts[name] for name in names)]
    space = Workspace()
    samples: dict[str, dict[str, NDArray[np.float32]]] = {}
    for task in merge.tasks:
        if task.density is None:
            continue
        # The average may stand in for the method: what is sampled is how large the entries of the deltas are.
        method = merge.method_of_sample(task)
        sample = TensorTiles(task.name, checkpoints, job.dtype, method, space, task.is_transposed).sample()
        # Sorted, so that nothing hangs on the order of the experts.
        for column in sorted(deltas_needed(config)):
            number = 0 if column == FALLBACK_EXPERT else 1 + names.index(column)
            magnitudes = np.abs(sample.delta(number)).reshape(-1)
            if magnitudes.size >= 2 * _SAMPLED:
                # An odd stride does not stay in a few columns.
                magnitudes = magnitudes[:: (magnitudes.size // _SAMPLED) | 1]
            samples.setdefault(task.name, {})[column] = np.sort(magnitudes)
    return replace(merge, samples=samples)


def _in_proportion(deltas: Sequence[_Delta], wanted: float) -> Callable[[float], list[float]]:
    """Densities as the tasks have them, all times one factor: level → density of each delta."""
    return lambda level: [min(1.0, level / wanted * (delta.task.density or 0.0)) for delta in deltas]


def _by_threshold(deltas: Sequence[_Delta]) -> Callable[[float], list[float]]:
    """One threshold for the magnitudes of all deltas: share kept of all entries → density of each delta.

    Weights of 16 bits differ by few different amounts, so many entries lie at the threshold itself. Of these, each
    delta keeps the same share.
    """
    values = np.concatenate([delta.magnitudes for delta in deltas])
    weights = np.concatenate(
        [np.full(delta.magnitudes.size, delta.entries / delta.magnitudes.size) for delta in deltas]
    )
    order = np.argsort(-values, kind="stable")
    values, from_top = values[order], np.cumsum(weights[order])

    def densities(level: float) -> list[float]:
        if level >= 1:
            return [1.0] * len(deltas)
        goal = level * from_top[-1]
        edge = values[min(values.size - 1, int(np.searchsorted(from_top, goal)))]
        first, last = np.searchsorted(-values, -edge, "left"), np.searchsorted(-values, -edge, "right")
        before = from_top[first - 1] if first else 0.0
        share = min(1.0, (goal - before) / (from_top[last - 1] - before))
        found = []
        for delta in deltas:
            low, high = (int(np.searchsorted(delta.magnitudes, edge, side)) for side in ("left", "right"))
            size = delta.magnitudes.size
            found.append(float(max((size - high + share * (high - low)) / size, 1 / (2 * delta.entries))))
        return found

    return densities


def _with_densities(merge: Merge, deltas: Sequence[_Delta], densities: Sequence[float]) -> Merge:
    found: dict[str, dict[str, float]] = {}
    for delta, density in zip(deltas, densities, strict=True):
        found.setdefault(delta.task.name, {})[delta.column] = density
    tasks = []
    for task in merge.tasks:
        own = found.get(task.name)
        if own is None:
            tasks.append(task)
        elif len(set(own.values())) == 1:
            tasks.append(task._replace(density=next(iter(own.values()))))
        else:
            tasks.append(task._replace(density=sum(own.values()) / len(own), densities=dict(sorted(own.items()))))
    return replace(merge, tasks=tasks)


def _fitting_level(merge: Merge, at: Callable[[float], Merge]) -> float:
    """The largest density whose predicted bytes stay within the budget, as long as bytes grow with it.

    Raises:
        ConfigError: the budget is too small or too large.
    """
    backbone, config = backbone_bytes(merge), merge.config
    assert config.budget is not None
    budget = budget_bytes(config.budget, backbone)
    levels = np.geomspace(_LOWEST, 1.0, _STEPS)
    sizes = [backbone + adapter_bytes(at(float(level))) for level in levels]
    # Signs of nearly all entries take more than signs of all, which need no positions: look below the top alone.
    top = int(np.argmax(sizes))
    if budget < sizes[0]:
        raise ConfigError(
            f"budget {config.budget!r} is too small: the backbone takes {_in_units(backbone, backbone)}, with deltas "
            f"of density {_LOWEST} it is {_in_units(sizes[0], backbone)}. Allow more, or route fewer blocks."
        )
    if budget > sizes[top]:
        raise ConfigError(
            f"budget {config.budget!r} is more than can be used: at most {_in_units(sizes[top], backbone)}, at density "
            f"{levels[top]:.2f}; density=1.0 without a budget takes {_in_units(sizes[-1], backbone)}."
        )
    place = next(number for number, size in enumerate(sizes) if size > budget or number == top)
    if sizes[place] <= budget:
        return float(levels[place])
    low, high = float(levels[place - 1]), float(levels[place])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if backbone + adapter_bytes(at(middle)) <= budget:
            low = middle
        else:
            high = middle
    return low


def budget_bytes(budget: str | int, backbone: int) -> int:
    """A budget in bytes.

    Args:
        budget: as in ``MediatorSettings``.
        backbone: bytes of the backbone's weights.
    """
    if isinstance(budget, int):
        return budget
    number, unit = re.fullmatch(r"([\d.]+)\s*([a-z]*)", budget.strip().lower()).groups()  # type: ignore[union-attr]
    if unit == "x":
        return int(float(number) * backbone)
    scale = 1024 ** ("kmgt".index(unit[0]) + 1) if "i" in unit else 10 ** (0 if unit in ("", "b") else _UNITS[unit[0]])
    return int(float(number) * scale)


def _in_units(size: int, backbone: int) -> str:
    return f"{size / 1e6:,.1f} MB ({size / backbone:.3f}x)"
