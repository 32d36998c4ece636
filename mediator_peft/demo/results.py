"""The demo's results as tables, sample answers and one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoints.adapter_sizes import format_bytes
from ..evaluation import EvaluationReport, accuracy_table, draw_report, loss_table, routing_table
from ..evaluation.report import share
from .runner import AVERAGE, NAMED_EXPERT, ROUTED_EXPERT

_LONGEST_SAMPLE = 100


def print_results(report: EvaluationReport, console: Console) -> None:
    """Everything that was measured, in tables."""
    console.print(accuracy_table(report, report.known_tasks, title="Tasks with an expert"))
    console.print()
    console.print(accuracy_table(report, report.unknown_tasks, title="Tasks that no expert knows"))
    console.print()
    console.print(loss_table(report, [task.name for task in report.tasks], title="How likely the right answers are"))
    console.print()
    if report.routing is not None:
        console.print(routing_table(report.routing, title="Where prompts were routed"))
        console.print()
    console.print(_size_table(report.extra["summary"]))
    console.print()
    console.print(_sample_table(report.extra["samples"]))
    console.print()
    for line in headlines(report):
        console.print(f"• {line}")
    for note in report.extra["notes"]:
        console.print(Text(f"• {note}", style="dim"))


def headlines(report: EvaluationReport) -> list[str]:
    """What came out, in sentences."""
    found = report.extra["summary"]
    means, kept, sizes = found["mean_accuracy"], found["kept_of_experts"], found["bytes"]
    lines = [
        f"mean accuracy: experts {share(found['experts_mean'])}, plain average {share(means[AVERAGE])} "
        f"({kept[AVERAGE]:.0%} kept), Mediator with the expert named {share(means[NAMED_EXPERT])} "
        f"({kept[NAMED_EXPERT]:.1%}), routed {share(means[ROUTED_EXPERT])} ({kept[ROUTED_EXPERT]:.1%})"
    ]
    if found["routing_accuracy"] is not None:
        lines.append(f"routing accuracy on held-out prompts: {found['routing_accuracy']:.1%}")
    mediator = (sizes["backbone"] or 0) + sizes["adapter"]
    lines.append(
        f"on disk: {format_bytes(mediator)} instead of {format_bytes(sizes['full_copies'])} for full copies "
        f"({mediator / sizes['full_copies']:.0%}); {found['bytes_per_routed_parameter_and_expert']:.3f} bytes a routed "
        "parameter and expert"
    )
    for task, figures in found["unknown"].items():
        lines.append(
            f"{task}: base {share(figures['base'])}, plain average {share(figures['average'])}, routed "
            f"{share(figures['routed'])}; {figures['fell_back']:.0%} of its prompts fell back"
        )
    return lines


def _size_table(found: dict[str, Any]) -> Table:
    sizes = found["bytes"]
    table = Table(title="Bytes on disk", title_justify="left", pad_edge=False)
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("of full copies", justify="right")
    rows = {"full copies of all experts": sizes["full_copies"], "backbone": sizes["backbone"] or 0}
    rows |= {f"sparse delta of {name}": size for name, size in sizes["sparse_experts"].items()}
    rows |= {"router": sizes["router"], "backbone and adapter": (sizes["backbone"] or 0) + sizes["adapter"]}
    for label, size in rows.items():
        table.add_row(label, format_bytes(size), f"{size / sizes['full_copies']:.1%}")
    return table


def _sample_table(samples: list[dict[str, Any]]) -> Table:
    table = Table(title="Routed answers", title_justify="left", pad_edge=False, show_lines=True)
    for column in ("prompt", "answer", "expected"):
        table.add_column(column, overflow="fold")
    table.add_column("expert", no_wrap=True)
    table.add_column("weight", justify="right")
    for sample in samples:
        mark = ("✓ ", "green") if sample["is_right"] else ("✗ ", "red")
        prompt, answer, reference = (_shorten(sample[key]) for key in ("prompt", "answer", "reference"))
        row = Text(prompt), Text.assemble(mark, answer), Text(reference), Text(sample["expert"])
        table.add_row(*row, f"{sample['weight']:.2f}")
    return table


def _shorten(text: str) -> str:
    """The beginning and the end of a long text; answers end in what counts."""
    flat = " ".join(text.split())
    if len(flat) <= _LONGEST_SAMPLE:
        return flat
    half = _LONGEST_SAMPLE // 2 - 1
    return f"{flat[:half].rstrip()} … {flat[-half:].lstrip()}"


def draw_results(report: EvaluationReport, path: Path) -> None:
    """The one figure: accuracies, routing, bytes.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    sizes = report.extra["summary"]["bytes"]
    experts = sum(sizes["sparse_experts"].values())
    bars = {
        f"{len(report.known_tasks)} full copies": sizes["full_copies"],
        "backbone": sizes["backbone"] or 0,
        f"{len(sizes['sparse_experts'])} sparse deltas": experts,
        "router": sizes["router"],
    }
    draw_report(report, path, bars, title="SmolLM2-135M-Instruct, three fine-tuned experts, one Mediator model")
