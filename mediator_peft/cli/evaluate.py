"""``mediator-peft eval``: score a built model on tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    MOST_TOKENS,
    AsJson,
    OutputFolder,
    check_folder,
    check_match,
    console,
    parse_pairs,
    print_json,
    say,
)
from .loading import LOADING, PROMPTING, Loading, Prompting, Quantize, load, load_plain
from .option_groups import takes_groups

if TYPE_CHECKING:
    from ..evaluation.runner import Scoring, SystemScore
    from ..evaluation.score_store import ScoreStore

_UNFINISHED = ".mediator-eval.scores"
"""Folder in that of a report, with the systems that a stopped run had finished."""


@takes_groups
def evaluate(
    out: OutputFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE",
            help="A JSONL file with the columns prompt, answer and, optionally, match; repeatable. A task named like "
            "an expert is that expert's task; any other task is out of distribution.",
            show_default=False,
        ),
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            help="How answers are compared where a line does not say: exact, contains, last_number, refuse or comply.",
            callback=check_match,
        ),
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
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CHECKPOINT|NAME[@ROUTE]",
            help="Another model that answers the same items; repeatable. One named like a task is what that task's "
            "share kept is measured by; one named base is what forgetting is measured by. Without CHECKPOINT: a merge "
            "method, or experts, emr, tall, bitdelta, delta-come, t-switch or twin, made from the experts that OUT "
            "was built from; ROUTE chooses the expert: named (default), router (of OUT) or random.",
            show_default=False,
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Run tasks of lm-evaluation-harness, separated by commas, in place of --data.",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with YAML files of own harness tasks.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of a harness task.", show_default=False)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item of a harness task.", show_default=False)
    ] = None,
    prompting: Prompting = PROMPTING,
    loading: Loading = LOADING,
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy of OUT per task, against the averaged backbone and the named experts, and its routing.

    Example:
      mediator-peft eval out --data math=math.test.jsonl --data cron=cron.test.jsonl
      mediator-peft eval out --lm-eval arc_easy,gsm8k --baseline base=BASE
    """
    if (data is None) == (lm_eval is None):
        raise typer.BadParameter("give --data for JSONL tasks, or --lm-eval for tasks of lm-evaluation-harness.")
    plain = parse_pairs([text for text in baseline or [] if "=" in text], "--baseline")
    by_name = [text for text in baseline or [] if "=" not in text]
    if lm_eval is not None:
        if by_name:
            raise typer.BadParameter(f"with --lm-eval, give a checkpoint: --baseline {by_name[0]}=CHECKPOINT.")
        from .evaluate_harness import evaluate_harness

        options = {"limit": limit, "num_fewshot": num_fewshot}
        options |= {"batch_size": prompting.batch_size, "use_template": not prompting.raw}
        how = (loading, quantize)
        evaluate_harness(out, lm_eval.split(","), include_path, plain, how, only_routed, report, as_json, options)
        return
    from ..evaluation.baselines import PublishedSystems, check_names
    from ..evaluation.comparison import compare, kept_table, runtime_of
    from ..evaluation.prompts import read_task
    from ..evaluation.report import EvaluationReport, accuracy_table, loss_table, routing_table
    from ..evaluation.runner import EvalTask, Scoring, route_tasks
    from ..evaluation.score_store import checkpoint_identity
    from ..progress import bar_progress
    from ..ranks import Ranks

    files = parse_pairs(data or [], "--data")
    check_names(by_name)
    if report is not None:
        check_folder(report, "--report")
    # Read before the model is loaded, so that faults are reported at once.
    items = {name: read_task(path, match) for name, path in files.items()}
    model, tokenizer = load(out, loading, quantize)
    tasks = [EvalTask.of_items(name, items[name], model.expert_names, tokenizer, max_new_tokens) for name in files]
    result = EvaluationReport(tasks)
    scoring = Scoring(prompting.settings(Ranks()), progress=bar_progress)
    store = None if report is None else _store(report, tasks, out, [loading.dtype, quantize, not prompting.raw])
    # The cheap part first: it fails at once where the router has not been fitted.
    result.routing, routes = route_tasks(model, tokenizer, tasks, scoring)
    for name, path in plain.items():
        depends = checkpoint_identity(path)
        score = bind(_score_plain, name, bind(load_plain, Path(path), loading), tasks, scoring)
        _once(result, store, name, score, depends)
    published = PublishedSystems(model.peft_config[model.active_adapter], lambda path: load_plain(Path(path), loading))
    for text in by_name:
        _once(result, store, text, bind(published.score, text, tasks, routes, scoring))
        size = published.num_bytes(text)
        if size is not None:
            result.extra.setdefault("baseline_bytes", {})[text] = size
    _score(result, model, tokenizer, only_routed, scoring, store)
    result.extra["comparison"] = compare(result, plain, runtime_of(out))
    if report is not None:
        Ranks().first(bind(_write, result, report, store))
    if as_json:
        print_json(result.to_dict())
        return
    target = console()
    names = [task.name for task in tasks]
    target.print(accuracy_table(result, names, title="Accuracy"))
    target.print(loss_table(result, names, title="Answer loss"))
    if (kept := kept_table(result.extra["comparison"])) is not None:
        target.print(kept)
    if result.routing is not None:
        target.print(routing_table(result.routing, title="Where prompts were routed"))
        if result.routing.overall is not None:
            target.print(f"routing accuracy: {result.routing.overall:.1%}")


