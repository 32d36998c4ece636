"""``mediator-peft fit-router``: fit the router of a built model on prompts of each expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoints.adapter_files import find_adapter
from .common import AsJson, BatchSize, Device, Dtype, OutputFolder, Raw, console, load, parse_pairs, print_json, say

if TYPE_CHECKING:
    pass


def fit_router(
    out: OutputFolder,
    data: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="An expert's JSONL file of prompts; once each.", show_default=False),
    ],
    text_column: Annotated[str, typer.Option(help="Which field of a line holds the prompt.")] = "prompt",
    answered: Annotated[
        Path | None,
        typer.Option(help="A JSONL file of other prompts with answers, of any kind: who answers them right gets them."),
    ] = None,
    match: Annotated[
        str, typer.Option(help="When an answer to those is right: exact, contains or last_number; a line may say it.")
    ] = "exact",
    raw: Raw = False,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit the router of OUT on prompts of each expert, 50 or more of each, and save it there.

    Prompts near to an expert's task that it spoils are recognised by the answers in --answered alone.

    Example:
      mediator-peft fit-router out --data math=math.jsonl --data cron=cron.jsonl --answered others.jsonl
    """
    report = calibrated(
        out,
        data=parse_pairs(data, "--data"),
        text_column=text_column,
        answered=None if answered is None else str(answered),
        match=match,
        raw=raw,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    if as_json:
        print_json(report)
        return
    from rich.table import Table

    table = Table(title="Held-out calibration prompts", title_justify="left", pad_edge=False)
    names = list(report["num_texts"])
    table.add_column("prompts of")
    for name in names:
        table.add_column(f"best: {name}", justify="right")
    for name, row in zip(names, report["confusion"], strict=True):
        table.add_row(name, *map(str, row))
    console().print(table)
    say(f"router fitted and saved; {report['accuracy']:.1%} of held-out prompts went to their expert")
    say(f"flagged as unknown: {report['false_fallback']:.1%} of them; calibration error {report['ece']:.3f}")
    if report["auroc"] is not None:
        at_95 = f"{report['fpr_at_95']:.1%} of known prompts flagged where 95 % of the ordinary ones are"
        say(f"against ordinary prompts: AUROC {report['auroc']:.3f}; {at_95}")
    if "outcomes" in report:
        say(outcomes_line(report["outcomes"]))
    say(f"figures and data: {find_adapter(out) / 'report'}")
    say(f"next: mediator-peft generate {out} 'your prompt'")


def calibrated(
    out: Path,
    *,
    data: Mapping[str, str],
    text_column: str,
    answered: str | None,
    match: str,
    raw: bool,
    batch_size: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Read prompts, fit the router of ``out`` on them and save it there; see :func:`fit_and_save`."""
    from ..evaluation.fit_and_save import fit_and_save
    from ..evaluation.prompts import read_prompts, read_task

    prompts = {name: read_prompts(Path(path), text_column) for name, path in data.items()}
    items = [] if answered is None else read_task(answered, match, text_column)
    model, tokenizer = load(out, dtype, device)
    return fit_and_save(
        model, tokenizer, prompts, find_adapter(out), use_template=not raw, batch_size=batch_size, answered=items
    )


def outcomes_line(outcomes: Mapping[str, Any]) -> str:
    """What became of the prompts with answers, in one line."""
    experts = ", ".join(f"{count} to {name}" for name, count in outcomes["experts"].items())
    return f"by their answers: {experts}, {outcomes['ordinary']} to the fallback, {outcomes['undecided']} undecided"
