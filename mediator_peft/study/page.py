"""The page ``docs/evidence.md``: its tables and figures come from the result files, and so does every number in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MediatorError, MissingPackageError
from ..evaluation.comparison import markdown_table, with_interval
from ..evaluation.report import share
from ..evaluation.statistics import Estimate

_MARKED = re.compile(r"<!-- table: ([\w-]+)(?: ([\w-]+))? -->\n.*?<!-- end -->", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|!\[[^\]]*\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+")

Results = Mapping[str, Any]


class PageError(MediatorError, ValueError):
    """The page asks for a table that does not exist, or its result file is missing."""


def read_results(folder: Path) -> dict[str, Any]:
    """All result files, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


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


def systems_table(results: Results, base: str = "") -> str:
    """Accuracy and loss of each task, what is kept, bytes."""
    found = results["systems" + base]
    answered = found["systems"]["experts"]["answered_tasks"]
    header = ["system", *answered, "mean", "mean kept", "worst kept", "bytes, models"]
    rows = []
    for name, row in found["systems"].items():
        num_models = f"{row['bytes'] / found['bytes_of_one_model']:.2f}"
        kept = row.get("kept")
        if kept is None:
            rows.append([name, *["–"] * (len(header) - 2), num_models])
            continue
        rows.append(
            [
                name,
                *(share(row["tasks"][task]["accuracy"]) for task in answered),
                share(row["mean_accuracy"]),
                with_interval(Estimate(**kept["mean"])),
                f"{with_interval(Estimate(**kept['worst']))} {kept['worst_task']}",
                num_models,
            ]
        )
    return markdown_table(header, rows)


def losses_table(results: Results, base: str = "") -> str:
    """Answer loss of each task, and the mean above the experts'."""
    found = results["systems" + base]
    known, unknown = found["tasks"], found["unknown_tasks"]
    experts = found["systems"]["experts"]["mean_loss"]
    rows = []
    for name, row in found["systems"].items():
        cells = [f"{row['tasks'][task]['loss']:.3f}" if task in row["tasks"] else "–" for task in [*known, *unknown]]
        rows.append([name, *cells, f"{row['mean_loss']:.3f}", f"{row['mean_loss'] - experts:+.3f}"])
    header = ["system", *known, *(f"{task} (no expert)" for task in unknown), "mean of the tasks", "above the experts"]
    return markdown_table(header, rows)


def comparison_table(results: Results, base: str = "") -> str:
    """Baselines of other papers and merge methods: accuracy of each task, what is kept, loss, bytes."""
    found = results["comparison" + base]
    answered: list[str] = next(
        (row["answered_tasks"] for row in found["systems"].values() if "answered_tasks" in row), []
    )
    header = ["system", *answered, "mean kept", "worst kept", "mean loss", "bytes, models"]
    rows = []
    for name, row in found["systems"].items():
        kept = row.get("kept")
        cells = ["–"] * (len(answered) + 2)
        if kept is not None:
            worst = f"{with_interval(Estimate(**kept['worst']))} {kept['worst_task']}"
            accuracies = [share(row["tasks"][task]["accuracy"]) for task in answered]
            cells = [*accuracies, with_interval(Estimate(**kept["mean"])), worst]
        rows.append([name, *cells, f"{row['mean_loss']:.3f}", f"{row['bytes'] / found['bytes_of_one_model']:.2f}"])
    return markdown_table(header, rows)


def routing_table(results: Results, base: str = "") -> str:
    """Where test prompts were sent."""
    found = results["systems" + base]["routing"]
    columns = list(next(iter(found.values())))
    return markdown_table(["prompts of", *columns], ([task, *map(share, row.values())] for task, row in found.items()))


def p_values_table(results: Results, base: str = "") -> str:
    """p-values of paired tests against the routed model."""
    found = results["systems" + base]
    known = found["tasks"]
    rows = [
        [name, *(f"{row[task]['permutation_p_of_losses']:.4f}" if task in row else "–" for task in known)]
        for name, row in found["against_routed"].items()
        if name != "Mediator, routed"
    ]
    return markdown_table(["system", *known], rows)


