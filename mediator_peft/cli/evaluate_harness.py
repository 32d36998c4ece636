"""``mediator-peft eval --lm-eval``: tasks of lm-evaluation-harness on every system of an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import console, print_json, say
from .loading import ModelLoading, Prompting, load, load_plain

_STDERR = "_stderr"


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness."""

    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Run tasks of lm-evaluation-harness, separated by commas, in place of --data.",
            show_default=False,
        ),
    ] = None
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with YAML files of own harness tasks.", show_default=False),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of a harness task.", show_default=False)] = None
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item of a harness task.", show_default=False)
    ] = None

    @property
    def names(self) -> list[str]:
        """The tasks one by one."""
        return [task.strip() for task in (self.lm_eval or "").split(",") if task.strip()]


def evaluate_harness(
    out: Path,
    tasks: HarnessTasks,
    baselines: Mapping[str, str],
    only_routed: bool,
    loading: ModelLoading,
    prompting: Prompting,
    report: Path | None,
    as_json: bool,
) -> None:
    """Run the tasks on baselines, backbone, each expert and the routed model, and print a table.

    Args:
        out: output folder of a build, its router fitted.
        tasks: which, and how much of them.
        baselines: name → checkpoint, measured beside the output.
        only_routed: leave out backbone and named experts.
        loading: how models are loaded; the quantisation is that of the output alone.
        prompting: batch size and template.
        report: folder for ``lm_eval.json``.
        as_json: print JSON in place of the table.
    """
    from ..evaluation.harness import BACKBONE, run_harness, task_manager
    from ..evaluation.report import write_json

    run = partial(
        run_harness,
        manager=task_manager(tasks.names, tasks.include_path),
        tasks=tasks.names,
        batch_size=prompting.batch_size,
        use_template=not prompting.raw,
        limit=tasks.limit,
        num_fewshot=tasks.num_fewshot,
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, path in baselines.items():
        model, tokenizer = load_plain(Path(path), loading)
        found[name] = run(model, tokenizer)
    model, tokenizer = load(out, loading)
    routed: dict[str, str | None] = {"routed": None}
    others = {} if only_routed else {BACKBONE: BACKBONE, **{f"expert {name}": name for name in model.expert_names}}
    # The routed model first: it fails at once where the router has not been fitted.
    for label, expert in {**routed, **others}.items():
        say(f"{label}: {', '.join(tasks.names)}")
        found[label] = run(model, tokenizer, expert=expert)
    if report is not None:
        write_json(found, report / "lm_eval.json")
    if as_json:
        print_json(found)
    else:
        console().print(_table(found))


def _table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = {
        (task, metric): None
        for metrics in found.values()
        for task, values in metrics.items()
        for metric in values
        if not metric.endswith(_STDERR) and _STDERR + "," not in metric
    }
    table = Table(title="lm-evaluation-harness", title_justify="left", pad_edge=False)
    table.add_column("system")
    for task, metric in columns:
        table.add_column(Text(f"{task}\n{metric}"), justify="right", no_wrap=True)
    for system, metrics in found.items():
        cells = []
        for task, metric in columns:
            value = metrics.get(task, {}).get(metric)
            name, _, kind = metric.partition(",")
            error = metrics.get(task, {}).get(f"{name}{_STDERR}" + (f",{kind}" if kind else ""))
            spread = "" if error is None else f" ± {error:.3f}"
            cells.append(Text("–" if value is None else f"{value:.3f}{spread}"))
        table.add_row(Text(system), *cells)
    return table
