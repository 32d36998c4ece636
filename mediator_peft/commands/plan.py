"""``mediator-peft plan``: what a build would do, need and give, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import MediatorSettings
from .build import parse_routed_layers
from .common import BAD_INPUT, AsJson, console, parse_pairs, print_json, quiet_transformers, say


def plan(
    base: Annotated[str, typer.Option(help="The base: a folder, or org/model[@revision].", show_default=False)],
    expert: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A fine-tuned expert; once for each.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="Where the build would write; its disk is looked at.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan here, to be edited and given to build.")] = None,
    density: Annotated[float, typer.Option(help="Share of a delta's entries that is kept, in (0, 1].")] = 0.2,
    density_scope: Annotated[
        str, typer.Option(help="Where density holds: in each matrix, or in the model (one threshold).")
    ] = "matrix",
    budget: Annotated[
        str | None, typer.Option(help="Fit density to the bytes of backbone and adapter: 1.5x the backbone, or 400MB.")
    ] = None,
    values: Annotated[str, typer.Option(help="How kept entries are stored: sign, float, int8 or nf4.")] = "sign",
    sparsifier: Annotated[str, typer.Option(help="What is kept: magnitude, random or svd.")] = "magnitude",
    merge_method: Annotated[
        str, typer.Option(help="How experts become the backbone, e.g. average, base, ties.")
    ] = "average",
    routed_layers: Annotated[
        str, typer.Option(help="auto, all, a share such as 0.5, or numbers such as 0,1.")
    ] = "auto",
    max_memory: Annotated[str | None, typer.Option(help="Most memory the build may take, e.g. 4GiB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check base and experts by their headers, and predict size, time and memory of a build.

    Lists every problem at once and ends with 3 if there is one. Conflict scores are estimated from samples.

    Example:
      mediator-peft plan --base base --expert math=math --expert cron=cron --save plan.json
    """
    from ..build.preflight import plan_mediator

    quiet_transformers()
    config = MediatorSettings(
        density=density,
        density_scope=density_scope,
        budget=budget,
        values=values,
        sparsifier=sparsifier,
        merge_method=merge_method,
        routed_layers=parse_routed_layers(routed_layers),
    )
    found = plan_mediator(base, parse_pairs(expert, "--expert"), output, config, max_memory=max_memory)
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