def conflict_table(results: Results, base: str = "") -> str:
    """Sign conflict by matrix kind, mean over blocks, and of first, middle and last blocks."""
    rows = []
    for label, records in results["conflict" + base]["sets"].items():
        whole = [record for record in records if record["kind"] == "all"]
        scores = [record["sign"] for record in whole]
        third = len(scores) // 3
        parts = [scores[:third], scores[third : len(scores) - third], scores[len(scores) - third :]]
        deviation = max(record["chance_sd"] for record in whole)
        means = [f"{sum(part) / len(part):.3f}" for part in parts]
        rows.append([label, f"{min(scores):.3f}", f"{max(scores):.3f}", *means, f"{deviation:.4f}"])
    header = ["experts", "smallest", "largest", "first third", "middle", "last third", "chance .5, its sd"]
    return markdown_table(header, rows)


def kinds_table(results: Results, base: str = "") -> str:
    """Sign conflict, energy lost and norm of each kind of matrix, mean over blocks."""
    records = next(iter(results["conflict" + base]["sets"].values()))
    kinds = [kind for kind in dict.fromkeys(record["kind"] for record in records) if kind != "all"]
    rows = []
    for kind in kinds:
        some = [record for record in records if record["kind"] == kind]
        rows.append([kind, *(f"{sum(r[key] for r in some) / len(some):.3f}" for key in ("sign", "energy", "norm"))])
    return markdown_table(["matrix", "sign conflict", "energy the mean loses", "norm of the task vectors"], rows)


def ablation_table(results: Results, base: str = "") -> str:
    """Mean answer loss for each ranking and number of routed blocks."""
    found = results["ablation" + base]
    counts = list(next(iter(found["curves"].values())))
    rows = [
        [ranking, f"{found['none']['mean']:.3f}", *(f"{curve[count]['mean']:.3f}" for count in counts)]
        + [f"{found['all']['mean']:.3f}"]
        for ranking, curve in found["curves"].items()
    ]
    return markdown_table(["ranking", "0", *counts, str(found["num_blocks"])], rows)


def forms_table(results: Results, base: str = "") -> str:
    """Bytes, divergence and loss of each form of a delta: of all experts, and of those that no form was chosen on."""
    rows = []
    for name, row in results["forms" + base]["forms"].items():
        new, every = row["new"], row.get("all")
        cells = ["–"] if every is None else [f"{every['divergence']:.4f}"]
        cells += [f"{new['divergence']:.4f}", f"{new['loss']:.4f}", f"{new['same']:.3f}"]
        rows.append([name, f"{new['bytes']:.3f}", *cells])
    count = len(results["forms" + base]["num_tokens"])
    header = ["form", "bytes", f"divergence, {count} experts", "new ones", "loss, new ones", "same token, new ones"]
    return markdown_table(header, rows)


TABLES: dict[str, Callable[[Results, str], str]] = {
    "systems": systems_table,
    "losses": losses_table,
    "comparison": comparison_table,
    "tests": p_values_table,
    "routing": routing_table,
    "conflict": conflict_table,
    "conflict-by-matrix": kinds_table,
    "ablation": ablation_table,
    "forms": forms_table,
}
"""Name in the page's markers → what makes the table."""


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
    measured = [name for name in results if name == "conflict" or name.startswith("conflict_")]
    if measured:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name in measured:
            _draw_conflict(axes, results[name], name.removeprefix("conflict").removeprefix("_") or "smollm2")
        axes.axhline(0.5, color="0.5", linestyle="--", label="chance: independent signs")
        axes.set(xlabel="block, share of the depth", ylabel="sign conflict", ylim=(0, 0.6))
        axes.legend(fontsize=8, frameon=False)
        drawn.append(folder / "evidence_conflict.png")
        figure.savefig(drawn[-1], dpi=120)
    if "ablation" in results:
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        _draw_ablation(figure.add_subplot(), results["ablation"])
        drawn.append(folder / "evidence_ablation.png")
        figure.savefig(drawn[-1], dpi=120)
    if "forms" in results:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        _draw_forms(figure.add_subplot(), results["forms"]["forms"])
        drawn.append(folder / "forms_divergence.png")
        figure.savefig(drawn[-1], dpi=120)
    return drawn


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
        counts: Sequence[int] = [0, *map(int, curve), last]
        means = [found["none"]["mean"], *(point["mean"] for point in curve.values()), found["all"]["mean"]]
        style = "--" if ranking.startswith("random") else "-"
        axes.plot(counts, means, style, marker="o", markersize=3, label=ranking)
    axes.set(xlabel="routed blocks", ylabel="answer loss, mean of the tasks (nats a token)")
    axes.legend(fontsize=8, frameon=False, ncols=2)
