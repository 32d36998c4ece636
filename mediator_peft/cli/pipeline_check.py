"""Everything that can be checked of a pipeline before its first step: names, data files, places, earlier builds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checkpoints.adapter_files import find_adapter
from ..data_files import DataFileError, MalformedJsonError, parse_json, read_text
from ..errors import AdapterError, ConfigError, MediatorError, OutputExistsError
from .bounded_yaml import MalformedYamlError, parse_yaml
from .common import check_folder, check_match, check_output, reading_output
from .loading import ModelLoading

if TYPE_CHECKING:
    from ..merge.merge_job import Merge
    from .pipeline_file import EvalSection, Pipeline

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_pipeline(pipeline: Pipeline, steps: Sequence[str]) -> bool:
    """Check all steps before the first one starts.

    Args:
        pipeline: a file whose keys and values were checked.
        steps: those that will be run.

    Returns:
        Whether the output holds this very build already, so that the step build has nothing to do.

    Raises:
        ConfigError: something cannot work; all faults are listed.
        OutputExistsError: the output holds another build.
        MediatorError: base and experts cannot be merged.
    """
    output, faults = Path(pipeline.build.output), list[str]()
    experts = list(pipeline.build.experts)
    if "build" in steps:
        _collect(faults, "build.output", lambda: check_folder(output.parent, "the folder of the output"))
        if len(steps) > 1:
            faults += _tokenizer_faults(pipeline.build.base)
    else:
        experts = _existing(faults, output, experts)
    if "calibrate" in steps:
        faults += _calibration_faults(pipeline.calibrate, experts)
    if "eval" in steps and pipeline.eval is not None:
        faults += _evaluation_faults(pipeline.eval)
        if "calibrate" not in steps and not _has_router(output):
            faults.append("eval needs a fitted router: add the section calibrate, or run fit-router first")
    if faults:
        raise ConfigError("the pipeline cannot be run:\n- " + "\n- ".join(faults))
    return "build" in steps and _is_built(pipeline, output)


def _collect(faults: list[str], where: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (MediatorError, OSError) as fault:
        faults.append(f"{where}: {fault}")
    except typer.BadParameter as fault:
        faults.append(f"{where}: {fault.message}")


def _tokenizer_faults(base: str | None) -> list[str]:
    if base is None or not Path(base).is_dir() or any((Path(base) / name).is_file() for name in _TOKENIZER_FILES):
        return []
    return [f"build.base: {base!r} has no tokenizer, which calibrate and eval need: tokenizer.save_pretrained(folder)"]


def _existing(faults: list[str], output: Path, experts: list[str]) -> list[str]:
    from .fit_router import saved_experts

    found: list[list[str] | None] = []

    def read() -> None:
        if not output.is_dir():
            raise AdapterError(f"{str(output)!r} is not there. Run the step build, too.")
        check_output(output)
        found.append(saved_experts(output))

    _collect(faults, "build.output", read)
    return found[0] if found and found[0] else experts


def _has_router(output: Path) -> bool:
    from ..checkpoints.adapter_sizes import read_adapter_info

    if not output.is_dir():
        return False
    with reading_output(output):
        return read_adapter_info(output).has_router


def _calibration_faults(section: Any, experts: Sequence[str]) -> list[str]:
    from ..evaluation.prompts import read_prompts, read_task
    from ..routing.background import user_families
    from .fit_router import check_prompts

    faults: list[str] = []
    prompts: dict[str, list[str]] = {}
    _collect(faults, "calibrate.match", lambda: check_match(section.match))
    _check_machine(faults, "calibrate", section)
    for name, path in section.data.items():
        _collect(
            faults,
            f"calibrate.data.{name}",
            lambda name=name, path=path: prompts.update({name: read_prompts(path, section.text_column)}),  # type: ignore[misc]
        )
    if not faults:
        _collect(faults, "calibrate.data", lambda: check_prompts(prompts, experts))
    if section.background is not None:
        _collect(faults, "calibrate.background", lambda: user_families(section.background))
    if section.answered is not None:
        how = section.match if not any("calibrate.match" in fault for fault in faults) else "exact"
        _collect(faults, "calibrate.answered", lambda: read_task(section.answered, how, section.text_column))
    return faults


def _evaluation_faults(section: EvalSection) -> list[str]:
    from ..evaluation.prompts import read_task

    faults: list[str] = []
    _collect(faults, "eval.match", lambda: check_match(section.match))
    how = "exact" if faults else section.match
    _check_machine(faults, "eval", section)
    for name, path in section.data.items():
        _collect(faults, f"eval.data.{name}", lambda path=path: read_task(path, how))  # type: ignore[misc]
    if section.include_path is not None and not Path(section.include_path).is_dir():
        faults.append(f"eval.include_path: no folder {section.include_path!r}")
    if section.report is not None:
        report = Path(section.report)
        _collect(faults, "eval.report", lambda: check_folder(report, "the report"))
    return faults


def _check_machine(faults: list[str], name: str, section: Any) -> None:
    loading = ModelLoading(section.dtype, section.device, section.quantize)
    _collect(faults, f"{name}.device, {name}.dtype or {name}.quantize", loading.how)


def _is_built(pipeline: Pipeline, output: Path) -> bool:
    """Whether the output is the finished build of this pipeline.

    Raises:
        OutputExistsError: it is something else.
        MediatorError: base and experts cannot be merged.
    """
    merge = _planned_merge(pipeline)
    if not output.exists() and not output.is_symlink():
        return False
    reason = _difference(merge, output)
    if reason is not None:
        raise OutputExistsError(
            f"output {str(output)!r} exists and is not a finished build of this pipeline: {reason}. Choose another "
            "output, or delete this one first."
        )
    return True


def _planned_merge(pipeline: Pipeline) -> Merge:
    """The work of the build as far as headers say it; see ``build_mediator``."""
    from ..checkpoints.opening import Reading
    from ..merge.block_plan import read_plan
    from ..merge.budget import shared_out
    from ..merge.builder import plan_merge, require_experts, single_thread
    from ..merge.offline import open_job, with_experts

    section = pipeline.build
    config = with_experts(pipeline.config, section.experts)
    require_experts(config)
    reading = Reading(section.allow_pickle, section.dequantize)
    job = open_job(section.base, config, reading, section.allow_distant)
    decided = None if section.plan is None else read_plan(Path(section.plan), job.structure.num_blocks)
    with single_thread():
        merge = plan_merge(job, config, decided)
        # Only an output to compare with is worth the samples that a budget takes.
        return shared_out(merge) if Path(section.output).exists() else merge


def _difference(merge: Merge, output: Path) -> str | None:
    """In what an output differs from what a merge would give; None where it is the same."""
    from ..merge.block_plan import read_plan
    from ..merge.provenance import PIPELINE_FILE, PLAN_FILE, PROVENANCE_FILE, build_section, inputs

    try:
        adapter = find_adapter(output)
        stored = parse_yaml(read_text(adapter / PIPELINE_FILE))["build"]
        provenance = parse_json(read_text(adapter / PROVENANCE_FILE))["inputs"]
        expected = json.loads(json.dumps(build_section(merge)))
        for key in sorted({*expected, *stored}):
            if expected.get(key) != stored.get(key):
                return f"build.{key} is another one"
        if merge.plan is not None and read_plan(adapter / PLAN_FILE, merge.job.structure.num_blocks) != merge.plan:
            return "build.plan is another one"
        built = (adapter / PROVENANCE_FILE).stat().st_mtime
        for label, checkpoint in inputs(merge).items():
            for path in checkpoint.files:
                known = provenance[label]["files"].get(path.name, {})
                if known.get("bytes") != path.stat().st_size or (
                    path.stat().st_mtime > built and not _has_sha256(path, known.get("sha256"))
                ):
                    return f"{label} has changed since"
    except (MediatorError, DataFileError, MalformedYamlError, MalformedJsonError, OSError) as fault:
        return f"it cannot be read ({fault})"
    except (KeyError, TypeError, AttributeError) as fault:
        return f"its record of the build is incomplete ({fault!r})"
    return None


def _has_sha256(path: Path, expected: object) -> bool:
    from ..checkpoints.checksums import file_sha256

    return expected is not None and file_sha256(path) == expected
