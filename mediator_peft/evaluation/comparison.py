"""Systems compared on the same items: shares kept, paired tests, and the three views of MergeBench."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.adapter_files import find_adapter
from .report import EvaluationReport, share
from .runner import SystemScore, TaskScore
from .statistics import Estimate, Kept, bootstrap_kept, bootstrap_mean, permutation_test, sign_test

if TYPE_CHECKING:
    from rich.table import Table

_NAMED, _EXPERTS, _BASE = "expert named", "experts", "base"
_SEED = 0


def compare(
    report: EvaluationReport, baselines: Iterable[str] = (), runtime: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What every system keeps of the experts, what it forgets, and paired tests against the last system.

    The views are those of MergeBench (arXiv 2505.10833, §4): *normalised* is the accuracy over the expert's, averaged;
    *forgetting* the accuracy over the base's on tasks without an expert; *runtime* what making the model took.

    Args:
        report: all systems scored.
        baselines: names of plain checkpoints among them. One with the name of a task is that task's reference; for
            other tasks the system "experts" is, or else "expert named". One named ``base`` is what forgetting is
            measured by.
        runtime: label → seconds or bytes.

    Returns:
        Plain data: ``reference`` (task → system), ``kept``, ``forgetting`` (task → system → share of the base's),
        ``tests`` (system → task → p-values against the last system) and ``runtime``.
    """
    names = [system.name for system in report.systems]
    # A checkpoint may have that name as well.
    whole = next((name for name in (_EXPERTS, _NAMED) if name in names and name not in set(baselines)), None)
    chosen = {task: task if task in set(baselines) else whole for task in report.known_tasks}
    reference = {task: name for task, name in chosen.items() if name is not None}
    return {
        "reference": reference,
        "kept": {system.name: _kept(report, system, reference) for system in report.systems},
        "forgetting": _forgetting(report),
        "tests": {system.name: _tests(system, report.systems[-1]) for system in report.systems[:-1]},
        "runtime": dict(runtime or {}),
    }


def right_of(score: TaskScore) -> list[bool]:
    """Right or wrong, item by item."""
    return [item.is_right for item in score.items]


def _kept(report: EvaluationReport, system: SystemScore, reference: Mapping[str, str]) -> dict[str, Any] | None:
    """Over all known tasks, or None where the system did not answer all of them or a reference has nothing right."""
    if not reference or not set(reference) <= set(system.tasks):
        return None
    ours = {task: right_of(system.tasks[task]) for task in reference}
    theirs = {task: right_of(report.system(name).tasks[task]) for task, name in reference.items()}
    kept = bootstrap_kept(ours, theirs, seed=_SEED)
    return None if kept is None else kept_as_dict(kept)


def kept_as_dict(kept: Kept) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return {
        "mean": kept.mean._asdict(),
        "worst": kept.worst._asdict(),
        "worst_task": kept.worst_task,
        "by_task": {task: estimate._asdict() for task, estimate in kept.by_task.items()},
    }


def _forgetting(report: EvaluationReport) -> dict[str, dict[str, float]]:
    base = next((system for system in report.systems if system.name == _BASE), None)
    found: dict[str, dict[str, float]] = {}
    for task in report.unknown_tasks if base is not None else ():
        before = base.tasks[task].accuracy if base is not None and task in base.tasks else 0.0
        if before:
            found[task] = {
                system.name: system.tasks[task].accuracy / before for system in report.systems if task in system.tasks
            }
    return found


def _tests(system: SystemScore, last: SystemScore) -> dict[str, dict[str, float]]:
    found = {}
    for task in sorted(set(system.tasks) & set(last.tasks)):
        ours, theirs = system.tasks[task], last.tasks[task]
        if len(ours.items) != len(theirs.items):
            continue
        found[task] = {"sign_test_p": sign_test(right_of(ours), right_of(theirs))}
        first, second = _losses(ours), _losses(theirs)
        if first and len(first) == len(second):
            found[task]["loss_difference"] = bootstrap_mean([b - a for a, b in zip(first, second, strict=True)]).value
            found[task]["permutation_p"] = permutation_test(first, second, seed=_SEED)
    return found


