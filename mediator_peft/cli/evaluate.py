"""``mediator-peft eval``: score a built model on tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from .evaluate_harness import HarnessTasks, evaluate_harness
from .loading import MODEL_LOADING, PROMPTING, ModelLoading, Prompting, load, load_plain
from .option_groups import takes_groups

if TYPE_CHECKING:
    from ..evaluation.report import EvaluationReport
    from ..evaluation.runner import Scoring, SystemScore
    from ..evaluation.score_store import ScoreStore

_UNFINISHED = ".mediator-eval.scores"
"""Folder in that of a report, with the systems that a stopped run had finished."""


@dataclass(frozen=True)
class TaskFiles:
    """Tasks as files of prompts and answers."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE",
            help="A JSONL file with the columns prompt, answer and, optionally, match; repeatable. A task named like "
            "an expert is that expert's task; any other task is out of distribution.",
            show_default=False,
        ),
    ] = None
    match: Annotated[
        str,
        typer.Option(
            help="How answers are compared where a line does not say: exact, contains, last_number, refuse or comply.",
            callback=check_match,
        ),
    ] = "exact"
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of an answer; by default 1.5 × the longest reference."),
    ] = None

    def read(self) -> dict[str, Any]:
        """Task → its items.

        Raises:
            typer.BadParameter: no such pairs were given.
            MediatorError: a file cannot be read.
        """
        from ..evaluation.prompts import read_task

        files = parse_pairs(self.data or [], "--data")
        return {name: read_task(path, self.match) for name, path in files.items()}


@dataclass(frozen=True)
class Systems:
    """What is measured beside the routed model."""

    only_routed: Annotated[
        bool,
        typer.Option(
            "--only-routed", help="Leave out the comparisons with the averaged backbone and the named expert."
        ),
    ] = False
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
    ] = None

    @property
    def checkpoints(self) -> dict[str, str]:
        """Name → path of a baseline on disk."""
        return parse_pairs([text for text in self.baseline or [] if "=" in text], "--baseline")

    @property
    def published(self) -> list[str]:
        """Baselines that are made from the experts."""
        return [text for text in self.baseline or [] if "=" not in text]


@takes_groups
def evaluate(
    out: OutputFolder,
    files: TaskFiles,
    systems: Systems,
    harness: HarnessTasks,
    report: Annotated[
        Path | None, typer.Option(help="Write results, answers and a figure to this folder.", show_default=False)
    ] = None,
    prompting: Prompting = PROMPTING,
    loading: ModelLoading = MODEL_LOADING,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy of OUT per task, against the averaged backbone and the named experts, and its routing.

    Example:
      mediator-peft eval out --data math=math.test.jsonl --data cron=cron.test.jsonl
      mediator-peft eval out --lm-eval arc_easy,gsm8k --baseline base=BASE
    """
    if (files.data is None) == (harness.lm_eval is None):
        raise typer.BadParameter("give --data for JSONL tasks, or --lm-eval for tasks of lm-evaluation-harness.")
    if report is not None:
        check_folder(report, "--report")
    if harness.lm_eval is not None:
        if systems.published:
            name = systems.published[0]
            raise typer.BadParameter(f"with --lm-eval, give a checkpoint: --baseline {name}=CHECKPOINT.")
        evaluate_harness(out, harness, systems.checkpoints, systems.only_routed, loading, prompting, report, as_json)
        return
    result = _scored(out, files, systems, prompting, loading, report)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _scored(
    out: Path,
    files: TaskFiles,
    systems: Systems,
    prompting: Prompting,
    loading: ModelLoading,
    report: Path | None,
) -> EvaluationReport:
    """Every system's answers to the items, and where their prompts go."""
    from ..evaluation.baselines import PublishedSystems, check_names
    from ..evaluation.comparison import compare, runtime_of
    from ..evaluation.report import EvaluationReport
    from ..evaluation.runner import EvalTask, Scoring, route_tasks
    from ..evaluation.score_store import checkpoint_identity
    from ..progress import bar_progress
    from ..ranks import Ranks

    check_names(systems.published)
    # Read before the model is loaded, so that faults are reported at once.
    items, plain = files.read(), systems.checkpoints
    model, tokenizer = load(out, loading)
    tasks = [
        EvalTask.of_items(name, items[name], model.expert_names, tokenizer, files.max_new_tokens) for name in items
    ]
    result = EvaluationReport(tasks)
    scoring = Scoring(prompting.settings(Ranks()), progress=bar_progress)
    store = None if report is None else _store(report, tasks, out, [loading.dtype, loading.quantize, not prompting.raw])
    # The cheap part first: it fails at once where the router has not been fitted.
    result.routing, routes = route_tasks(model, tokenizer, tasks, scoring)
    for name, path in plain.items():
        depends = checkpoint_identity(path)
        score = bind(_score_plain, name, bind(load_plain, Path(path), loading), tasks, scoring)
        _once(result, store, name, score, depends)
    published = PublishedSystems(model.peft_config[model.active_adapter], lambda path: load_plain(Path(path), loading))
    for text in systems.published:
        _once(result, store, text, bind(published.score, text, tasks, routes, scoring))
        size = published.num_bytes(text)
        if size is not None:
            result.extra.setdefault("baseline_bytes", {})[text] = size
    _score(result, model, tokenizer, systems.only_routed, scoring, store)
    result.extra["comparison"] = compare(result, plain, runtime_of(out))
    if report is not None:
        Ranks().first(bind(_write, result, report, store))
    return result


def _print(result: EvaluationReport) -> None:
    from ..evaluation.comparison import kept_table
    from ..evaluation.report import accuracy_table, loss_table, routing_table

    target = console()
    names = [task.name for task in result.tasks]
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
