"""``mediator-peft calibrate``: fit the router of a built model on prompts of each expert."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bank.adapter_file import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_raw_config
from .common import AsJson, BatchSize, Device, Dtype, OutputFolder, Raw, console, load, parse_pairs, print_json, say

if TYPE_CHECKING:
    from ..evaluation.prompts import TaskItem


def calibrate(
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
      mediator-peft calibrate out --data math=math.jsonl --data cron=cron.jsonl --answered others.jsonl
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


def fit_and_save(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    adapter: Path,
    use_template: bool = True,
    batch_size: int = 16,
    answered: Sequence[TaskItem] = (),
) -> dict[str, Any]:
    """Fit a model's router on prompts rendered as in use, and put it into the adapter file it was loaded from.

    What held-out prompts say of it goes to ``report/routing.json``, with CSV files and a figure.

    Args:
        model: as ``load_mediator`` gives it.
        tokenizer: of its backbone.
        prompts: expert → what users would write.
        adapter: the adapter's folder.
        use_template: whether prompts are rendered with the tokenizer's chat template, where it has one.
        batch_size: prompts at once.
        answered: other prompts, with answers. The router is first fitted without them, then again with those that the
            nearest expert answers right and the fallback does not among its prompts, and those of which the opposite
            is true among the ordinary ones.

    Returns:
        What ``routing.json`` holds: the calibration report as plain data, and how well ordinary prompts are told apart.
    """
    from ..build.ranks import Ranks
    from ..evaluation.outcomes import judge_outcomes
    from ..evaluation.prompts import render
    from ..evaluation.routing_report import write_routing_report
    from ..progress import bar_progress
    from ..tuner.fitting import our_background

    # A template writes the special tokens itself; they must not come twice.
    some = next((text for texts in prompts.values() for text in texts), "")
    encode = partial(tokenizer, add_special_tokens=render(tokenizer, some, use_template).add_special_tokens)

    def fit(prompts: Mapping[str, Sequence[str]], background: Sequence[str] | None) -> Any:
        texts = {name: [render(tokenizer, text, use_template).text for text in some] for name, some in prompts.items()}
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress": True, "over_ranks": True}
        return model.fit_router(texts, encode, background=background, **options)

    report, outcomes = fit(prompts, None), None
    if answered:
        with bar_progress("answering prompts", 2 * len(answered)) as advance:
            shared: dict[str, Any] = {"use_template": use_template, "batch_size": batch_size, "ranks": Ranks()}
            outcomes = judge_outcomes(model, tokenizer, answered, advance=advance, **shared)
        more = {name: [*texts, *outcomes.experts[name]] for name, texts in prompts.items()}
        report = fit(more, [*our_background(encode), *outcomes.ordinary])

    def save() -> dict[str, Any]:
        save_router(model, adapter)
        return write_routing_report(adapter / "report", report, model.router.evidence, outcomes)

    return Ranks().first(save)


def save_router(model: Any, adapter: Path) -> None:
    """Put a model's router into the adapter folder it was loaded from; card, report and checksums there stay."""
    fresh = adapter.with_name(f".{adapter.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(str(fresh))
        # Where the backbone lies was true for the folder; it need not be for the temporary one.
        settings = read_raw_config(fresh)
        settings["base_model_name_or_path"] = read_raw_config(adapter).get("base_model_name_or_path")
        (fresh / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copymode(adapter / name, fresh / name)
            os.replace(fresh / name, adapter / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
