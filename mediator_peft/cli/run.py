"""``mediator-peft run``: build, fit the router and evaluate from one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import AsJson, print_json, quiet_transformers, say

if TYPE_CHECKING:
    from .pipeline_file import BuildSection, CalibrateSection

_STEPS = ("build", "calibrate", "eval")


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: build, calibrate, eval.", show_default=False)],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a value of the file: build.config.density=0.1; repeatable."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Run only this step: build, calibrate or eval; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and the inputs, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build, fit the router (calibrate) and evaluate as described in a YAML file.

    All sections, data files, columns and names are checked before the first step; all faults are listed. Run again
    after an interruption, it continues: a finished build of the same file is used, another one in its place is refused.
    The output keeps the file with pinned sources: mediator/pipeline.yaml.

    Example:
      mediator-peft run all.yaml --set build.output=out --only build
    """
    from ..ranks import Ranks
    from .pipeline_check import check_pipeline
    from .pipeline_file import read_pipeline

    quiet_transformers()
    unknown = sorted(set(only or ()) - set(_STEPS))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no step; choose from {', '.join(_STEPS)}.", param_hint="--only")
    pipeline = read_pipeline(file, parse_settings(setting or []))
    steps = [name for name in _STEPS if getattr(pipeline, name) is not None and name in (only or _STEPS)]
    if not steps:
        raise typer.BadParameter(f"{str(file)!r} has none of these sections.", param_hint="--only")
    is_built = Ranks().first(lambda: check_pipeline(pipeline, steps))
    if dry_run:
        from .plan import show_plan

        say(f"steps: {', '.join(steps)}")
        if is_built:
            say(f"{pipeline.build.output} holds this build already")
        else:
            show_plan(_plan(pipeline), as_json)
        return
    output = Path(pipeline.build.output)
    done: dict[str, Any] = {}
    if "build" in steps:
        done["build"] = _report_of(output) if is_built else _build(pipeline)
    if "calibrate" in steps and pipeline.calibrate is not None:
        done["calibrate"] = _calibrate(pipeline.calibrate, output)
        Ranks().first(lambda: _keep(pipeline, ["calibrate"], output))
    if "eval" in steps and pipeline.eval is not None:
        from .evaluate import evaluate

        options = asdict(pipeline.eval)
        for name in ("report", "include_path"):
            options[name] = None if options[name] is None else Path(options[name])
        options["data"] = _pairs(options["data"]) if options["lm_eval"] is None else None
        options["baseline"] = _pairs(options.pop("baselines"))
        evaluate(output, **options, as_json=as_json)
        Ranks().first(lambda: _keep(pipeline, ["eval"], output))
    elif as_json:
        print_json(done)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["build.workers=2", …]`` as a dict; values are YAML.

    Raises:
        typer.BadParameter: no ``=``, no key, or no YAML.
    """
    from .bounded_yaml import MalformedYamlError, parse_yaml

    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and key):
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE.", param_hint="--set")
        try:
            found[key] = parse_yaml(value)
        except MalformedYamlError as fault:
            raise typer.BadParameter(f"{short(value)} is no YAML: {fault}", param_hint="--set") from fault
    return found


def _pairs(data: dict[str, str]) -> list[str]:
    return [f"{name}={path}" for name, path in data.items()]


def _plan(pipeline: Any) -> Any:
    from ..merge.preflight import plan_mediator

    build = pipeline.build
    return plan_mediator(build.base, build.experts, build.output, pipeline.config, **_options(build, "hash_inputs"))


def _build(pipeline: Any) -> dict[str, Any]:
    from ..merge.offline import build_mediator

    build = pipeline.build
    report = build_mediator(
        build.base, build.experts, build.output, pipeline.config, show_progress=True, **_options(build)
    )
    say(f"built {build.output} in {report.seconds:.0f} s")
    return report.to_dict()


def _options(build: BuildSection, *left_out: str) -> dict[str, Any]:
    """What a section says beside base, experts, output and settings, as keywords of the library."""
    named = ("base", "experts", "output", "config", *left_out)
    return {key: value for key, value in asdict(build).items() if key not in named}


def _report_of(output: Path) -> dict[str, Any]:
    """What the report of a finished build says."""
    from ..checkpoints.adapter_files import find_adapter
    from ..checkpoints.headers import read_json

    say(f"{output} holds this build already; it is used")
    return read_json(find_adapter(output) / "report" / "report.json")


def _calibrate(section: CalibrateSection, output: Path) -> dict[str, Any]:
    from .fit_router import calibrated

    report = calibrated(output, prompts=section, prompting=section, loading=section)
    say(f"router fitted and saved; {report['accuracy']:.1%} of held-out prompts are routed to their expert")
    return report


def _keep(pipeline: Any, steps: list[str], output: Path) -> None:
    """Add the other steps to the file that the build left in its output."""
    from ..checkpoints.adapter_files import find_adapter
    from ..data_files import DataFileError, read_text
    from ..merge.provenance import PIPELINE_FILE, write_pipeline
    from .bounded_yaml import MalformedYamlError, parse_yaml

    adapter = find_adapter(output)
    try:
        sections = parse_yaml(read_text(adapter / PIPELINE_FILE))
    except (DataFileError, MalformedYamlError):
        return
    if not isinstance(sections, dict):
        return
    for name in steps:
        section = {key: value for key, value in asdict(getattr(pipeline, name)).items() if value is not None}
        sections[name] = section
    write_pipeline(adapter, sections)
