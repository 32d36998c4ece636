"""Report of a fitted router: metrics on held-out prompts, the data behind the figures, and the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.replacing import write_figure
from ..routing.calibration import CalibrationReport, Evidence
from ..routing.metrics import ReliabilityBins, auroc, false_positive_rate, reliability_bins
from .outcomes import Outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OOD = "unknown"
FIGURES = ("confusion.csv", "reliability.csv", "uncertainty.csv", "risk_coverage.csv", "routing.png")
"""Files beside ``routing.json`` that tell of calibration texts."""

_BINS = 20
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "0.6"


def write_routing_report(
    folder: Path, report: CalibrationReport, evidence: Evidence, outcomes: Outcomes | None = None
) -> dict[str, Any]:
    """Write ``routing.json``, CSV files and, where matplotlib is installed, ``routing.png`` of a fit.

    Args:
        folder: made if need be.
        report: what ``fit_router`` returned.
        evidence: ``model.router.evidence`` after it.
        outcomes: what became of prompts that came with answers; None where there were none.

    Returns:
        What ``routing.json`` holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(report.num_texts)
    bins, table = reliability(evidence), confusion(evidence, len(names))
    summary = {**report._asdict(), **detection(evidence), "columns": [*names, OOD], "confusion_with_unknown": table}
    if outcomes is not None:
        counts_by_expert = {name: len(prompts) for name, prompts in outcomes.experts.items()}
        summary["outcomes"] = {
            "experts": counts_by_expert,
            "ordinary": len(outcomes.ordinary),
            "undecided": outcomes.num_undecided,
        }
    (folder / "routing.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_csv(
        folder / "confusion.csv",
        ["prompts of", *(f"to {name}" for name in names), f"flagged {OOD}"],
        [[name, *row] for name, row in zip([*names, OOD], table, strict=True)],
    )
    rows = zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.counts.tolist(), strict=True)
    _write_csv(folder / "reliability.csv", ["confidence", "accuracy", "prompts"], [list(row) for row in rows])
    edges, known, unknown = histograms(evidence)
    counts = zip(edges[:-1], edges[1:], known, unknown, strict=True)
    _write_csv(folder / "uncertainty.csv", ["from", "to", "known", OOD], [list(row) for row in counts])
    curve = risk_coverage(evidence)
    _write_csv(folder / "risk_coverage.csv", ["coverage", "risk"], [list(point) for point in curve])
    _draw(folder / "routing.png", names, table, bins, (edges, known, unknown), report)
    return summary


def confusion(evidence: Evidence, num_experts: int) -> list[list[int]]:
    """Rows: each expert's prompts, then background ones; columns: the best-scored expert, or flagged as unknown."""
    column = torch.where(evidence.is_ood, num_experts, evidence.probabilities.argmax(dim=1))
    row = torch.where(evidence.labels < 0, num_experts, evidence.labels)
    counts = torch.zeros(num_experts + 1, num_experts + 1, dtype=torch.long)
    counts.index_put_((row, column), torch.tensor(1), accumulate=True)
    return counts.tolist()


def reliability(evidence: Evidence) -> ReliabilityBins:
    """Confidence against accuracy of the calibration prompts."""
    known = evidence.labels >= 0
    return reliability_bins(evidence.probabilities[known], evidence.labels[known], num_bins=10)


def detection(evidence: Evidence) -> dict[str, float | None]:
    """How well uncertainty tells background prompts from known ones; None without background prompts."""
    known, unknown = _split(evidence)
    if not len(unknown):
        return {"auroc": None, "fpr_at_95": None}
    return {"auroc": auroc(known, unknown), "fpr_at_95": false_positive_rate(known, unknown)}


def histograms(evidence: Evidence) -> tuple[list[float], list[int], list[int]]:
    """Bin edges, and counts of known and of background prompts by uncertainty."""
    edges = [place / _BINS for place in range(_BINS + 1)]
    known, unknown = (
        torch.histc(part.float().clamp(0, 1), bins=_BINS, min=0, max=1).long().tolist() for part in _split(evidence)
    )
    return edges, known, unknown


def risk_coverage(evidence: Evidence) -> list[tuple[float, float]]:
    """Risk against coverage when prompts go to experts in the order of their OOD scores (El-Yaniv & Wiener 2010).

    Coverage is the share of all held-out prompts, known and background, that reach an expert; risk the share of these
    that should not have: background prompts, and known prompts whose best-scored expert is another.
    """
    order = evidence.ood_score.argsort(stable=True)
    wrong = (evidence.probabilities.argmax(dim=1) != evidence.labels)[order].double()
    ranks = torch.arange(1, len(order) + 1).double()
    points = zip((ranks / len(order)).tolist(), (wrong.cumsum(dim=0) / ranks).tolist(), strict=True)
    return list(points)


def _split(evidence: Evidence) -> tuple[Tensor, Tensor]:
    return evidence.uncertainty[evidence.labels >= 0], evidence.uncertainty[evidence.labels < 0]


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _draw(
    path: Path,
    names: Sequence[str],
    table: Sequence[Sequence[int]],
    bins: ReliabilityBins,
    counts: tuple[list[float], list[int], list[int]],
    report: CalibrationReport,
) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return  # the figures are an extra; all their data are in the CSV files
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _draw_confusion(left, [*names, OOD], table)
    _draw_reliability(middle, bins, report.ece)
    edges, known, unknown = counts
    width = edges[1] - edges[0]
    right.bar(edges[:-1], known, width, align="edge", color=_BLUE, alpha=0.7, label="calibration prompts")
    right.bar(edges[:-1], unknown, width, align="edge", color=_ORANGE, alpha=0.7, label="background prompts")
    right.set(xlabel="uncertainty", ylabel="prompts", title="uncertainty, held out", yscale="symlog")
    right.legend(fontsize=8, frameon=False)
    write_figure(path, figure, dpi=120)


def _draw_confusion(axes: Axes, names: Sequence[str], table: Sequence[Sequence[int]]) -> None:
    shares = [[value / max(1, sum(row)) for value in row] for row in table]
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if len(names) <= 12:
        for y, row in enumerate(table):
            for x, count in enumerate(row):
                colour = "black" if shares[y][x] > 0.5 else "white"
                axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="best scored, or flagged", ylabel="prompts of", title="routing, held out")


def _draw_reliability(axes: Axes, bins: ReliabilityBins, ece: float) -> None:
    filled = bins.counts > 0
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    axes.plot(bins.confidence[filled].tolist(), bins.accuracy[filled].tolist(), marker="o", color=_BLUE)
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title=f"reliability, ECE {ece:.3f}"
    )
