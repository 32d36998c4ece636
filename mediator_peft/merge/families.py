"""Equal experts and families of experts, found before a build from samples of all deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..bank.column_map import average_linkage, identity_rows, new_family
from ..config import MediatorSettings
from ..kernels.build_loops import rounded
from .always_on import always_rows
from .family_packing import MIN_COSINE, Groups
from .merge_job import Merge
from .tensor_work import deltas_needed
from .tiles import TensorTiles, Workspace

Rows = dict[str, dict[str, float]]


def grouped(merge: Merge) -> Merge:
    """The same work with equal experts stored once, and families found; as it is without ``families``."""
    return merge if merge.config.families is None else replace(merge, groups=find_groups(merge))


def find_groups(merge: Merge, by_sample: bool = False) -> Groups:
    """Experts that are equal, and families of experts.

    Experts are aliases where every tensor is the same, and form families by average linkage of the cosines of their
    deltas against the backbone, over samples of every matrix that may get deltas. The order of the experts changes
    nothing.

    Args:
        merge: the work; ``families`` of its configuration is the least cosine, ``"auto"`` where it is None.
        by_sample: take experts for equal whose samples are, and read no more of them.
    """
    names = sorted(merge.job.experts)
    gram, equal = _sampled_products(merge, names)
    aliases: dict[str, str] = {}
    for number, name in enumerate(names):
        for other in names[:number]:
            is_equal = other not in aliases and equal[number][names.index(other)]
            if is_equal and (by_sample or _are_equal(merge, other, name)):
                aliases[name] = other
                break
    alone = [name for name in names if name not in aliases]
    places = [names.index(name) for name in alone]
    gram = gram[places][:, places]
    norms = np.sqrt(gram.diagonal()).clip(min=1e-30)
    cosines = gram / norms / norms[:, None]
    rows: Rows = {}
    for group in average_linkage(cosines, alone, least_cosine(merge.config)):
        if len(group) > 1:
            rows[new_family(rows)] = dict.fromkeys(group, 1.0)
    families = {shared: tuple(sorted(row)) for shared, row in rows.items()}
    return Groups(aliases, families, tuple(_notes(aliases, families, cosines, alone)))


def least_cosine(config: MediatorSettings) -> float:
    """Mean cosine from which on experts are a family."""
    return MIN_COSINE if config.families in (None, "auto") else float(config.families)


def column_rows(merge: Merge) -> Rows | None:
    """The column map of a build; None where every expert has a delta of its own and nothing else is stored."""
    groups, always = merge.groups, always_rows(merge.job, merge.config)
    if not groups.aliases and not groups.families:
        return always
    rows = identity_rows([name for name in deltas_needed(merge.config) if name not in groups.aliases])
    for alias, name in sorted(groups.aliases.items()):
        rows[name][alias] = 1.0
    shared = {
        family: {name: 1.0 for member in members for name in rows[member]}
        for family, members in groups.families.items()
    }
    rest = {name: row for name, row in (always or {}).items() if name.startswith("_")}
    return {**shared, **rows, **rest}


def _sampled_products(merge: Merge, names: Sequence[str]) -> tuple[NDArray[np.float64], list[list[bool]]]:
    """Inner products of the experts' deltas (K, K) float64, and which are equal, by a sample of every matrix."""
    job = merge.job
    checkpoints = [job.base, *(job.experts[name] for name in names)]
    space = Workspace()
    gram = np.zeros((len(names), len(names)))
    equal = [[True] * len(names) for _ in names]
    for task in merge.tasks:
        if task.density is None:
            continue
        method = merge.method_of_sample(task)
        tiles = TensorTiles(task.name, checkpoints, job.dtype, method, space, task.is_transposed)
        sample = tiles.sample()
        deltas = np.stack([sample.delta(1 + number).reshape(-1) for number in range(len(names))]).astype(np.float64)
        gram += deltas @ deltas.T * (prod(tiles.shape) / max(1, deltas.shape[1]))
        for number in range(len(names)):
            for other in range(number):
                equal[number][other] &= np.array_equal(deltas[number], deltas[other])
    return gram, equal


def _are_equal(merge: Merge, first: str, second: str) -> bool:
    """Whether two experts are the same, tensor by tensor, in the storage dtype."""
    job = merge.job
    ours, theirs = job.experts[first], job.experts[second]
    return all(
        np.array_equal(rounded(ours.read(name), job.dtype), rounded(theirs.read(name), job.dtype)) for name in job.names
    )


def _notes(
    aliases: dict[str, str], families: dict[str, tuple[str, ...]], cosines: NDArray[np.float64], names: Sequence[str]
) -> list[str]:
    notes = [f"{name} equals {other}: its delta is stored once" for name, other in aliases.items()]
    for members in families.values():
        places = [names.index(name) for name in members]
        pairs = cosines[places][:, places][~np.eye(len(places), dtype=bool)]
        notes.append(
            f"{', '.join(members)} share a delta: the mean cosine of their deltas from the backbone is "
            f"{float(pairs.mean()):.3f}"
        )
    if not notes and len(names) > 1:
        largest = float((cosines - 2 * np.eye(len(names))).max())
        notes.append(
            "no experts are equal or near enough to share a delta: the largest cosine of two deltas from the backbone "
            f"is {largest:.3f}"
        )
    return notes
