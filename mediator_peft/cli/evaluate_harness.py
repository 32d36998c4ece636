"""``mediator-peft eval --lm-eval``: tasks of lm-evaluation-harness on every system of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import check_folder, console, print_json, say
from .loading import Loading, load, load_plain

_STDERR = "_stderr"


def evaluate_harness(
    out: Path,
    tasks: Sequence[str],
    include_path: Path | None,
    baselines: Mapping[str, str],
    how: tuple[Loading, str | None],
    only_routed: bool,
    report: Path | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Run the tasks on baselines, backbone, each expert and the routed model, and print a table.

    Args:
        out: output folder of a build, its router fitted.
        tasks: names of harness tasks.
        include_path: folder of own tasks.
        baselines: name → checkpoint, measured beside the output.
        how: models are loaded; quantisation of the output.
        only_routed: leave out backbone and named experts.
        report: folder for ``lm_eval.json``.
        as_json: print JSON in place of the table.
        options: for ``run_harness``.
    """
    from ..evaluation.harness import BACKBONE, run_harness, task_manager
    from ..evaluation.report import write_json

    if report is not None:
        check_folder(report, "--report")
    names = [task.strip() for task in tasks if task.strip()]
    manager = task_manager(names, include_path)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, path in baselines.items():
        found[name] = run_harness(*load_plain(Path(path), how[0]), manager, names, **options)
    model, tokenizer = load(out, *how)
    routed: dict[str, str | None] = {"routed": None}
    others = {} if only_routed else {BACKBONE: BACKBONE, **{f"expert {name}": name for name in model.expert_names}}
    # The routed model first: it fails at once where the router has not been fitted.
    for label, expert in {**routed, **others}.items():
        say(f"{label}: {', '.join(names)}")
        found[label] = run_harness(model, tokenizer, manager, names, expert=expert, **options)
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
