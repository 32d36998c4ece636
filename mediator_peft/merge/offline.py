"""build_mediator(): builds from checkpoints on disk into an output folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoints.adapter_files import SUBFOLDER, WEIGHTS_FILE, write_config
from ..checkpoints.backbone_files import BackboneFiles
from ..checkpoints.checksums import CARD, write_checksums
from ..checkpoints.digests import FileDigests
from ..checkpoints.fingerprint import sample
from ..checkpoints.lora import LoraCheckpoint
from ..checkpoints.opening import PLAIN, Checkpoint, MeanCheckpoint, Reading, open_checkpoints
from ..checkpoints.output_folder import (
    JOURNAL,
    check_free,
    check_space,
    check_working_folders,
    copy_model_config,
    copy_side_files,
    resumable_folder,
)
from ..checkpoints.side_files import licence
from ..config import FALLBACK_EXPERT, FORMAT_VERSION, MediatorSettings
from ..deferred import torch
from ..errors import ConfigError
from ..progress import bar_progress, no_progress
from ..ranks import Ranks
from .always_on import always_deltas, with_always
from .block_plan import read_plan
from .budget import shared_out
from .builder import (
    checkpoints_by_name,
    conclude,
    label_checkpoints,
    plan_merge,
    require_experts,
    single_thread,
)
from .compatibility import Job, check_job
from .distance import check_distances
from .families import grouped
from .journal import Finished, JournalStore, finished
from .locks import check_locks
from .memory import parse_bytes, workers_within
from .merge_job import Merge
from .model_card import model_card, output_card
from .provenance import data_files, inputs, write_provenance
from .report import BuildReport, write_report
from .size_prediction import predicted_bytes
from .tensor_work import TensorWork
from .workers import check_workers, run_all


def build_mediator(
    base: str | os.PathLike[str] | None,
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: MediatorSettings | None = None,
    show_progress: bool = False,
    *,
    plan: str | os.PathLike[str] | None = None,
    workers: int = 1,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    hash_inputs: bool = True,
    dequantize: bool = False,
    allow_distant: bool = False,
) -> BuildReport:
    """Merge fine-tuned models of one base into a backbone and a bank of sparse deltas, some rows at a time.

    The output is an ordinary checkpoint of the backbone, with the adapter in its folder ``mediator/``. It appears under
    its name when all is done, and not at all otherwise. A build that was killed goes on where it was when it is called
    again with the same arguments, and ends with the same bytes.

    Args:
        base: folder or hub id of the model that the experts were fine-tuned from. None where it is not at hand: the
            mean of the experts stands in for it, conflict is measured against the mean, and there is no fallback to
            the base (``fallback="backbone"``).
        experts: name → folder or hub id (``org/model@revision``) of a full fine-tune, or of a LoRA adapter.
        output: a folder that does not exist yet.
        config: how to merge, a ``MediatorConfig`` or plain ``MediatorSettings``, which need no PEFT; its ``experts``
            are replaced by the argument.
        show_progress: a bar on the error stream.
        plan: a file that :func:`plan_mediator` wrote, perhaps edited: which blocks are routed, and at which density.
        workers: how many processes share the tensors; the bytes are the same for any number. Under torchrun the ranks
            share them as well.
        max_memory: e.g. ``"4GiB"``: fewer workers are used, or the build is refused, rather than exceed it.
        allow_pickle: also read ``.bin`` files (with ``weights_only=True``: plain tensors, no code).
        hash_inputs: write the sha256 of every input file into the output; they are read for it once more, by a single
            process close behind the merging.
        dequantize: read quantised checkpoints as the weights that they stand for; without it they are refused.
        allow_distant: build although an expert has next to nothing of the base (see
            :func:`~mediator_peft.merge.distance.check_distances`).

    Returns:
        What was decided and made; also written to ``output/mediator/report``.

    Raises:
        ConfigError: a setting does not fit this model.
        CheckpointError: a checkpoint is missing, damaged, or holds NaN or infinity.
        CheckpointMismatchError: base and experts do not belong together.
        OutputExistsError: the output is there already, or another process is building it.
        OutputError: the output cannot be written, or the disk has no room for it.
        OutOfMemoryError: it does not fit into ``max_memory``.
    """
    started = time.perf_counter()
    workers = check_workers(workers)
    config = with_experts(config or MediatorSettings(), named_paths(experts))
    require_experts(config)
    target = Path(output).expanduser().absolute()
    check_free(target)
    check_working_folders(target)
    limit = parse_bytes(max_memory)
    job = open_job(None if base is None else str(base), config, Reading(allow_pickle, dequantize), allow_distant)
    decided = None if plan is None else read_plan(Path(plan), job.structure.num_blocks)
    with single_thread():
        merge = shared_out(plan_merge(job, config, decided))
        merge = grouped(replace(merge, method=merge.method.prepared(merge.job)))
    report: BuildReport = carry_out(Build, merge, target, (workers, limit), hash_inputs, show_progress, started)
    return report


def open_job(
    base: str | None,
    config: MediatorSettings,
    reading: Reading = PLAIN,
    allow_distant: bool = False,
) -> Job:
    """Open base and experts and check that they belong together.

    Raises:
        CheckpointError: one is missing or damaged.
        CheckpointMismatchError: they do not belong together.
    """
    opened = open_checkpoints(label_checkpoints(base, config.experts), reading)
    experts = checkpoints_by_name(opened, config.experts)
    job = check_job(opened["base"] if base is not None else mean_base(experts, config), experts, may_untie=True)
    check_locks(job)
    job = with_always(job, config, reading)
    return job._replace(notes=(*job.notes, *check_distances(job, allow_distant)))


def mean_base(experts: Mapping[str, Checkpoint], config: MediatorSettings) -> Checkpoint:
    """What stands in for a base that is not at hand.

    Raises:
        ConfigError: the configuration needs a base, or an expert does (a LoRA).
    """
    if config.fallback == FALLBACK_EXPERT or config.merge_method == "base":
        raise ConfigError("without a base, set fallback='backbone' and a merge_method other than 'base'.")
    if any(isinstance(expert, LoraCheckpoint) for expert in experts.values()):
        raise ConfigError("a LoRA expert needs its base: give base=.")
    return MeanCheckpoint([experts[name] for name in sorted(experts)])


def carry_out(
    kind: type[Build],
    merge: Merge,
    target: Path,
    limits: tuple[int, int | None],
    hash_inputs: bool,
    show_progress: bool,
    started: float,
) -> Any:
    """Do the work in a folder that gets its name when all is done.

    Args:
        kind: what is made.
        merge: the work.
        target: folder of the output.
        limits: most workers, and most bytes of memory.
        hash_inputs: whether input files are read for their checksums.
        show_progress: a bar on the error stream.
        started: time of the performance counter.

    Returns:
        The report of ``kind.finish``.
    """
    workers = workers_within(merge, *limits)
    check_space(target, predicted_bytes(merge))
    ranks = Ranks()
    with ExitStack() as stack:
        folder = ranks.first(lambda: stack.enter_context(resumable_folder(target, job_key(merge, kind.__name__))))
        build = kind(merge, folder, hash_inputs)
        todo = ranks.first(build.prepare)
        ranks.all(lambda: build.run(todo[ranks.number :: ranks.count], workers, show_progress and not ranks.number))
        report = ranks.first(lambda: build.finish(str(target), started))
        # The folder gets its name before any rank goes on.
        ranks.first(stack.close)
    return report


class Build:
    """One build in its temporary folder."""

    def __init__(self, merge: Merge, folder: Path, hash_inputs: bool) -> None:
        self.merge = merge
        self.folder = folder
        job = merge.job
        self.backbone = BackboneFiles(folder, job.stored, job.dtype, parts=job.parts)
        self.digests = FileDigests(inputs(merge).values(), hash_inputs, self.backbone.paths)
        self.pieces = JournalStore(folder / JOURNAL)
        write = self.backbone.write_rows
        self.work = TensorWork(job.base, job.experts, merge.config, job.dtype, write, merge.method, merge.groups)

    def prepare(self) -> list[int]:
        """Lay out the backbone; numbers of the tensors that are not finished yet, the longest first."""
        tasks, shapes = self.merge.tasks, self.merge.job.base.tensors
        ready = self.folder / JOURNAL / "backbone"
        if not ready.exists():
            self.backbone.create()
            ready.touch()
        todo = [number for number in range(len(tasks)) if self.pieces.get(number) is None]
        # No worker shall be left with a long one at the end.
        return sorted(todo, key=lambda number: (-prod(shapes[tasks[number].name].shape), number))

    def run(self, todo: list[int], workers: int, show_progress: bool) -> None:
        """Merge these tensors."""
        progress = bar_progress if show_progress else no_progress
        merge_one = self._merge_one
        if workers == 1 and len(todo) == len(self.merge.tasks):
            # In the order of the files, whose checksums are then taken at the same time.
            todo, merge_one = sorted(todo, key=self._place), self._merge_and_digest
            for name, size in self.backbone.header_bytes.items():
                self.digests.written[name].advance(size)
            self.backbone.watch(self.digests)
        with single_thread(), progress("merging", len(todo)) as advance:
            if workers > 1 and self.merge.needs_torch:
                torch.get_num_threads()  # imported once, before there are several processes
            for _ in run_all(merge_one, todo, workers):
                advance()

    def _place(self, number: int) -> tuple[str, int, int]:
        """Where a tensor lies in the base's files."""
        path, end = self.merge.job.base.place(self.merge.tasks[number].name) or ("", 0)
        return str(path), end, number

    def _merge_and_digest(self, number: int) -> None:
        with self.digests.watching():
            self._merge_one(number)
        self.digests.follow(self.merge.tasks[number].name)

    def _merge_one(self, number: int) -> None:
        task = self.merge.tasks[number]
        result = self.work(task)
        result.deltas |= always_deltas(self.merge.job, self.merge.config, task)
        names = [name for name in (task.name, task.bias) if name is not None]
        samples = {name: sample(self.backbone.read(name)) for name in names if name in self.merge.sampled}
        info = finished(result, samples)
        self.pieces.put(number, task.name.removesuffix(".weight"), result, info)

    def write_side_files(self) -> str | None:
        """Close the backbone and write what a checkpoint has beside its weights; gives back the base's licence."""
        self.backbone.close()
        base = self.merge.job.base
        copy_model_config(self.folder, base, self.merge.job.dtype)
        source = base.members[0] if isinstance(base, MeanCheckpoint) else base
        if source.folder is None:
            return None
        copy_side_files(source.folder, self.folder)
        return licence(source.folder)

    def finish(self, target: str, started: float) -> Any:
        """Decide what is routed, and write everything but the backbone."""
        folder, tasks = self.folder, self.merge.tasks
        terms = self.write_side_files()
        done = [self._info(number) for number in range(len(tasks))]
        samples = {name: sample(self.backbone.read(name)) for name in self.merge.sampled_fused}
        built, report = conclude(self.merge, done, samples)
        adapter = folder / SUBFOLDER
        # What a killed run had written of it would be listed among the files.
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        numbers = {f"{task.name}": number for number, task in enumerate(tasks)}
        routed = [numbers[f"{name}.weight"] for name in built.routed_modules or []]
        self.pieces.join(routed, adapter / WEIGHTS_FILE)
        built.base_model_name_or_path = ".."
        write_config(adapter, built)
        write_provenance(adapter, self.merge, self.digests)
        report.output = target
        report.seconds = time.perf_counter() - started
        (adapter / CARD).write_text(model_card(built, report, terms), encoding="utf-8")
        (folder / CARD).write_text(output_card(built, terms), encoding="utf-8")
        report.files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and JOURNAL not in path.parts
        }
        write_report(report, adapter / "report")
        write_checksums(folder, adapter, self.digests.written)
        return report

    def _info(self, number: int) -> Finished:
        info = self.pieces.get(number)
        assert info is not None, f"tensor {number} was not finished"
        return info


