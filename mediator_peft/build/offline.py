"""build_mediator(): base and experts on disk in, a folder that loads anywhere out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from ..bank.adapter_file import SUBFOLDER, write_adapter
from ..config import MediatorConfig
from ..progress import bar_progress, no_progress
from .builder import checkpoints_by_name, label_checkpoints, merge_checkpoints, require_experts
from .card import model_card
from .checkpoints import FolderCheckpoint, open_checkpoints
from .compatibility import check_job
from .report import BuildReport, write_report
from .writing import BackboneWriter, check_free, copy_side_files, new_folder, write_model_config


def build_mediator(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: MediatorConfig | None = None,
    show_progress: bool = False,
) -> BuildReport:
    """Merge fine-tuned models of one base into a backbone and a bank of sparse deltas, one tensor at a time.

    The output is an ordinary checkpoint of the backbone, with the adapter in its folder ``mediator/``. It appears under
    its name when all is done, and not at all otherwise.

    Args:
        base: folder or hub id of the model that the experts were fine-tuned from.
        experts: name → folder or hub id.
        output: a folder that does not exist yet.
        config: how to merge; its ``experts`` are replaced by the argument.
        show_progress: a bar on the error stream.

    Returns:
        What was decided and made; also written to ``output/mediator/report``.

    Raises:
        ConfigError: a setting does not fit this model.
        CheckpointError: a checkpoint is missing, damaged, or holds NaN or infinity.
        CheckpointMismatchError: base and experts do not belong together.
        OutputExistsError: the output is there already.
    """
    started = time.perf_counter()
    config = _with_experts(config or MediatorConfig(), {name: str(path) for name, path in experts.items()})
    require_experts(config)
    target = Path(output).expanduser()
    check_free(target)
    opened = open_checkpoints(label_checkpoints(str(base), config.experts))
    job = check_job(opened["base"], checkpoints_by_name(opened, config.experts))
    itemsize = job.dtype.itemsize
    sizes = {name: itemsize * _numel(job.base.tensors[name].shape) for name in job.names}
    with new_folder(target) as folder:
        writer = BackboneWriter(folder, sizes)
        progress = bar_progress if show_progress else no_progress
        bank, built, report = merge_checkpoints(job, config, writer.put, progress)
        writer.close()
        write_model_config(folder, job.base.config, job.dtype)
        source = opened["base"]
        if isinstance(source, FolderCheckpoint):
            copy_side_files(source.folder, folder)
        adapter = folder / SUBFOLDER
        adapter.mkdir()
        built.base_model_name_or_path = ".."
        write_adapter(adapter, built, bank.deltas, router={})
        report.output = str(target)
        report.seconds = time.perf_counter() - started
        (adapter / "README.md").write_text(model_card(built, report), encoding="utf-8")
        report.files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        write_report(report, adapter / "report")
    return report


def _with_experts(config: MediatorConfig, experts: dict[str, str]) -> MediatorConfig:
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    return MediatorConfig(**{**settings, "experts": experts})


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
