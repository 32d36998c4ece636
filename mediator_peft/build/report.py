"""What was built, in numbers and pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank.sparse_delta import SparseDelta
from ..bank.values import VALUES


@dataclass
class DeltaError:
    """How well packed deltas stand for the whole ones, summed over matrices."""

    norm: float = 0.0
    """Squared norm of the whole deltas."""

    packed: float = 0.0
    """Squared norm of the packed ones."""

    inner: float = 0.0
    """Their inner product."""

    kept: float = 0.0
    """Squared norm of the whole deltas where entries are kept."""

    def add(self, delta: Tensor, packed: SparseDelta) -> None:
        """Count one matrix: the whole delta (O, I) and its packed form."""
        kept = packed.kept
        whole, values = delta[kept], VALUES[packed.coding].decode(packed.parts, kept)
        self.norm += float(delta.square().sum(dtype=torch.float64))
        self.kept += float(whole.square().sum(dtype=torch.float64))
        self.packed += float(values.square().sum(dtype=torch.float64))
        self.inner += float((whole * values).sum(dtype=torch.float64))

    def summary(self) -> dict[str, float]:
        """Norm, share of squared norm at kept entries, cosine and relative distance of packed and whole deltas."""
        if not self.norm:
            return {"norm": 0.0, "kept_energy": 1.0, "cosine": 1.0, "relative_error": 0.0}
        distance = max(0.0, self.norm - 2 * self.inner + self.packed)
        return {
            "norm": self.norm**0.5,
            "kept_energy": self.kept / self.norm,
            "cosine": self.inner / (self.norm * self.packed) ** 0.5 if self.packed else 0.0,
            "relative_error": (distance / self.norm) ** 0.5,
        }


@dataclass
class BuildReport:
    """What a build decided and made. ``to_dict()`` is what ``report.json`` holds."""

    output: str | None
    """Folder of the result; None for a model built in memory."""

    experts: list[str]
    storage_dtype: str
    """In which differences were taken and the backbone is stored."""

    base_was_rounded: bool
    """Whether the base came in a finer dtype than that."""

    conflict: dict[str, list[float]]
    """Score name → one number a block, in order of depth."""

    conflict_score: str
    routed_blocks: list[int]
    num_blocks: int
    routed_parameters: int
    """Entries of all matrices that carry deltas, counted once."""

    bank_bytes: int
    """Bytes of all deltas in memory."""

    delta_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Column → how well its packed deltas stand for the whole ones."""

    files: dict[str, int] = field(default_factory=dict)
    """File → bytes on disk."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Largest resident memory of the process so far."""

    notes: list[str] = field(default_factory=list)
    """What may surprise: roundings, blocks that are averaged, figures left out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes in memory for one routed parameter and one delta."""
        num_deltas = max(1, len(self.delta_errors))
        return self.bank_bytes / max(1, self.routed_parameters * num_deltas)


def write_report(report: BuildReport, folder: Path) -> None:
    """Write ``report.json``, ``conflict.csv`` and, where matplotlib is installed, ``conflict.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "conflict.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["block", *report.conflict, "routed"])
        for block in range(report.num_blocks):
            scores = [f"{column[block]:.6f}" for column in report.conflict.values()]
            writer.writerow([block, *scores, int(block in report.routed_blocks)])
    try:
        _draw_conflict(report, folder / "conflict.png")
    except ImportError:
        report.notes.append("conflict.png was left out: pip install 'mediator_peft[plot]'")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")


def _draw_conflict(report: BuildReport, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, scores), marker in zip(report.conflict.items(), "osD^", strict=False):
        axes.plot(range(report.num_blocks), scores, marker=marker, markersize=3, label=name)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":", label="independent signs")
    for block in range(report.num_blocks):
        if block not in report.routed_blocks:
            axes.axvspan(block - 0.5, block + 0.5, color="lightgrey", alpha=0.5, linewidth=0)
    axes.set(xlabel="block (grey: averaged, not routed)", ylabel="conflict score", ylim=(0, 1))
    axes.legend(fontsize=8, ncols=4)
    figure.savefig(path, dpi=150)
