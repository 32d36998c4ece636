"""The page ``docs/evidence.md``: its tables and figures come from the result files, and so does every number in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.replacing import write_figure
from ..data_files import MalformedJsonError, parse_json, read_text
from ..errors import MediatorError, MissingPackageError
from .page_tables import TABLES, Results

_MARKED = re.compile(r"<!-- table: ([\w-]+)(?: ([\w-]+))? -->\n.*?<!-- end -->", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|!\[[^\]]*\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+")


class PageError(MediatorError, ValueError):
    """The page asks for a table that does not exist, or its result file is missing."""


def read_results(folder: Path) -> dict[str, Any]:
    """All result files, by name.

    Raises:
        PageError: one of them is damaged.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = parse_json(read_text(path))
        except MalformedJsonError as fault:
            raise PageError(f"{path} is no result file: {fault}") from fault
    return found


def fill_page(text: str, folder: Path) -> str:
    """The page with every table between its markers made anew.

    Args:
        text: Markdown with ``<!-- table: NAME -->`` … ``<!-- end -->``, or ``NAME BASE`` for another base than SmolLM2.
        folder: of the result files.

    Raises:
        PageError: a table is unknown, or its result file is missing.
    """
    results = read_results(folder)

    def table(found: re.Match[str]) -> str:
        name, base = found.group(1), found.group(2) or ""
        if name not in TABLES:
            raise PageError(f"the page asks for a table {name!r}; there are {', '.join(TABLES)}.")
        try:
            made = TABLES[name](results, base and f"_{base}")
        except KeyError as fault:
            raise PageError(f"the table {name!r} needs {fault} in the result files of {str(folder)!r}.") from fault
        return f"<!-- table: {name}{base and f' {base}'} -->\n{made}<!-- end -->"

    return _MARKED.sub(table, text)


def loose_numbers(text: str) -> list[str]:
    """Numbers in the text of a page, outside of tables, code, links and headings' anchors."""
    text = _CODE.sub(" ", _MARKED.sub(" ", text))
    return [found.rstrip(",") for found in _NUMBER.findall(text)]


def is_from_results(number: str, results: Results) -> bool:
    """Whether a number in the text is a value of a result file, rounded to the decimals that are written.

    Shares may be written as percentages as well.
    """
    plain = number.replace(",", "")
    decimals = len(plain.partition(".")[2])
    value = float(plain)
    return any(
        round(abs(known) * scale, decimals) == value for known in _values(results) for scale in (1, 100, 1e-6, 1e-9)
    )


def _values(content: Any) -> Iterator[float]:
    if isinstance(content, bool) or content is None:
        return
    if isinstance(content, (int, float)):
        yield float(content)
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _values(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _values(value)


def draw_figures(results: Results, folder: Path) -> list[Path]:
    """Conflict per block with its chance level, and losses by number of routed blocks, where results are there.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("figures need matplotlib: pip install 'mediator_peft[plot]'") from None
    drawn = []
    measured = _files(results, "conflict")
    if measured:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name in measured:
            _draw_conflict(axes, results[name], name.removeprefix("conflict").removeprefix("_") or "smollm2")
        axes.axhline(0.5, color="0.5", linestyle="--", label="chance: independent signs")
        axes.set(xlabel="block, share of the depth", ylabel="sign conflict", ylim=(0, 0.6))
        axes.legend(fontsize=8, frameon=False)
        drawn.append(folder / "evidence_conflict.png")
        write_figure(drawn[-1], figure, dpi=120)
    for name in _files(results, "ablation"):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        _draw_ablation(figure.add_subplot(), results[name])
        drawn.append(folder / f"evidence_{name}.png")
        write_figure(drawn[-1], figure, dpi=120)
    if "forms" in results:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        _draw_forms(figure.add_subplot(), results["forms"]["forms"])
        drawn.append(folder / "forms_divergence.png")
        write_figure(drawn[-1], figure, dpi=120)
    return drawn


def _files(results: Results, kind: str) -> list[str]:
    """Names of one kind of result files: that of SmolLM2, and those of other bases."""
    return [name for name in results if name == kind or name.startswith(f"{kind}_")]


def _draw_forms(axes: Any, forms: Results) -> None:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in forms.values():
        kinds.setdefault(row["kind"], []).append((row["new"]["bytes"], row["new"]["divergence"]))
    for kind, points in kinds.items():
        if len(points) == 1 and points[0][0] > 1:
            axes.axhline(points[0][1], color="0.5", linestyle="--" if "embedding" in kind else ":", label=kind)
        else:
            bytes_, divergences = zip(*sorted(points), strict=True)
            axes.plot(bytes_, divergences, marker="o", markersize=4, label=kind)
    axes.set(xscale="log", yscale="log", ylabel="divergence from the expert (nats a token)")
    axes.set_xlabel("bytes on disk a routed parameter and expert")
    axes.legend(fontsize=7, frameon=False)


def _draw_conflict(axes: Any, found: Results, base: str) -> None:
    for label, records in found["sets"].items():
        whole = [record for record in records if record["kind"] == "all"]
        depth = [record["block"] / max(1, len(whole) - 1) for record in whole]
        axes.plot(depth, [r["sign"] for r in whole], marker="o", markersize=3, label=f"{base}, {label}")


def _draw_ablation(axes: Any, found: Results) -> None:
    last = found["num_blocks"]
    for ranking, curve in found["curves"].items():
        points = sorted((int(count), point["mean"]) for count, point in curve.items())
        counts = [0, *(count for count, _ in points), last]
        means = [found["none"]["mean"], *(mean for _, mean in points), found["all"]["mean"]]
        style = "--" if ranking.startswith("random") else "-"
        axes.plot(counts, means, style, marker="o", markersize=3, label=ranking)
    axes.set(xlabel="routed blocks", ylabel="answer loss, mean of the tasks (nats a token)")
    axes.legend(fontsize=8, frameon=False, ncols=2)