def _losses(score: TaskScore) -> list[float]:
    return [item.loss for item in score.items if item.loss is not None]


def runtime_of(output: Path) -> dict[str, float]:
    """Seconds and memory of the build, as its report in the output folder says; empty where there is none."""
    try:
        report = json.loads((find_adapter(output) / "report" / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    wanted = {"seconds": "build seconds", "peak_memory_bytes": "build peak memory bytes"}
    return {label: float(report[key]) for key, label in wanted.items() if isinstance(report.get(key), (int, float))}


def kept_table(comparison: Mapping[str, Any]) -> Table | None:
    """Shares kept with their intervals; None where no system has any."""
    from rich.table import Table
    from rich.text import Text

    rows = {name: kept for name, kept in comparison["kept"].items() if kept is not None}
    if not rows:
        return None
    table = Table(title="Share of the experts' accuracy that is kept", title_justify="left", caption_justify="left")
    table.pad_edge = False
    table.caption = "95 % bootstrap intervals over items, the same items for system and expert"
    for name, justify in (("system", "left"), ("mean", "right"), ("worst task", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, kept in rows.items():
        worst = f"{with_interval(Estimate(**kept['worst']))} {kept['worst_task']}"
        table.add_row(Text(name), with_interval(Estimate(**kept["mean"])), Text(worst))
    return table


def with_interval(estimate: Estimate) -> str:
    """``.94 (.90–.98)``."""
    return f"{share(estimate.value)} ({share(estimate.low)}–{share(estimate.high)})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def markdown_report(report: EvaluationReport) -> str:
    """Accuracies, losses, shares kept, forgetting, paired tests and runtime as Markdown."""
    tasks = [task.name for task in report.tasks]
    comparison = report.extra["comparison"]
    parts = ["# Evaluation\n", "Share of right answers, 95 % Wilson interval.\n"]
    parts.append(markdown_table(["system", *tasks], (_row(system, tasks, _accuracy) for system in report.systems)))
    parts.append("Loss of the reference answers, nats a token.\n")
    parts.append(markdown_table(["system", *tasks], (_row(system, tasks, _loss) for system in report.systems)))
    kept = {name: entry for name, entry in comparison["kept"].items() if entry is not None}
    if kept:
        parts.append("Share of the experts' accuracy that is kept (MergeBench: normalised), 95 % bootstrap interval.\n")
        rows = [
            [
                name,
                with_interval(Estimate(**entry["mean"])),
                with_interval(Estimate(**entry["worst"])),
                entry["worst_task"],
            ]
            for name, entry in kept.items()
        ]
        parts.append(markdown_table(["system", "mean", "worst", "worst task"], rows))
    if comparison["forgetting"]:
        parts.append("Share of the base's accuracy on tasks without an expert (MergeBench: forgetting).\n")
        rows = [
            [task, name, share(value)]
            for task, some in comparison["forgetting"].items()
            for name, value in some.items()
        ]
        parts.append(markdown_table(["task", "system", "kept"], rows))
    tests = [
        [name, task, f"{p['sign_test_p']:.3f}", f"{p['permutation_p']:.4f}" if "permutation_p" in p else "–"]
        for name, some in comparison["tests"].items()
        for task, p in some.items()
    ]
    if tests:
        last = report.systems[-1].name
        parts.append(f"p-values of paired tests against {last!r}: sign test of answers, permutation test of losses.\n")
        parts.append(markdown_table(["system", "task", "answers", "losses"], tests))
    if comparison["runtime"]:
        rows = [[label, f"{value:,.1f}"] for label, value in comparison["runtime"].items()]
        parts.append(markdown_table(["runtime", "value"], rows))
    return "\n".join(parts)


def _row(system: SystemScore, tasks: Sequence[str], cell: Any) -> list[str]:
    return [system.name, *(cell(system.tasks[task]) if task in system.tasks else "–" for task in tasks)]


def _accuracy(score: TaskScore) -> str:
    return with_interval(Estimate(score.accuracy, *score.interval))


def _loss(score: TaskScore) -> str:
    return "–" if score.answer_loss is None else f"{score.answer_loss:.3f}"