def _store(report: Path, tasks: Any, out: Path, settings: list[Any]) -> ScoreStore:
    """Where finished systems are kept until the report is written, so that a stopped run goes on."""
    from ..evaluation.score_store import ScoreStore, checkpoint_identity

    asked = [[task.name, task.expert, task.max_new_tokens, [list(item) for item in task.items]] for task in tasks]
    return ScoreStore(report / _UNFINISHED, [asked, settings, checkpoint_identity(out)])


def _once(
    result: Any, store: ScoreStore | None, name: str, score: Callable[[], SystemScore], depends: Any = ""
) -> None:
    """Add a system's scores to the report: those of a run that was stopped, or new ones."""
    from ..ranks import Ranks

    found = None if store is None else Ranks().first(lambda: store.find(name, depends))
    if found is None:
        found = score()
        if store is not None:
            Ranks().first(bind(store.keep, found, depends))
    result.systems.append(found)


def _score_plain(name: str, load_model: Callable[[], tuple[Any, Any]], tasks: Any, scoring: Scoring) -> SystemScore:
    from ..evaluation.runner import score_tasks

    model, tokenizer = load_model()
    return score_tasks(name, model, tokenizer, tasks, scoring)


def _score(
    result: Any, model: Any, tokenizer: Any, only_routed: bool, scoring: Scoring, store: ScoreStore | None
) -> None:
    from ..evaluation.generation import ROUTED, Memo
    from ..evaluation.runner import NAMED, score_tasks

    memo = Memo.empty()
    known = [task for task in result.tasks if task.expert]
    systems: list[tuple[str, Any, Any]] = [("routed", ROUTED, result.tasks)]
    if not only_routed:
        named = [("expert named", NAMED, known)] if known else []
        systems = [("averaged backbone", None, result.tasks), *named, *systems]
    for name, choice, tasks in systems:
        _once(result, store, name, bind(score_tasks, name, model, tokenizer, tasks, scoring, choice, memo))


def _write(result: Any, folder: Path, store: ScoreStore | None) -> None:
    from ..evaluation.comparison import markdown_report
    from ..evaluation.report import write_evaluation

    note = write_evaluation(result, folder, {"results.md": markdown_report(result)})
    if note is not None:
        say(f"note: the figure was left out: {note}")
    if store is not None:
        store.clear()
    say(f"written to {folder}")
