"""``mediator-peft plan``: what a build would do, need and give, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import BAD_INPUT, AsJson, check_file, console, print_json, quiet_transformers, say
from .merge_options import MergeOptions, Sources, WorkOptions, merge_settings
from .option_groups import takes_groups


@takes_groups
def plan(
    ctx: typer.Context,
    *,
    sources: Sources,
    merging: MergeOptions,
    work: WorkOptions,
    output: Annotated[
        Path | None, typer.Option(help="Where the build would write; the space on its disk is checked.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan to this file; edit it and give it to `build --plan`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check base and experts from their headers, and predict size, time and memory of a build.

    Lists all problems at once and ends with exit code 3 if there is one. Conflict scores are estimated from samples.

    Example:
      mediator-peft plan --base base --expert math=math --expert cron=cron --save plan.json
    """
    from ..merge.preflight import plan_mediator

    quiet_transformers()
    if save is not None:
        check_file(save, "--save")
    config, experts = merge_settings(ctx, sources.base, merging), sources.experts
    found = plan_mediator(
        base=sources.base, experts=experts, output=output, config=config, plan=merging.plan_file, **work.arguments()
    )
    if save is not None and found.is_ok:
        found.save(save)
        say(f"plan written to {save}; edit it and give it to `build --plan`")
    show_plan(found, as_json)


def show_plan(found: Any, as_json: bool) -> None:
    """Print what a build would do; a plan with problems ends the command."""
    if as_json:
        print_json(found.to_dict())
    else:
        _print_plan(found)
    if not found.is_ok:
        raise typer.Exit(BAD_INPUT)


def _print_plan(found: Any) -> None:
    from rich.table import Table

    for problem in found.problems:
        say(f"problem: {problem}")
    for warning in found.warnings:
        say(f"warning: {warning}")
    for hint in found.hints:
        say(f"hint: {hint}")
    if not found.is_ok:
        return
    routed = [block for block in found.blocks if block["routed"]]
    table = Table(show_header=False, box=None)
    table.add_row("blocks with experts", f"{len(routed)} of {len(found.blocks)}")
    table.add_row("density", f"{found.density:.4f}")
    for part, size in found.bytes.items():
        table.add_row(f"bytes, {part}", f"{size / 1e6:,.1f} MB")
    table.add_row("time", f"about {found.seconds:.0f} s")
    table.add_row("largest memory", f"about {found.peak_memory_bytes / 1e9:.1f} GB")
    console().print(table)
    _print_alternatives(found)


def _print_alternatives(found: Any) -> None:
    """What other families and encodings would take."""
    adapter, shared = found.bytes["adapter"], found.bytes_with_families
    would = "with --families auto: " if shared not in (None, adapter) else "families: "
    for note in found.sharing:
        say(would + note)
    if shared not in (None, adapter):
        say(f"with --families auto the adapter takes {shared / 1e6:,.1f} MB in place of {adapter / 1e6:,.1f} MB")
    if found.bytes_by_encoding:
        sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in found.bytes_by_encoding.items())
        say(f"adapter by --encoding, all at density {found.density:.4g}: {sizes}; how accurate they are: docs/forms.md")
