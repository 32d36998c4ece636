"""``mediator-peft run``: the whole way by one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, print_json, quiet_transformers, say

_STEPS = ("build", "calibrate", "eval")


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: build, calibrate, eval.", show_default=False)],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Overrules the file, e.g. build.config.density=0.1; repeatable."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Only this step: build, calibrate or eval; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and the inputs, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build, calibrate and evaluate as a YAML file says. Unknown keys are refused; all faults are listed at once.

    The output keeps the file as it was carried out, with sources pinned: mediator/pipeline.yaml.

    Example:
      mediator-peft run all.yaml --set build.output=out --only build
    """
    from ..ranks import Ranks
    from .pipeline_file import read_pipeline

    quiet_transformers()
    unknown = sorted(set(only or ()) - set(_STEPS))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no step; choose from {', '.join(_STEPS)}.", param_hint="--only")
    pipeline = read_pipeline(file, parse_settings(setting or []))
    steps = [name for name in _STEPS if getattr(pipeline, name) is not None and name in (only or _STEPS)]
    _require_data(pipeline, steps)
    if dry_run:
        from .plan import show_plan

        say(f"steps: {', '.join(steps)}")
        show_plan(_plan(pipeline), as_json)
        return
    output = Path(pipeline.build.output)
    done: dict[str, Any] = {}
    if "build" in steps:
        done["build"] = _build(pipeline)
    if "calibrate" in steps:
        done["calibrate"] = _calibrate(pipeline.calibrate, output)
    if "eval" in steps and pipeline.eval is not None:
        from .evaluate import evaluate

        options = asdict(pipeline.eval)
        options["report"] = None if options["report"] is None else Path(options["report"])
        evaluate(output, **{**options, "data": _pairs(options["data"])}, as_json=as_json)
    elif as_json:
        print_json(done)
    Ranks().first(lambda: _keep(pipeline, steps, output))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["build.workers=2", …]`` as a dict; values are YAML.

    Raises:
        typer.BadParameter: no ``=``, no key, or no YAML.
    """
    import yaml  # huggingface_hub brings it along

    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and key):
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE.", param_hint="--set")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as fault:
            raise typer.BadParameter(f"{value!r} is no YAML: {fault}", param_hint="--set") from fault
    return found


def _require_data(pipeline: Any, steps: list[str]) -> None:
    """Refuse files of prompts that are not there, before the build and not after it.

    Raises:
        ConfigError: some are missing; all are listed.
    """
    from ..errors import ConfigError

    named = {
        f"{step}.data.{name}": path
        for step in steps
        if step != "build"
        for name, path in getattr(pipeline, step).data.items()
    }
    if "calibrate" in steps and pipeline.calibrate.answered is not None:
        named["calibrate.answered"] = pipeline.calibrate.answered
    missing = [f"{key}: no file {path!r}" for key, path in named.items() if not Path(path).is_file()]
    if missing:
        raise ConfigError("the pipeline names files that are not there:\n- " + "\n- ".join(missing))


def _pairs(data: dict[str, str]) -> list[str]:
    return [f"{name}={path}" for name, path in data.items()]


def _plan(pipeline: Any) -> Any:
    from ..merge.preflight import plan_mediator

    build = pipeline.build
    return plan_mediator(
        build.base,
        build.experts,
        build.output,
        pipeline.config,
        plan=build.plan,
        workers=build.workers,
        max_memory=build.max_memory,
        allow_pickle=build.allow_pickle,
        dequantize=build.dequantize,
        allow_distant=build.allow_distant,
    )


def _build(pipeline: Any) -> dict[str, Any]:
    from ..merge.offline import build_mediator

    options = {key: value for key, value in asdict(pipeline.build).items() if key not in ("config", "experts")}
    base, output = options.pop("base"), options.pop("output")
    report = build_mediator(base, pipeline.build.experts, output, pipeline.config, show_progress=True, **options)
    say(f"built {output} in {report.seconds:.0f} s")
    return report.to_dict()


def _calibrate(section: Any, output: Path) -> dict[str, Any]:
    from .fit_router import calibrated

    report = calibrated(output, **asdict(section))
    say(f"router fitted and saved; {report['accuracy']:.1%} of held-out prompts went to their expert")
    return report


def _keep(pipeline: Any, steps: list[str], output: Path) -> None:
    """Add the other steps to the file that the build left in its output."""
    import yaml

    from ..checkpoints.adapter_files import find_adapter
    from ..merge.provenance import PIPELINE_FILE, write_pipeline

    adapter = find_adapter(output)
    try:
        sections = yaml.safe_load((adapter / PIPELINE_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return
    for name in steps:
        if name != "build" and isinstance(sections, dict):
            section = {key: value for key, value in asdict(getattr(pipeline, name)).items() if value is not None}
            sections[name] = section
    write_pipeline(adapter, sections)
