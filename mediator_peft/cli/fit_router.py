"""``mediator-peft fit-router``: fit the router of a built model on prompts of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints.adapter_files import find_adapter, read_raw_config
from ..errors import RoutingError
from ..routing.calibration_data import content_hash
from ..tables import unknown_name
from .common import (
    AsJson,
    OutputFolder,
    check_match,
    console,
    parse_pairs,
    print_json,
    say,
)
from .loading import MODEL_LOADING, PROMPTING, ModelLoading, Prompting, load
from .option_groups import takes_groups


@dataclass(frozen=True)
class RouterPrompts:
    """What a router is fitted on."""

    data: dict[str, str] = field(default_factory=dict)
    """Expert name → file of prompts."""

    text_column: str = "prompt"
    answered: str | None = None
    """File of other prompts, with answers."""

    match: str = "exact"
    background: str | None = None
    """File of prompts that belong to no expert."""


@takes_groups
def fit_router(
    out: OutputFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="JSONL file of prompts of an expert; repeatable.", show_default=False),
    ] = None,
    from_deltas: Annotated[
        bool, typer.Option("--from-deltas", help="Make a router from the experts' deltas, without prompts of theirs.")
    ] = False,
    text_column: Annotated[str, typer.Option(help="Column that holds the prompt.")] = "prompt",
    answered: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of further prompts with answers: each is assigned to the expert that answers correctly."
        ),
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            help="How these answers are compared where a line does not say: exact, contains or last_number.",
            callback=check_match,
        ),
    ] = "exact",
    background: Annotated[
        Path | None,
        typer.Option(help="A JSONL or text file of prompts that belong to no expert, added to the library's families."),
    ] = None,
    prompting: Prompting = PROMPTING,
    loading: ModelLoading = MODEL_LOADING,
    as_json: AsJson = False,
) -> None:
    """Fit the router of OUT on prompts of each expert, preferably 50 or more, and save it in OUT.

    Near-OOD prompts that an expert answers worse than the base are found with --answered only. Without prompts,
    --from-deltas makes a router that is a start: it routes fewer wordings to their expert. A later fit on prompts takes
    its place. A model that will be loaded with --quantize nf4 and has no correction for it is fitted with it as well.

    Example:
      mediator-peft fit-router out --data math=math.jsonl --data cron=cron.jsonl --answered others.jsonl
      mediator-peft fit-router out --from-deltas
    """
    if not (from_deltas or data):
        raise typer.BadParameter("give prompts of each expert, or --from-deltas.", param_hint="--data")
    others = None if background is None else str(background)
    if from_deltas:
        report = made_from_deltas(out, prompting, loading, others)
        if as_json:
            print_json(report)
        else:
            say_made(out, report)
        return
    files = None if answered is None else str(answered)
    prompts = RouterPrompts(parse_pairs(data or [], "--data"), text_column, files, match, others)
    report = calibrated(out, prompts, prompting, loading)
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
    say(f"router fitted and saved; {report['accuracy']:.1%} of held-out prompts are routed to their expert")
    say(f"flagged as OOD: {report['false_fallback']:.1%} of them; calibration error {report['ece']:.3f}")
    say(f"prompts are read after {report['router_layer']} blocks")
    say(f"in-distribution prompts give {report['known_to_fallback']:.1%} of their weight to the fallback")
    if report["unknown_to_expert"] is not None:
        family, share = min(report["base_weight_by_family"].items(), key=lambda item: item[1])
        say(f"OOD prompts give {report['unknown_to_expert']:.1%} to experts, each routed by a fit without its family")
        say(f"the fallback gets least of {family}: {share:.0%}")
    if report["auroc"] is not None:
        at_95 = f"{report['fpr_at_95']:.1%} of in-distribution prompts flagged where 95 % of background prompts are"
        say(f"against background prompts: AUROC {report['auroc']:.3f}; {at_95}")
    if "outcomes" in report:
        say(outcomes_line(report["outcomes"]))
    say(f"figures and data: {find_adapter(out) / 'report'}")
    say(f"next: mediator-peft generate {out} 'your prompt'")


def made_from_deltas(
    out: Path,
    prompting: Prompting = PROMPTING,
    loading: ModelLoading = MODEL_LOADING,
    background: str | None = None,
) -> dict[str, Any]:
    """Make the router of ``out`` from its deltas and save it there; see :func:`make_and_save`."""
    from ..evaluation.fit_and_save import make_and_save

    model, tokenizer = load(out, loading)
    return make_and_save(model, tokenizer, find_adapter(out), prompting.settings(), background)


def say_made(out: Path, report: Mapping[str, Any]) -> None:
    """What :func:`made_from_deltas` has done, and what is not known of it."""
    say("router made from the experts' deltas and saved; no prompts of theirs were used")
    say(f"prompts are read after {report['router_layer']} blocks")
    family, share = min(report["base_weight_by_family"].items(), key=lambda item: item[1])
    say(f"OOD prompts give {report['unknown_to_expert']:.1%} to experts, each judged without its kind of prompts")
    say(f"the fallback gets least of {family}: {share:.0%}")
    say("how many in-distribution prompts go to the fallback is not known without prompts of the experts")
    say(f"a router fitted on prompts is better: mediator-peft fit-router {out} --data NAME=FILE ...")
    say(f"next: mediator-peft generate {out} 'your prompt'")


def calibrated(
    out: Path,
    prompts: RouterPrompts,
    prompting: Prompting,
    loading: ModelLoading,
) -> dict[str, Any]:
    """Read prompts, fit the router of ``out`` on them and save it there; see :func:`fit_and_save`."""
    from ..evaluation.fit_and_save import fit_and_save
    from ..evaluation.prompts import read_prompts, read_task

    texts = {name: read_prompts(Path(path), prompts.text_column) for name, path in prompts.data.items()}
    items = [] if prompts.answered is None else read_task(prompts.answered, prompts.match, prompts.text_column)
    check_prompts(texts, saved_experts(out))
    model, tokenizer = load(out, loading)
    return fit_and_save(
        model, tokenizer, texts, find_adapter(out), prompting.settings(), answered=items, background=prompts.background
    )


def saved_experts(out: Path) -> list[str] | None:
    """Names of the experts of an output folder; None where it is no folder, or does not say."""
    if not out.expanduser().is_dir():
        return None
    names = read_raw_config(find_adapter(out.expanduser())).get("expert_names")
    return list(map(str, names)) if isinstance(names, list) else None


def check_prompts(prompts: Mapping[str, Sequence[str]], experts: Sequence[str] | None) -> None:
    """Refuse, before a model is loaded, prompts that no router can be fitted on.

    Args:
        prompts: expert → prompts.
        experts: names of the experts; None where they are not known yet.

    Raises:
        RoutingError: prompts of an expert are missing or too few, or belong to no expert; all faults are listed.
    """
    faults = [unknown_name(name, experts, "expert") for name in prompts if experts is not None and name not in experts]
    for name in prompts if experts is None else experts:
        if name not in prompts:
            faults.append(f"expert {name!r} has no prompts: give --data {name}=FILE")
        elif len({content_hash(text) for text in prompts[name]}) < 2:
            faults.append(f"expert {name!r} needs at least 2 different prompts, better 50")
    if faults:
        raise RoutingError("\n".join(faults))


def outcomes_line(outcomes: Mapping[str, Any]) -> str:
    """How prompts with answers were assigned, in one line."""
    experts = ", ".join(f"{count} to {name}" for name, count in outcomes["experts"].items())
    return f"assigned by answers: {experts}, {outcomes['ordinary']} to the fallback, {outcomes['undecided']} undecided"
