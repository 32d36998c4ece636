"""Pipeline files: what to build, how to fit the router, what to evaluate. Strict keys; all faults are listed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_type_hints

from ..config import OLD_FIELDS, SETTABLE, MediatorSettings, with_todays_names
from ..data_files import DataFileError, read_text, surrogate_fault
from ..errors import ConfigError
from ..merge.block_plan import planned_settings
from ..merge.memory import parse_bytes
from ..tables import unknown_name
from .bounded_yaml import LARGEST_FILE, MalformedYamlError, parse_yaml
from .common import MOST_ROWS, MOST_TOKENS, MOST_WORKERS
from .fit_router import RouterPrompts
from .loading import ModelLoading, Prompting
from .merge_options import WorkOptions
from .option_needs import NEEDS, idle_options, idle_settings

_SECTIONS = ("build", "calibrate", "eval")
_COMMANDS = {"calibrate": "fit-router", "eval": "eval"}
"""Section → the command whose options it has."""

_MOST = {"batch_size": MOST_ROWS, "max_new_tokens": MOST_TOKENS, "workers": MOST_WORKERS}
"""Key → the most that it may be; the least is 1."""

_PATHS = (
    "build.output",
    "build.plan",
    "build.config.merge_data",
    "calibrate.answered",
    "calibrate.background",
    "eval.report",
    "eval.include_path",
)


@dataclass(frozen=True)
class BuildSection(WorkOptions):
    """Arguments of ``build_mediator``."""

    base: str | None = None
    experts: dict[str, str] = field(default_factory=dict)
    output: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of ``MediatorConfig``."""

    plan: str | None = None
    hash_inputs: bool = True
    max_memory: str | int | None = None  # type: ignore[assignment]  # YAML has whole numbers, a command line has not


@dataclass(frozen=True)
class CalibrateSection(ModelLoading, Prompting, RouterPrompts):
    """Options of ``mediator-peft fit-router``."""


@dataclass(frozen=True)
class EvalItems:
    """What is measured."""

    data: dict[str, str] = field(default_factory=dict)
    """Task → file of prompts and answers; a task named like an expert is that expert's task."""

    baselines: dict[str, str] = field(default_factory=dict)
    """Name → checkpoint that answers the same items."""

    lm_eval: str | None = None
    """Tasks of lm-evaluation-harness, separated by commas, in place of data."""

    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    match: str = "exact"
    max_new_tokens: int | None = None
    report: str | None = None
    only_routed: bool = False


@dataclass(frozen=True)
class EvalSection(ModelLoading, Prompting, EvalItems):
    """Options of ``mediator-peft eval``."""


@dataclass
class Pipeline:
    """A pipeline file, checked."""

    build: BuildSection
    calibrate: CalibrateSection | None = None
    eval: EvalSection | None = None

    @property
    def config(self) -> MediatorSettings:
        """The configuration of the build: what the file says goes before what its plan was made with.

        Raises:
            ConfigError: the plan cannot be read, or contradicts the file.
        """
        planned = {} if self.build.plan is None else planned_settings(Path(self.build.plan))
        given = with_todays_names(self.build.config or {})
        idle = idle_settings(given, {**planned, **given}, self.build.plan is not None)
        faults = [f"build.config.{need.option} {_in_file(need.reason)}." for need in idle]
        if faults:
            raise ConfigError("\n".join(faults))
        return MediatorSettings(**{**planned, **given})


