"""An evaluation as JSON, as terminal tables and as one figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.replacing import replaced_together, write_figure, write_replacing
from ..errors import MissingPackageError
from .runner import EvalTask, RoutingScore, SystemScore, TaskScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table
    from rich.text import Text

# Okabe and Ito's palette, told apart by all common kinds of colour blindness, without its yellow, too pale for lines.
_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = "osD^vPXdph<>8"


@dataclass
class EvaluationReport:
    """Systems × tasks, and where prompts were routed."""

    tasks: Sequence[EvalTask]
    systems: list[SystemScore] = field(default_factory=list)
    routing: RoutingScore | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """What else belongs to it: sizes, settings, samples. Plain data; goes into the JSON as it is."""

    @property
    def known_tasks(self) -> list[str]:
        """Tasks that an expert was made for."""
        return [task.name for task in self.tasks if task.expert is not None]

    @property
    def unknown_tasks(self) -> list[str]:
        """Tasks that no expert knows."""
        return [task.name for task in self.tasks if task.expert is None]

    def system(self, name: str) -> SystemScore:
        """The system of that name."""
        return next(system for system in self.systems if system.name == name)

    def mean_accuracy(self, system: SystemScore) -> float | None:
        """Mean over the known tasks; None where the system did not answer all of them."""
        known = self.known_tasks
        return system.mean_accuracy(known) if known and set(known) <= set(system.tasks) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "tasks": {
                task.name: {
                    "expert": task.expert,
                    "num_items": len(task.items),
                    "match": sorted({item.match for item in task.items}),
                    "max_new_tokens": task.max_new_tokens,
                }
                for task in self.tasks
            },
            "systems": [{**system.to_dict(), "mean_accuracy": self.mean_accuracy(system)} for system in self.systems],
            "routing": None if self.routing is None else self.routing.to_dict(),
            **self.extra,
        }

    def answers(self) -> list[dict[str, Any]]:
        """Every answer of every system, one record each."""
        return [
            {"system": system.name, "task": task, **vars(item)}
            for system in self.systems
            for task, score in system.tasks.items()
            for item in score.items
        ]


def write_json(content: Any, path: Path) -> None:
    """Write JSON under a temporary name that becomes the final one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_replacing(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_evaluation(report: EvaluationReport, folder: Path, texts: Mapping[str, str] | None = None) -> str | None:
    """``results.json``, ``answers.json`` and ``results.png``: a kill leaves those of one evaluation.

    Args:
        report: what was measured.
        folder: made if need be.
        texts: further files, name → content.

    Returns:
        Why there is no figure; None where there is one.

    Raises:
        OutputError: the folder cannot be written.
    """
    with replaced_together(folder) as fresh:
        write_json(report.answers(), fresh / "answers.json")
        write_json(report.to_dict(), fresh / "results.json")
        for name, text in (texts or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        try:
            draw_report(report, fresh / "results.png")
        except MissingPackageError as fault:
            return str(fault)
    return None


def accuracy_table(report: EvaluationReport, tasks: Sequence[str], title: str = "") -> Table:
    """Share of right answers with its 95 % interval: a row a system, a column a task, and their mean."""
    return _table(report, tasks, title, "share of right answers [95 % interval]", _accuracy_cell, _mean_accuracy)


def loss_table(report: EvaluationReport, tasks: Sequence[str], title: str = "") -> Table:
    """Loss of the reference answers: a row a system, a column a task."""
    caption = "loss of the reference answer, nats a token; smaller is better"
    return _table(report, tasks, title, caption, _loss_cell, None)


def _table(
    report: EvaluationReport,
    tasks: Sequence[str],
    title: str,
    caption: str,
    cell: Callable[[TaskScore], Text],
    mean: Callable[[Sequence[TaskScore]], Text] | None,
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, caption=caption, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("system")
    # As ``Text``: names may hold what rich would take for markup.
    for name in tasks:
        table.add_column(Text(name), justify="right", no_wrap=True)
    if mean and len(tasks) > 1:
        table.add_column("mean", justify="right", no_wrap=True)
    for system in report.systems:
        scores = [system.tasks[name] for name in tasks if name in system.tasks]
        if not scores:
            continue
        cells = [cell(system.tasks[name]) if name in system.tasks else Text("–") for name in tasks]
        if mean and len(tasks) > 1:
            cells.append(mean(scores) if len(scores) == len(tasks) else Text("–"))
        table.add_row(Text(system.name), *cells)
    return table


def _accuracy_cell(score: TaskScore) -> Text:
    from rich.text import Text

    low, high = score.interval
    return Text.assemble((share(score.accuracy), "bold"), " ", (f"[{low:.2f}–{high:.2f}]", "dim"))


def _mean_accuracy(scores: Sequence[TaskScore]) -> Text:
    from rich.text import Text

    return Text(share(sum(score.accuracy for score in scores) / len(scores)), style="bold")


def _loss_cell(score: TaskScore) -> Text:
    from rich.text import Text

    return Text("–" if score.answer_loss is None else f"{score.answer_loss:.3f}")


def share(value: float) -> str:
    """A share to three digits without the leading zero: ``.250``, ``1.00``."""
    return f"{value:.2f}" if round(value, 3) >= 1 else f"{value:.3f}".removeprefix("0")


def routing_table(routing: RoutingScore, title: str = "") -> Table:
    """Confusion matrix: a row a task, a column an expert, the fallback last."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", caption_justify="left", pad_edge=False)
    table.caption = "prompts by the column with the most weight; unknown: the base has more than the experts"
    table.add_column("prompts of", no_wrap=True)
    for column in [*routing.columns, "right", "unknown", "uncertainty"]:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for task, row in routing.confusion.items():
        right = share(routing.accuracy[task]) if task in routing.accuracy else "–"
        counts = [
            Text(str(row[column]), style="bold") if row[column] else Text("·", style="dim")
            for column in routing.columns
        ]
        table.add_row(Text(task), *counts, right, share(routing.ood[task]), f"{routing.mean_uncertainty[task]:.3f}")
    return table


def draw_report(report: EvaluationReport, path: Path, sizes: Mapping[str, int] | None = None, title: str = "") -> None:
    """One figure: accuracies with intervals, the confusion matrix and, if given, bytes on disk.

    Args:
        report: what to draw.
        path: ``.png``, ``.svg`` or ``.pdf``; its ending decides.
        sizes: label → bytes, drawn as bars.
        title: above everything.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("figures need matplotlib: pip install 'mediator_peft[plot]'") from None
    panels = [True, report.routing is not None, bool(sizes)]
    widths = [width for width, wanted in zip((6.4, 4.4, 3.4), panels, strict=True) if wanted]
    height = max(3.6, 1.4 + 0.12 * len(report.systems) * max(3, len(report.tasks)))
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    axes = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    _draw_accuracies(axes.pop(0), report)
    if report.routing is not None:
        _draw_confusion(axes.pop(0), report.routing)
    if sizes:
        _draw_sizes(axes.pop(0), sizes)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure)


def _draw_accuracies(axes: Axes, report: EvaluationReport) -> None:
    """A row a system, a marker a task: shape and colour both tell tasks apart; hollow ones are unknown to experts."""
    num_tasks = len(report.tasks)
    for place, task in enumerate(report.tasks):
        offset = (place - (num_tasks - 1) / 2) * 0.7 / max(1, num_tasks)
        rows = [row for row, system in enumerate(report.systems) if task.name in system.tasks]
        scores = [report.systems[row].tasks[task.name] for row in rows]
        values = [score.accuracy for score in scores]
        below = [score.accuracy - score.interval.low for score in scores]
        above = [score.interval.high - score.accuracy for score in scores]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.errorbar(
            values,
            [row + offset for row in rows],
            xerr=[below, above],
            fmt=_MARKERS[place % len(_MARKERS)],
            color=colour,
            markerfacecolor=colour if task.expert else "white",
            markersize=5,
            elinewidth=1,
            label=task.name if task.expert else f"{task.name} (no expert)",
        )
    for row in range(1, len(report.systems), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0, zorder=0)
    axes.set_yticks(range(len(report.systems)), [system.name for system in report.systems])
    axes.set_ylim(len(report.systems) - 0.5, -0.5)
    axes.set(xlim=(-0.03, 1.03), xlabel="share of right answers (95 % interval)")
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=min(3, num_tasks), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _draw_confusion(axes: Axes, routing: RoutingScore) -> None:
    tasks = list(routing.confusion)
    shares = [
        [row[column] / max(1, sum(row.values())) for column in routing.columns] for row in routing.confusion.values()
    ]
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, value in enumerate(row):
            count = routing.confusion[tasks[y]][routing.columns[x]]
            axes.text(x, y, str(count), ha="center", va="center", color="black" if value > 0.5 else "white", fontsize=9)
    axes.set_xticks(range(len(routing.columns)), routing.columns, rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="routed to", ylabel="prompts of", title="routing")


def _draw_sizes(axes: Axes, sizes: Mapping[str, int]) -> None:
    megabytes = [size / 1e6 for size in sizes.values()]
    bars = axes.barh(range(len(sizes)), megabytes, color=_COLOURS[1], height=0.6)
    axes.bar_label(bars, [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in megabytes], padding=3)
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.invert_yaxis()
    axes.set(xlabel="MB on disk", xlim=(0, max(megabytes) * 1.2))
    axes.spines[["top", "right"]].set_visible(False)
