"""merge_models(): one merged model from checkpoints on disk, without experts beside it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checksums import CARD, write_merged_checksums
from ..checkpoints.opening import Reading
from ..checkpoints.output_folder import JOURNAL, check_free, check_working_folders
from ..config import MediatorSettings
from ..methods.merging import MERGE_METHODS
from .builder import base_was_rounded, input_notes, peak_memory, plan_merge, require_experts, single_thread, sources
from .memory import parse_bytes
from .merge_job import Merge
from .model_card import merged_card
from .offline import Build, carry_out, named_paths, open_job, with_experts
from .provenance import PROVENANCE_FILE, build_section, origins
from .workers import check_workers


@dataclass
class MergeReport:
    """What a merge made."""

    output: str
    """Folder of the merged model."""

    experts: list[str]
    merge_method: str
    merge_parameters: dict[str, Any]
    """All of the method's, those left at their default too."""

    storage_dtype: str
    """In which differences were taken and the model is stored."""

    base_was_rounded: bool
    """Whether the base came in a finer dtype than that."""

    files: dict[str, int] = field(default_factory=dict)
    """File → bytes on disk."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Largest resident memory of the process so far."""

    notes: list[str] = field(default_factory=list)
    """What may surprise."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def merge_models(
    base: str | os.PathLike[str] | None,
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: MediatorSettings | None = None,
    show_progress: bool = False,
    *,
    workers: int = 1,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    hash_inputs: bool = True,
    dequantize: bool = False,
    allow_distant: bool = False,
) -> MergeReport:
    """Merge fine-tuned models of one base into one model: the backbone of a build, without experts.

    The output is an ordinary checkpoint folder with tokenizer, ``provenance.json`` and ``checksums.json``. As with
    ``build_mediator``, tensors are read some rows at a time, the folder appears when all is done, a merge that was
    killed goes on where it was, and the bytes are the same for any number of workers.

    Args:
        base: folder or hub id of the model that the experts were fine-tuned from; None takes their mean.
        experts: name → folder or hub id of a full fine-tune, or of a LoRA adapter.
        output: a folder that does not exist yet.
        config: its fields ``merge_method``, ``merge_parameters``, ``merge_data``, ``depth_scaling``, ``seed`` and
            ``target_modules`` (which gates of mixtures of experts are merged) count.
        show_progress: a bar on the error stream.
        workers: how many processes share the tensors.
        max_memory: e.g. ``"4GiB"``.
        allow_pickle: also read ``.bin`` files.
        hash_inputs: write the sha256 of every input file into the output.
        dequantize: read quantised checkpoints as the weights that they stand for.
        allow_distant: merge although an expert has next to nothing of the base.

    Raises:
        ConfigError: a setting does not fit this model.
        CheckpointError: a checkpoint is missing, damaged, or holds NaN or infinity.
        CheckpointMismatchError: base and experts do not belong together.
        OutputExistsError: the output is there already, or another process is making it.
        OutputError: the output cannot be written, or the disk has no room for it.
        OutOfMemoryError: it does not fit into ``max_memory``.
    """
    started = time.perf_counter()
    workers = check_workers(workers)
    config = _without_experts(with_experts(config or MediatorSettings(), named_paths(experts)))
    require_experts(config)
    target = Path(output).expanduser().absolute()
    check_free(target)
    check_working_folders(target)
    limit = parse_bytes(max_memory)
    job = open_job(None if base is None else str(base), config, Reading(allow_pickle, dequantize), allow_distant)
    with single_thread():
        merge = plan_merge(job, config)
        tasks = [task._replace(density=None, measure=False) for task in merge.tasks]
        merge = replace(merge, tasks=tasks, method=merge.method.prepared(merge.job))
    report: MergeReport = carry_out(PlainMerge, merge, target, (workers, limit), hash_inputs, show_progress, started)
    return report


_COUNTING = ("experts", "merge_method", "merge_parameters", "merge_data", "depth_scaling", "seed", "target_modules")


def _without_experts(config: MediatorSettings) -> MediatorSettings:
    """The fields that matter to a merged model; the others are as they are by default, but need no base."""
    given = {item.name: getattr(config, item.name) for item in fields(MediatorSettings) if item.name in _COUNTING}
    return MediatorSettings(**given, fallback="backbone")


class PlainMerge(Build):
    """One merge in its temporary folder."""

    def finish(self, target: str, started: float) -> MergeReport:
        """Write everything but the weights."""
        merge, folder = self.merge, self.folder
        terms = self.write_side_files()
        config = replace_provenance(merge)
        known = {**origins(merge, self.digests), "merge": _merge_section(merge)}
        (folder / PROVENANCE_FILE).write_text(json.dumps(known, indent=2), encoding="utf-8")
        (folder / CARD).write_text(merged_card(config, terms), encoding="utf-8")
        write_merged_checksums(folder)
        row = MERGE_METHODS[config.merge_method]
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and JOURNAL not in path.parts]
        return MergeReport(
            output=target,
            experts=list(config.experts),
            merge_method=config.merge_method,
            merge_parameters={**row.defaults(), **config.merge_parameters},
            storage_dtype=str(merge.job.dtype),
            base_was_rounded=base_was_rounded(merge.job),
            files={str(path.relative_to(folder)): path.stat().st_size for path in paths},
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(),
            notes=input_notes(merge),
        )


def replace_provenance(merge: Merge) -> MediatorSettings:
    """The configuration with the sources of base and experts."""
    settings = {item.name: getattr(merge.config, item.name) for item in fields(MediatorSettings)}
    return MediatorSettings(**{**settings, "provenance": sources(merge.job)})


def _merge_section(merge: Merge) -> dict[str, Any]:
    """What was merged and how: the fields that are not their default, with sources pinned."""
    section = build_section(merge)
    section["config"].pop("fallback", None)
    section["config"] = {"merge_method": merge.config.merge_method, **section["config"]}
    return section
