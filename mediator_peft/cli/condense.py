"""``mediator-peft condense``: a bank with equal experts stored once, and families as a shared delta and residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import AsJson, OutputFolder, check_output, console, print_json, quiet_transformers, reading_output, say

if TYPE_CHECKING:
    from rich.console import Console

    from ..tuner.condensing import CondenseReport


def condense(
    out: OutputFolder,
    families: Annotated[
        bool, typer.Option(help="Also let related experts share one delta and have thin residuals.")
    ] = True,
    min_cosine: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Mean cosine of deltas from which on experts are a family.")
    ] = 0.3,
    residual_density: Annotated[
        float, typer.Option(min=0.0001, max=1.0, help="Share of a residual's entries that is kept.")
    ] = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be shared; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store equal experts of OUT once, and what families of experts have in common once; names and router stay.

    Example:
      mediator-peft condense out --dry-run
    """
    from ..checkpoints.adapter_files import WEIGHTS_FILE, find_adapter
    from ..checkpoints.adapter_sizes import format_bytes
    from ..evaluation.fit_and_save import save_router
    from ..tuner.loading import load_mediator

    quiet_transformers()
    check_output(out)
    with reading_output(out):
        model, _ = load_mediator(out, dtype="auto")
    report = model.condense(
        min_cosine=min_cosine, residual_density=residual_density, with_families=families, dry_run=dry_run
    )
    file = find_adapter(out) / WEIGHTS_FILE
    before = file.stat().st_size
    if not dry_run and (report.aliases or report.families):
        save_router(model, find_adapter(out), lambda folder: {})
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report, console())
        if file.stat().st_size != before:
            console().print(f"adapter file: {format_bytes(before)} -> {format_bytes(file.stat().st_size)}")
    if not report.aliases and not report.families:
        say("nothing to share: no experts are equal, and none are near enough to be a family")


def _print_report(report: CondenseReport, target: Console) -> None:
    from rich.table import Table

    from ..checkpoints.adapter_sizes import format_bytes

    names = list(report.cosines)
    table = Table(title="Cosines of stored deltas, from the backbone", title_justify="left", pad_edge=False)
    for heading in ("", *names):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in report.cosines.items():
        table.add_row(name, *(f"{row[other]:.3f}" for other in names))
    target.print(table)
    for name, other in report.aliases.items():
        target.print(f"{name} equals {other}: stored once")
    for experts in report.families.values():
        kept = ", ".join(f"{name} {report.fidelity[name]:.3f}" for name in experts if name in report.fidelity)
        fidelity = f"; cosine with what was stored before: {kept}" if kept else ""
        pairs = [
            report.cosines[name][other]
            for name in experts
            for other in experts
            if name != other and name in report.cosines and other in report.cosines
        ]
        mean = f" (mean cosine {sum(pairs) / len(pairs):.3f})" if pairs else ""
        target.print(f"family of {', '.join(experts)}{mean}{fidelity}")
    if report.bytes_after != report.bytes_before:
        target.print(f"deltas in memory: {format_bytes(report.bytes_before)} -> {format_bytes(report.bytes_after)}")
