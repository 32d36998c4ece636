"""``mediator-peft eval``: score a built model on tasks."""

from __future__ import annotations

from functools import partial as bind
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    MOST_TOKENS,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    OutputFolder,
    Quantize,
    Raw,
    check_folder,
    check_match,
    console,
    load,
    parse_pairs,
    print_json,
    say,
)


def evaluate(
    out: OutputFolder,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="A JSONL file with the columns prompt, answer and, optionally, match; repeatable. A task named like "
            "an expert is that expert's task; any other task is out of distribution.",
            show_default=False,
        ),
    ],
    match: Annotated[
        str, typer.Option(help="How answers are compared where a line does not say: exact, contains or last_number.")
    ] = "exact",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of an answer; by default 1.5 × the longest reference."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write results, answers and a figure to this folder.", show_default=False)
    ] = None,
    only_routed: Annotated[
        bool,
        typer.Option(
            "--only-routed", help="Leave out the comparisons with the averaged backbone and the named expert."
        ),
    ] = False,
    raw: Raw = False,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy of OUT per task, against the averaged backbone and the named experts, and its routing.

    Example:
      mediator-peft eval out --data math=math.test.jsonl --data cron=cron.test.jsonl
    """
    from ..evaluation.prompts import read_task
    from ..evaluation.report import EvaluationReport, accuracy_table, loss_table, routing_table
    from ..evaluation.runner import EvalTask
    from ..ranks import Ranks

    files = parse_pairs(data, "--data")
    check_match(match)
    if report is not None:
        check_folder(report, "--report")
    # Read before the model is loaded, so that faults are reported at once.
    items = {name: read_task(path, match) for name, path in files.items()}
    model, tokenizer = load(out, dtype, device, quantize)
    tasks = [EvalTask.of_items(name, items[name], model.expert_names, tokenizer, max_new_tokens) for name in files]
    result = EvaluationReport(tasks)
    _score(result, model, tokenizer, only_routed, {"batch_size": batch_size, "use_template": not raw})
    if report is not None:
        Ranks().first(bind(_write, result, report))
    if as_json:
        print_json(result.to_dict())
        return
    target = console()
    names = [task.name for task in tasks]
    target.print(accuracy_table(result, names, title="Accuracy"))
    target.print(loss_table(result, names, title="Answer loss"))
    if result.routing is not None:
        target.print(routing_table(result.routing, title="Where prompts were routed"))
        if result.routing.overall is not None:
            target.print(f"routing accuracy: {result.routing.overall:.1%}")


def _score(result: Any, model: Any, tokenizer: Any, only_routed: bool, shared: dict[str, Any]) -> None:
    from ..evaluation.generation import ROUTED, Memo
    from ..evaluation.runner import NAMED, score_routing, score_system
    from ..progress import bar_progress
    from ..ranks import Ranks

    shared = {**shared, "progress": bar_progress, "ranks": Ranks()}
    # The cheap part first: it fails at once where the router has not been fitted.
    result.routing, _ = score_routing(model, tokenizer, result.tasks, **shared)
    scored: dict[str, Any] = {**shared, "memo": Memo.empty()}
    if not only_routed:
        result.systems.append(score_system("averaged backbone", model, tokenizer, result.tasks, **scored))
        known = [task for task in result.tasks if task.expert]
        if known:
            result.systems.append(score_system("expert named", model, tokenizer, known, expert_weights=NAMED, **scored))
    result.systems.append(score_system("routed", model, tokenizer, result.tasks, expert_weights=ROUTED, **scored))


def _write(result: Any, folder: Path) -> None:
    from ..evaluation.report import write_evaluation

    note = write_evaluation(result, folder)
    if note is not None:
        say(f"note: the figure was left out: {note}")
    say(f"written to {folder}")
