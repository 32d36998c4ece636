"""``mediator-peft bench``: how fast a model runs here beside its plain backbone, and what it holds in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    MOST_ROUNDS,
    MOST_ROWS,
    MOST_TOKENS,
    AsJson,
    check_file,
    console,
    print_json,
    usable_cpus,
)
from .loading import LOADING, Loading, load
from .option_groups import takes_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from ..evaluation.cache_planning import CachePlan
    from ..evaluation.speed import SpeedReport


@takes_groups
def bench(
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Output folder of `build`.", show_default=False)
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option(
            help="Time nothing; read the experts of past requests from this JSONL file (expert_weights, experts or "
            "expert a line) and print hit rates of every max_resident_experts. OUT adds their bytes.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a prompt.")] = 512,
    context: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens in the cache of a decode step.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Rows in a batched decode step.")] = 8,
    num_experts: Annotated[
        int, typer.Option("--experts", min=1, max=MOST_ROWS, help="Largest number of experts in a mixed batch.")
    ] = 4,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_ROUNDS,
            help="Timed repetitions of a prefill per configuration; decoding has six times as many.",
        ),
    ] = 7,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads; 0 takes torch's choice, but no more than the process may use.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg or .pdf).", show_default=False)
    ] = None,
    loading: Loading = LOADING,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decode of OUT against its plain backbone: one expert, mixed batches, switching, routing, memory.

    Configurations are timed alternately; medians over the rounds are reported. Stop other work on the machine first.

    Example:
      mediator-peft bench out --threads 2 --plot speed.png

      mediator-peft bench out --routes routes.jsonl
    """
    if routes is not None:
        _plan_cache(routes, out, as_json)
        return
    if out is None:
        raise typer.BadParameter("give the output folder of a build, or --routes.", param_hint="OUT")
    import torch

    from ..evaluation.speed import SpeedSettings, measure_speed, num_rounds
    from ..evaluation.speed_plot import check_plot, draw_speed
    from ..progress import bar_progress

    if plot is not None:
        check_plot(plot)
        check_file(plot, "--plot")
    # More threads than processors wait for each other, for minutes at each step.
    if threads > usable_cpus():
        raise typer.BadParameter(f"this process may use {usable_cpus()} CPUs, not {threads}.", param_hint="--threads")
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))
    settings = SpeedSettings(prompt_tokens, context, batch_size, num_experts, rounds)
    model, _ = load(out, loading)
    with bar_progress("timing", num_rounds(settings)) as advance:
        report = measure_speed(model, settings, advance)
    if plot is not None:
        draw_speed(report, plot)
    if as_json:
        print_json(report.to_dict())
    else:
        print_speed(report, console())


def _plan_cache(routes: Path, out: Path | None, as_json: bool) -> None:
    """Hit rates of every cache size, by a log of routes."""
    from ..checkpoints.adapter_sizes import read_adapter_info
    from ..evaluation.cache_planning import plan_cache, read_routes, stored_requests

    requests, info = read_routes(routes), None if out is None else read_adapter_info(out)
    if info is not None:
        requests = stored_requests(requests, info.config.get("column_map"), info.columns)
    plan = plan_cache(requests, None if info is None else info.memory_bytes)
    if as_json:
        print_json(plan.to_dict())
    else:
        print_cache_plan(plan, console(), None if info is None else info.config.get("column_map"))


def print_cache_plan(plan: CachePlan, target: Console, rows: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """The hit rates as a table; ``rows`` is the bank's column map, which says who shares what."""
    from rich.table import Table

    from ..bank.column_map import families
    from ..checkpoints.adapter_sizes import format_bytes

    labels = {name: f"what {' and '.join(users)} share" for name, users in families(rows or {}).items()}
    used = ", ".join(f"{labels.get(name, name)} {number}" for name, number in plan.experts.items())
    target.print(f"{plan.num_requests} requests; how many used each delta: {used}")
    table = Table(title="Share of accesses that find their delta in memory", title_justify="left", pad_edge=False)
    headings = ("deltas held", "last used", "some pinned", "16 known ahead", "optimal", "loads a request", "memory")
    for heading in headings:
        table.add_column(heading, justify="right")
    for size in plan.sizes:
        rates = (f"{rate:.1%}" for rate in (size.lru, size.lookahead, size.optimal))
        pinned = f"{len(size.pinned)}: {size.with_pinned:.1%}" if size.pinned else "–"
        used, *ahead = rates
        table.add_row(
            str(size.experts), used, pinned, *ahead, f"{size.loads_a_request:.3f}", format_bytes(size.memory_bytes)
        )
    target.print(table)
    if plan.persistence:
        said = ", ".join(f"{value:.2f} over {window}" for window, value in plan.persistence.items())
        target.print(f"routing persistence (SRP) {said} requests; 1 means that neighbours use the same experts")
    target.print(f"recommended: max_resident_experts={plan.recommended}")
    best = plan.sizes[plan.recommended - 1]
    names = [name for name in best.pinned if name not in labels]
    if names and len(names) == len(best.pinned):
        target.print(f"with pinned_experts={names} as well: {best.with_pinned:.1%} in place of {best.lru:.1%}")


def print_speed(report: SpeedReport, target: Console) -> None:
    """The measurements as tables."""
    from rich.table import Table
    from rich.text import Text

    from ..checkpoints.adapter_sizes import format_bytes

    settings = report.settings
    target.print(
        f"{report.num_parameters:,} parameters in {report.dtype}, {report.threads} threads, experts "
        f"{', '.join(report.experts)}; prompts of {settings.prompt_tokens} tokens, {settings.context} in the cache; "
        f"medians of {settings.rounds} rounds in turn",
    )
    table = Table(pad_edge=False)
    for heading in ("work", "rows", "model", "ms", "tokens/s", "of the backbone"):
        table.add_column(heading, justify="left" if heading in ("work", "model") else "right")
    for pace in report.paces:
        numbers = f"{1e3 * pace.seconds:.1f}", f"{pace.tokens_per_second:.1f}", f"{pace.ratio:.2f}"
        table.add_row(pace.work, str(pace.batch_size), pace.name, *numbers)
    target.print(table)
    lines = [
        ("changing the merged expert", f"{1e3 * report.switch_seconds:.1f} ms, {report.switch_steps:.1f} decode steps")
    ]
    if report.routing_seconds is None or report.routing_share is None:
        lines.append(("routing a prompt", "not measured: the router is not fitted"))
    else:
        share = f"{report.routing_share:.0%} of its prefill"
        lines.append(("routing a prompt", f"{1e3 * report.routing_seconds:.1f} ms before its first token, {share}"))
    lines += [(f"memory: {part}", format_bytes(size)) for part, size in report.memory.items()]
    facts = Table.grid(padding=(0, 2))
    for label, value in lines:
        facts.add_row(Text(label, style="dim"), value)
    target.print(facts)