def job_key(merge: Merge, kind: str = "Build") -> str:
    """Says of two builds whether they are the same work: settings, tensors, and the input files by size and time."""
    config, job = merge.config, merge.job
    files = {label: checkpoint.files for label, checkpoint in {"base": job.base, **job.experts}.items()}
    files["merge_data"] = data_files(config)
    for name, always in job.always.items():
        files |= {f"always-on {name}": always.checkpoint.files, f"reference of {name}": always.reference.files}
    known = {
        "version": FORMAT_VERSION,
        # After a restart of the machine, what was written last may be lost.
        "machine": _boot_id(),
        "config": {item.name: repr(getattr(config, item.name)) for item in fields(MediatorSettings)},
        "tasks": [list(task) for task in merge.tasks],
        "kind": kind,
        "dtype": str(job.dtype),
        "files": {
            label: [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
            for label, paths in files.items()
        },
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def named_paths(experts: Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """Expert name → path as text.

    Raises:
        ConfigError: they are no pairs of name and path.
    """
    if not isinstance(experts, Mapping):
        raise ConfigError(f"experts must be pairs of name and path, {{'math': 'path/to/math'}}, got {experts!r}.")
    for name, path in experts.items():
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"expert {name!r} must be a path or a hub id, got {path!r}.")
    return {name: str(path) for name, path in experts.items()}


def with_experts(config: MediatorSettings, experts: dict[str, str]) -> MediatorSettings:
    """A configuration with other experts."""
    return replace(config, experts=experts)
