"""The report of a build."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .conflict_figure import draw_conflict
from .signed_selection import Errors


def summarize_errors(errors: Sequence[Errors]) -> dict[str, float]:
    """How well one column's packed deltas stand for the whole ones, over all matrices.

    Returns:
        ``norm`` of the whole deltas, share of their squared norm at kept entries (``kept_energy``), ``cosine`` and
        ``relative_error`` (distance by norm) of packed and whole deltas.
    """
    norm, packed, inner, kept = (sum(column) for column in zip(*errors, strict=True)) if errors else (0.0,) * 4
    if not norm:
        return {"norm": 0.0, "kept_energy": 1.0, "cosine": 1.0, "relative_error": 0.0}
    distance = max(0.0, norm - 2 * inner + packed)
    return {
        "norm": norm**0.5,
        "kept_energy": kept / norm,
        "cosine": inner / (norm * packed) ** 0.5 if packed else 0.0,
        "relative_error": (distance / norm) ** 0.5,
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
    """Write ``report.json``, ``conflict.csv`` and ``conflict.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "conflict.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["block", *report.conflict, "routed"])
        for block in range(report.num_blocks):
            scores = [f"{column[block]:.6f}" for column in report.conflict.values()]
            writer.writerow([block, *scores, int(block in report.routed_blocks)])
    figure = draw_conflict(report.conflict, report.routed_blocks, report.num_blocks)
    (folder / "conflict.svg").write_text(figure, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