def read_pipeline(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Pipeline:
    """Read a pipeline file.

    Example::

        build:
          base: models/base
          experts: {math: models/math, cron: models/cron}
          output: out
          config: {density: 0.2}
        calibrate:
          data: {math: math.jsonl, cron: cron.jsonl}

    Args:
        path: YAML. Relative paths in it count from its folder.
        overrides: dotted key → value, e.g. ``{"build.config.density": 0.1}``; they win over the file.

    Raises:
        ConfigError: it cannot be read, or keys or values are wrong; all faults are listed.
    """
    path = Path(path).expanduser()
    content = _load(path)
    for key, value in (overrides or {}).items():
        if key.count(".") > 2:
            raise ConfigError(f"unknown key {short(key)}: a key is like build.config.density.")
        # What comes from a command line counts from where that was typed.
        is_path = key in _PATHS and isinstance(value, str)
        _put(content, key.split("."), str(Path(value).expanduser().absolute()) if is_path else value)
    faults = list(_faults(content))
    if faults:
        raise ConfigError(f"pipeline {str(path)!r}:\n- " + "\n- ".join(faults))
    folder = path.absolute().parent
    pipeline = Pipeline(BuildSection(**_located(content["build"], folder)))
    if content.get("calibrate") is not None:
        pipeline.calibrate = CalibrateSection(**_located(content["calibrate"], folder))
    if content.get("eval") is not None:
        pipeline.eval = EvalSection(**_located(content["eval"], folder))
    return pipeline


def _located(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a section says, its files and checkpoints counted from the pipeline's folder."""
    found = _given(section)
    for name in ("output", "plan", "answered", "background", "report", "include_path"):
        if name in found:
            found[name] = str(folder / Path(found[name]).expanduser())
    for name in ("experts", "data", "baselines"):
        if name in found:
            found[name] = {key: _local(source, folder) or "" for key, source in found[name].items()}
    if "base" in found:
        found["base"] = _local(found["base"], folder)
    if found.get("config", {}).get("merge_data"):
        merge_data = str(folder / Path(found["config"]["merge_data"]).expanduser())
        found["config"] = {**found["config"], "merge_data": merge_data}
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_text(path, LARGEST_FILE))
    except (DataFileError, MalformedYamlError) as fault:
        raise ConfigError(f"pipeline {str(path)!r} cannot be read: {fault}") from fault
    if not isinstance(content, dict):
        raise ConfigError(f"pipeline {str(path)!r} must hold the sections {', '.join(_SECTIONS)}.")
    return content


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section that say something: null, or nothing after the colon, means the default."""
    return {key: value for key, value in section.items() if value is not None}


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.get(key)
        content[key] = inner if isinstance(inner, dict) else {}
        content = content[key]
    content[keys[-1]] = value


def _faults(content: Mapping[str, Any]) -> list[str]:
    faults = _unwritable(content)
    if faults:
        return faults
    faults = [unknown_name(key, _SECTIONS, "section") for key in content if key not in _SECTIONS]
    build = content.get("build")
    if not isinstance(build, dict):
        return [*faults, "the section build is missing"]
    faults += _section_faults("build", build, BuildSection)
    for name in ("output", "experts"):
        if not build.get(name):
            faults.append(f"build.{name} is missing")
    settings = build.get("config") or {}
    if isinstance(settings, dict) and "experts" in settings:
        faults.append("build.config.experts: name the experts in build.experts")
    elif isinstance(settings, dict):
        known = SETTABLE | OLD_FIELDS.keys()
        unknown = [key for key in settings if key not in known]
        faults += [unknown_name(key, SETTABLE, "key of build.config") for key in unknown]
        try:
            MediatorSettings(**{key: value for key, value in settings.items() if key in known})
        except ConfigError as fault:
            faults += [f"build.config: {line}" for line in str(fault).splitlines()]
    try:
        parse_bytes(build.get("max_memory"))
    except ConfigError as fault:
        faults.append(f"build: {fault}")
    for name, form in (("calibrate", CalibrateSection), ("eval", EvalSection)):
        section = content.get(name)
        if isinstance(section, dict):
            faults += _section_faults(name, section, form)
            for need in idle_options(NEEDS[_COMMANDS[name]], _given(section), section):
                faults.append(f"{name}.{need.option} {_in_file(need.reason)}")
            if name == "eval" and section.get("lm_eval"):
                faults += ["eval: give either data or lm_eval"] if section.get("data") else []
            elif not section.get("data"):
                faults.append(f"{name}.data is missing")
        elif section is not None:
            faults.append(f"{name} must be a section with data:, got {short(section)}")
    return faults


def _in_file(reason: str) -> str:
    """Why an option has no effect, with the names that keys of a file have."""
    return re.sub(r"--([a-z-]+)", lambda found: found.group(1).replace("-", "_"), reason)


def _unwritable(value: Any, place: str = "") -> list[str]:
    """Texts with half of a character: no path and no name can hold one."""
    if isinstance(value, str):
        fault = surrogate_fault(value)
        return [] if fault is None else [f"{place or 'the file'} {fault}"]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = []
    for key, inner in parts:
        found += _unwritable(key, place) + _unwritable(inner, f"{place}.{key}".lstrip("."))
    return found


def _section_faults(name: str, section: Mapping[str, Any], form: type) -> list[str]:
    known, types = {item.name: item for item in fields(form)}, get_type_hints(form)
    faults = [unknown_name(key, known, f"key of {name}") for key in section if key not in known]
    for key, value in section.items():
        if key not in known or value is None:
            continue
        item = known[key]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if isinstance(default, dict) and not isinstance(value, dict):
            faults.append(f"{name}.{key} must be pairs of name and value, got {short(value)}")
        elif types[key] == dict[str, str]:
            odd = {inner: path for inner, path in value.items() if not (isinstance(path, str) and path)}
            faults += [f"{name}.{key}.{inner} must be a path, got {short(path)}" for inner, path in odd.items()]
        elif key in ("limit", "num_fewshot"):
            if isinstance(value, bool) or not isinstance(value, int) or value < (key == "limit"):
                faults.append(f"{name}.{key} must be a whole number, got {short(value)}")
        elif types[key] in (str, str | None) and not isinstance(value, str):
            faults.append(f"{name}.{key} must be text, got {short(value)}")
        elif key in _MOST:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST[key]:
                faults.append(f"{name}.{key} must be a whole number from 1 to {_MOST[key]}, got {short(value)}")
        elif isinstance(default, bool) != isinstance(value, bool):
            faults.append(f"{name}.{key} must be {'true or false' if isinstance(default, bool) else 'no truth value'}")
    return faults


def _local(source: str | None, folder: Path) -> str | None:
    """A relative path counted from the file's folder, where something lies there; hub ids stay."""
    if source is None:
        return None
    beside = folder / Path(str(source)).expanduser()
    return str(beside) if beside.exists() else str(source)
