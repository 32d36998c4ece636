"""plan_mediator(): checks the inputs and predicts size, time and memory, from headers and samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoints.opening import Checkpoint, FolderCheckpoint, Reading, open_checkpoint
from ..checkpoints.output_folder import check_free, check_working_folders, free_space, partial_name
from ..checkpoints.replacing import write_replacing
from ..checkpoints.side_files import compare_side_files
from ..config import MediatorSettings
from ..errors import ConfigError, MediatorError, OutputError
from ..methods.encoding import ENCODINGS
from ..methods.sparsifying import SPARSIFIERS
from ..structure import OUTSIDE
from .always_on import with_always
from .block_plan import PLAN_VERSION, choose_blocks, read_plan, settings_to_keep
from .budget import block_densities, estimated_scores, sampled, shared_out
from .builder import plan_merge, require_experts, single_thread
from .compatibility import Job, examine_job
from .distance import check_distances
from .families import find_groups
from .family_packing import NO_GROUPS
from .hints import hints
from .locks import lock_faults
from .memory import parse_bytes, predicted_memory, workers_within
from .merge_job import Merge
from .offline import mean_base, named_paths, with_experts
from .size_prediction import adapter_bytes, backbone_bytes, side_bytes

# Nanoseconds an entry on one core of 2.6 GHz: read, hashed and merged; measured for conflict; made a delta.
_MERGE_NS, _MEASURE_NS, _DELTA_NS = 2.4, 2.0, 4.5
_START_SECONDS = 2.0


@dataclass
class BuildPlan:
    """What a build would do, need and give."""

    problems: list[str] = field(default_factory=list)
    """Why the build would be refused; empty where it can start."""

    warnings: list[str] = field(default_factory=list)
    """What works and may surprise."""

    hints: list[str] = field(default_factory=list)
    """What is unusual about an expert and may be worth a look; no proof of anything."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    """One entry a block: ``block``, ``routed``, ``density``, ``score`` (estimated from a sample), ``bytes``."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What it was made with, beside what the blocks say; only what is no default."""

    density: float = 0.0
    """Share of all routed entries that is kept: the configuration's, or the one that a budget leaves room for."""

    bytes: dict[str, int] = field(default_factory=dict)
    """Predicted bytes on disk: ``backbone``, ``adapter``, ``other`` and their ``total``."""

    sharing: list[str] = field(default_factory=list)
    """Which experts are equal or near enough to share a delta, by a sample: what ``families="auto"`` would do, or does.
    """

    bytes_with_families: int | None = None
    """Predicted bytes of the adapter with ``families="auto"``; None where families were not looked for."""

    bytes_by_encoding: dict[str, int] = field(default_factory=dict)
    """Encoding → predicted bytes of the adapter at the same density, the chosen one among them; empty with a budget and
    for low-rank deltas. Encodings differ in accuracy (docs/forms.md)."""

    seconds: float = 0.0
    """Rough: it depends on the machine."""

    peak_memory_bytes: int = 0
    workers: int = 1

    @property
    def is_ok(self) -> bool:
        """Whether the build can start."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the decisions to a file that can be edited and given to ``build_mediator(..., plan=path)``.

        Raises:
            ConfigError: there is nothing to write, since the plan has problems.
            OutputError: it cannot be written.
        """
        if not self.blocks:
            raise ConfigError("this plan has no blocks, because of its problems:\n- " + "\n- ".join(self.problems))
        about = {key: value for key, value in self.to_dict().items() if key not in ("settings", "blocks", "problems")}
        decided = {"settings": self.settings, "blocks": self.blocks}
        text = json.dumps({"plan_version": PLAN_VERSION, **decided, "about": about}, indent=2)
        try:
            write_replacing(Path(path), text)
        except OSError as fault:
            raise OutputError(f"plan {str(path)!r} cannot be written: {fault.strerror or fault}") from fault


def plan_mediator(
    base: str | os.PathLike[str] | None,
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    config: MediatorSettings | None = None,
    *,
    plan: str | os.PathLike[str] | None = None,
    workers: int = 1,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    dequantize: bool = False,
    allow_distant: bool = False,
) -> BuildPlan:
    """Look at the inputs of a build and say what would happen, in seconds and without writing anything.

    Arguments are those of :func:`build_mediator`. Nothing that is wrong with the inputs raises: all of it is listed.

    Returns:
        Problems and warnings, all at once; decisions block by block; bytes, time and memory.

    Raises:
        ConfigError: an argument itself is wrong.
    """
    config = with_experts(config or MediatorSettings(), named_paths(experts))
    require_experts(config)
    limit = parse_bytes(max_memory)
    found = BuildPlan(workers=workers)
    job = _open(None if base is None else str(base), config, Reading(allow_pickle, dequantize), found)
    if output is not None:
        target = Path(output).expanduser().absolute()
        try:
            check_free(target)
            check_working_folders(target)
        except MediatorError as fault:
            found.problems.append(str(fault))
    if job is None:
        return found
    locked = lock_faults(job)
    found.problems += locked.values()
    plain = {name: expert for name, expert in job.experts.items() if name not in locked}
    try:
        found.warnings += check_distances(job._replace(experts=plain), allow_distant)
    except MediatorError as fault:
        found.problems += str(fault).splitlines()[:-1]
        found.problems[-1] += ". " + str(fault).splitlines()[-1]
    found.hints += hints(job)
    try:
        decided = None if plan is None else read_plan(Path(plan), job.structure.num_blocks)
        merge = plan_merge(job, config, decided)
        with single_thread():
            scores = estimated_scores(merge)
            merge = shared_out(merge, scores)
            merge = merge if merge.samples else sampled(merge)
            preview = _with_families(merge)
    except MediatorError as fault:
        found.problems.append(str(fault))
        return found
    merge = preview if preview is not None and config.families is not None else merge
    _decide(merge, scores, found)
    _preview(merge, preview, found)
    _resources(merge, found, limit, None if output is None else target)
    return found


