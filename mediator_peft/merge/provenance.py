"""Provenance of an output: checksums of all inputs, and the settings as a pipeline file that repeats the build."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoints.dequantizing import DequantizedCheckpoint
from ..checkpoints.digests import FileDigests
from ..checkpoints.opening import Checkpoint, MeanCheckpoint
from ..checkpoints.replacing import write_replacing
from ..config import MediatorSettings
from .block_plan import PLAN_VERSION
from .merge_job import Merge

PROVENANCE_FILE, PIPELINE_FILE, PLAN_FILE = "provenance.json", "pipeline.yaml", "plan.json"

# What is read beside the weights.
_SETTINGS_FILES = ("config.json", "adapter_config.json")
_PACKAGES = ("mediator_peft", "torch", "numpy", "safetensors", "transformers", "peft")


def inputs(merge: Merge) -> dict[str, Checkpoint]:
    """Label → checkpoint of all that is read."""
    job = merge.job
    return {**({} if isinstance(job.base, MeanCheckpoint) else {"base": job.base}), **job.experts}


def data_files(config: MediatorSettings) -> list[Path]:
    """The files that the merge method reads beside the checkpoints."""
    if config.merge_data is None:
        return []
    path = Path(config.merge_data).expanduser()
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


def write_provenance(adapter: Path, merge: Merge, digests: FileDigests) -> None:
    """Write ``provenance.json`` and ``pipeline.yaml``, and ``plan.json`` where a plan was obeyed.

    Args:
        adapter: the adapter's folder.
        merge: the work.
        digests: of the input files.
    """
    known = origins(merge, digests)
    (adapter / PROVENANCE_FILE).write_text(json.dumps(known, indent=2), encoding="utf-8")
    if merge.plan is not None:
        plan = {"plan_version": PLAN_VERSION, "blocks": [block._asdict() for block in merge.plan]}
        (adapter / PLAN_FILE).write_text(json.dumps(plan, indent=2), encoding="utf-8")
    write_pipeline(adapter, {"build": build_section(merge)})


def origins(merge: Merge, digests: FileDigests) -> dict[str, Any]:
    """All inputs, and the packages that made the output, as plain data."""
    found: dict[str, Any] = {
        "inputs": {
            label: {"source": checkpoint.source, "files": dict(_files(checkpoint, digests))}
            for label, checkpoint in inputs(merge).items()
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
    }
    data = merge.config.merge_data
    if data is not None:
        files = {path.name: dict(_sizes(path, digests)) for path in data_files(merge.config)}
        found["inputs"]["merge_data"] = {"source": data, "files": files}
    return found


def write_pipeline(adapter: Path, sections: dict[str, Any]) -> None:
    """Write a pipeline file that does the same again; where to is left to be said."""
    import yaml  # huggingface_hub brings it along

    head = "# Made by the build. The same again: mediator-peft run THIS --set build.output=FOLDER\n"
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    write_replacing(adapter / PIPELINE_FILE, head + text)


def build_section(merge: Merge) -> dict[str, Any]:
    """The build as a pipeline file says it: sources pinned, every setting that differs from its default."""
    job, config = merge.job, merge.config
    section: dict[str, Any] = {} if isinstance(job.base, MeanCheckpoint) else {"base": _pinned(job.base)}
    section["experts"] = {name: _pinned(job.experts[name]) for name in config.experts}
    section["config"] = dict(_settings(config))
    if merge.plan is not None:
        section["plan"] = PLAN_FILE
    read = [job.base, *job.experts.values()]
    if any(path.suffix == ".bin" for checkpoint in read for path in checkpoint.files):
        section["allow_pickle"] = True
    if any(isinstance(checkpoint.whole, DequantizedCheckpoint) for checkpoint in read):
        section["dequantize"] = True
    return section


def _settings(config: MediatorSettings) -> Iterator[tuple[str, Any]]:
    for item in fields(MediatorSettings):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(config, item.name)
        if item.name == "merge_data" and value is not None:
            value = str(Path(value).expanduser().absolute())
        if item.name != "experts" and value != default:
            yield item.name, value


def _pinned(checkpoint: Checkpoint) -> str:
    """A hub id with its commit; a local folder as an absolute path."""
    folder = Path(checkpoint.source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else checkpoint.source


def _files(checkpoint: Checkpoint, digests: FileDigests) -> Iterator[tuple[str, dict[str, Any]]]:
    folder: Path | None = getattr(checkpoint, "folder", None)
    beside = [folder / name for name in _SETTINGS_FILES] if folder is not None else []
    for path in [*checkpoint.files, *(path for path in beside if path.is_file())]:
        yield path.name, dict(_sizes(path, digests))


def _sizes(path: Path, digests: FileDigests) -> Iterator[tuple[str, Any]]:
    yield "bytes", path.stat().st_size
    sha256 = digests.sha256(path)
    if sha256 is not None:
        yield "sha256", sha256


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