def _open(base: str | None, config: MediatorSettings, reading: Reading, found: BuildPlan) -> Job | None:
    """Open what can be opened and compare it; everything wrong goes into the plan.

    Args:
        base: folder or hub id.
        config: names the experts.
        reading: what may be read.
        found: takes problems and warnings.
    """
    paths = {f"expert {name!r}": path for name, path in config.experts.items()}
    opened: dict[str, Checkpoint] = {}
    for label, path in (({} if base is None else {"base": base}) | paths).items():
        try:
            opened[label] = open_checkpoint(path, label, reading)
        except MediatorError as fault:
            found.problems += str(fault).splitlines()
    experts = {name: opened[f"expert {name!r}"] for name in config.experts if f"expert {name!r}" in opened}
    try:
        reference = opened.get("base") if base is not None else mean_base(experts, config) if experts else None
        if reference is None or not experts:
            return None
        job, faults = examine_job(reference, experts, may_untie=True)
    except MediatorError as fault:
        found.problems.append(str(fault))
        return None
    found.problems += faults
    if not faults:
        try:
            job = with_always(job, config, reading)
        except MediatorError as fault:
            found.problems.append(str(fault))
    folders = {
        checkpoint.label: checkpoint.folder
        for checkpoint in (reference, *experts.values())
        if isinstance(checkpoint, FolderCheckpoint)
    }
    found.warnings += [*job.notes, *compare_side_files(folders)]
    return job if not faults and len(experts) == len(config.experts) else None


def _decide(merge: Merge, scores: list[float], found: BuildPlan) -> None:
    config = merge.config
    if merge.plan is not None:
        routed = {block.block for block in merge.plan if block.routed}
        densities = {block.block: block.density for block in merge.plan}
    else:
        known = merge.routed
        routed = set(choose_blocks(scores, config.routed_layers, config.conflict_threshold) if known is None else known)
        densities = dict.fromkeys(range(len(scores)), config.density)
    if merge.density is not None:
        densities |= block_densities(merge)
    for block, score in enumerate(scores):
        entry = {"block": block, "routed": block in routed, "density": densities[block], "score": round(score, 4)}
        found.blocks.append({**entry, "bytes": adapter_bytes(merge, frozenset({block}) & routed)})
    sizes = {
        "backbone": backbone_bytes(merge),
        # What is targeted outside of the blocks is taken for routed.
        "adapter": adapter_bytes(merge, frozenset(routed | {OUTSIDE})),
        "other": side_bytes(merge),
    }
    found.bytes = {**sizes, "total": sum(sizes.values())}
    found.density = config.density if merge.density is None else merge.density
    found.settings = settings_to_keep(config, found.density)


def _with_families(merge: Merge) -> Merge | None:
    """The same work with equal experts stored once and families; None where no families can be."""
    config = merge.config
    shares = config.budget is None and config.density_scope == "matrix" and ENCODINGS[config.encoding].has_positions
    if not shares or len(merge.job.experts) < 2:
        return None
    return replace(merge, groups=find_groups(merge, by_sample=True))


def _preview(merge: Merge, preview: Merge | None, found: BuildPlan) -> None:
    """What other families and encodings would take."""
    config = merge.config
    routed = frozenset({block["block"] for block in found.blocks if block["routed"]} | {OUTSIDE})
    if preview is not None:
        found.sharing = list(preview.groups.notes)
        found.bytes_with_families = adapter_bytes(preview, routed)
    if config.budget is None and not SPARSIFIERS[config.sparsifier].is_low_rank:
        for name, encoding in ENCODINGS.items():
            if name == "factors":
                continue  # low rank
            if encoding.has_positions:
                other = replace(merge, config=replace(config, encoding=name))
            else:
                other = replace(merge, config=replace(config, encoding=name, families=None), groups=NO_GROUPS)
            found.bytes_by_encoding[name] = adapter_bytes(other, routed)


def _resources(merge: Merge, found: BuildPlan, limit: int | None, target: Path | None) -> None:
    job = merge.job
    num_experts = len(job.experts)
    nanoseconds = 0.0
    for task in merge.tasks:
        entries = prod(job.base.tensors[task.name].shape)
        nanoseconds += entries * (num_experts + 1) * _MERGE_NS
        nanoseconds += entries * num_experts * _MEASURE_NS * task.measure
        nanoseconds += entries * (num_experts + 1) * _DELTA_NS * (task.density is not None)
    try:
        found.workers = workers_within(merge, found.workers, limit)
    except MediatorError as fault:
        found.problems.append(str(fault))
    found.seconds = _START_SECONDS + nanoseconds * 1e-9 / min(found.workers, os.cpu_count() or 1)
    found.peak_memory_bytes = predicted_memory(merge, found.workers)
    if target is not None:
        free, need = free_space(target), found.bytes["total"]
        if free < need:
            found.problems.append(
                f"output {str(target)!r} needs {need / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left."
            )
        if partial_name(target).exists():
            found.warnings.append("an unfinished build of this output is there; the same work goes on from it")
