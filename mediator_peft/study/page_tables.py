"""The tables of the study's pages, each from result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..evaluation.comparison import markdown_table, with_interval
from ..evaluation.report import share
from ..evaluation.statistics import Estimate

_TITLES = {"": "SmolLM2", "_gemma3": "Gemma 3"}
"""End of a base's result files → its name in tables."""

SECOND = " ²"
"""Marks what is known of a second run alone: everything trained, built and measured anew."""

Results = Mapping[str, Any]


def systems_table(results: Results, base: str = "") -> str:
    """Accuracy and loss of each task, what is kept, bytes."""
    found = results["systems" + base]
    answered = found["systems"]["experts"]["answered_tasks"]
    header = ["system", *answered, "mean", "mean kept", "worst kept", "bytes, models"]
    rows = []
    for name, row in found["systems"].items():
        num_models = f"{row['bytes'] / found['bytes_of_one_model']:.2f}"
        if row.get("kept") is None:
            rows.append([name, *["–"] * (len(header) - 2), num_models])
            continue
        rows.append(
            [
                name,
                *(share(row["tasks"][task]["accuracy"]) for task in answered),
                share(row["mean_accuracy"]),
                *_kept_cells(row),
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
    """Baselines of other papers and merge methods, the best first: accuracy of each task, what is kept, loss, bytes.

    Systems that only the second run has are marked.
    """
    first, second = results["comparison" + base], results.get(f"comparison_again{base}", {"systems": {}})
    systems = {name + SECOND: row for name, row in second["systems"].items() if name not in first["systems"]}
    return _compared(first, {**systems, **first["systems"]})


def second_comparison_table(results: Results, base: str = "") -> str:
    """The same of the second run: all that it measured."""
    found = results["comparison_again" + base]
    return _compared(found, found["systems"])


def _compared(found: Results, systems: Mapping[str, Any]) -> str:

    def rank(named: tuple[str, dict[str, Any]]) -> tuple[float, str]:
        name, row = named
        return (-row["kept"]["mean"]["value"] if row.get("kept") else float("inf"), name)

    answered: list[str] = next((row["answered_tasks"] for row in systems.values() if "answered_tasks" in row), [])
    header = ["system", *answered, "mean kept", "worst kept", "mean loss", "forgets, nats", "bytes, models"]
    rows = []
    for name, row in sorted(systems.items(), key=rank):
        cells = ["–"] * (len(answered) + 2)
        if row.get("kept") is not None:
            cells = [*(share(row["tasks"][task]["accuracy"]) for task in answered), *_kept_cells(row)]
        forgets = with_signs(row["forgets"]) if "forgets" in row else "–"
        models = f"{row['bytes'] / found['bytes_of_one_model']:.2f}"
        rows.append([name, *cells, f"{row['mean_loss']:.3f}", forgets, models])
    return markdown_table(header, rows)


def build_table(results: Results, base: str = "") -> str:
    """What each system takes to make, beside the plain average."""
    found = results["runtime" + base]["build"]
    rows = [
        [name, f"{row['cpu_seconds']:.1f}", _ratio(row)]
        for name, row in sorted(found.items(), key=lambda pair: pair[1]["cpu_seconds"])
    ]
    return markdown_table(["system", "CPU seconds", "times the average's"], rows)


def decode_table(results: Results, base: str = "") -> str:
    """Tokens a second, beside one plain model."""
    found = results["runtime" + base]["decode"]
    rows = [[name, f"{row['tokens_per_second']:.1f}", _ratio(row)] for name, row in found.items()]
    return markdown_table(["system", "tokens a second", "times one plain model's"], rows)


def _ratio(row: Results) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"


def experts_forget_table(results: Results, base: str = "") -> str:
    """What each expert forgets on its own, on every base."""
    found = {name: results[f"comparison{name}"] for name in _TITLES if f"comparison{name}" in results}
    names = dict.fromkeys(name for table in found.values() for name in table["experts_forget"])
    rows = []
    for name in names:
        cells = [table["experts_forget"].get(name) for table in found.values()]
        rows.append([name, *("–" if cell is None else with_signs(cell) for cell in cells)])
    return markdown_table(["expert", *(_TITLES[name] for name in found)], rows)


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
    counts = sorted(next(iter(found["curves"].values())), key=int)
    rows = [
        [ranking, f"{found['none']['mean']:.3f}", *(f"{curve[count]['mean']:.3f}" for count in counts)]
        + [f"{found['all']['mean']:.3f}"]
        for ranking, curve in found["curves"].items()
    ]
    return markdown_table(["ranking", "0", *counts, str(found["num_blocks"])], rows)


def verdict_table(results: Results, base: str = "") -> str:
    """What every system of both bases keeps, the best first; what only the second run has is marked."""
    bases = {name: _kept_of(results, name) for name in _TITLES if f"systems{name}" in results}
    cells = {base: {name: _verdict(row) for name, row in rows.items()} for base, rows in bases.items()}
    return _side_by_side(cells, ("mean kept", "worst kept", "bytes, models"))


def _verdict(row: Results) -> tuple[float, list[str]]:
    """The mean share, and the cells."""
    mean, worst = _kept_cells(row)
    return row["kept"]["mean"]["value"], [mean + SECOND * row["is_second"], worst, f"{row['models']:.2f}"]


def _side_by_side(bases: dict[str, dict[str, tuple[float, list[str]]]], columns: tuple[str, ...]) -> str:
    """Systems of all bases, the best of the first base first.

    Args:
        bases: end of result files → system → what it is ordered by, and its cells.
        columns: of each base.
    """
    order = {name: value for rows in reversed(bases.values()) for name, (value, _) in rows.items()}
    absent = (0.0, ["–"] * len(columns))
    lines = [
        [name, *(cell for rows in bases.values() for cell in rows.get(name, absent)[1])]
        for name in sorted(order, key=lambda system: (-order[system], system))
    ]
    header = [f"{_TITLES[name]}: {column}" if not n else column
              for name in bases for n, column in enumerate(columns)]  # fmt: skip
    return markdown_table(["system", *header], lines)


def _kept_of(results: Results, base: str) -> dict[str, dict[str, Any]]:
    """System → its row with the number of models that its bytes are, of both tables of a base and of both runs."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("comparison_again", "comparison", "systems"):
        table = results.get(f"{kind}{base}", {"systems": {}})
        for name, row in table["systems"].items():
            if row.get("kept") is not None and name != "experts":
                models = row["bytes"] / table["bytes_of_one_model"]
                found[name] = {**row, "models": models, "is_second": kind == "comparison_again"}
    return found


def both_runs_table(results: Results, base: str = "") -> str:
    """What systems keep in the first and in the second run, those that both have."""
    bases = {name: _runs(results, name) for name in _TITLES if f"comparison_again{name}" in results}
    return _side_by_side(bases, ("mean kept", "second run", "worst kept", "second run"))


def _runs(results: Results, base: str) -> dict[str, tuple[float, list[str]]]:
    """System → the first run's mean share, and the cells of both runs."""
    first, second = results[f"comparison{base}"]["systems"], results[f"comparison_again{base}"]["systems"]
    found = {}
    for name in first:
        if first[name].get("kept") is not None and second.get(name, {}).get("kept") is not None:
            pairs = zip(_kept_cells(first[name]), _kept_cells(second[name]), strict=True)
            found[name] = first[name]["kept"]["mean"]["value"], [cell for pair in pairs for cell in pair]
    return found


def _kept_cells(row: Results) -> list[str]:
    kept = row["kept"]
    return [with_interval(Estimate(**kept["mean"])), f"{with_interval(Estimate(**kept['worst']))} {kept['worst_task']}"]


def against_random_table(results: Results, base: str = "") -> str:
    """Mean answer loss above that of random blocks, of each ranking and number of routed blocks, with intervals."""
    curves = results["ablation" + base]["against_random"]
    counts = list(next(iter(curves.values())))
    rows = [
        [ranking, *(with_signs(curve[count]) for count in sorted(counts, key=int))] for ranking, curve in curves.items()
    ]
    return markdown_table(["ranking", *(f"{count} blocks" for count in sorted(counts, key=int))], rows)


def with_signs(found: Results) -> str:
    """A difference with its interval."""
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def equal_bytes_table(results: Results, base: str = "") -> str:
    """Few blocks with dense deltas and all blocks with thin ones, at equal bytes."""
    found = results["ablation" + base]["equal_bytes"]
    curves, every = found["curves"], found["all"]
    counts = sorted(next(iter(curves.values())), key=int)
    densities = {count: next(iter(curves.values()))[count]["density"] for count in counts}
    rows = [
        [name, *(f"{curve[count]['mean']:.3f}" for count in counts), f"{every['mean']:.3f}"]
        for name, curve in curves.items()
    ]
    header = [f"{count} blocks, density {densities[count]:g}" for count in counts]
    return markdown_table(["ranking", *header, f"all blocks, density {every['density']:g}"], rows)


def parts_table(results: Results, base: str = "") -> str:
    """Answer losses with one part of the method changed, and bytes a routed parameter and expert."""
    found = results["ablation" + base]
    tasks = list(found["num_losses"])
    rows = [
        [name, *(f"{row['by_task'][task]:.3f}" for task in tasks), f"{row['mean']:.3f}", f"{row['bytes']:.3f}"]
        for name, row in {**found["variants"], "no deltas": found["none"]}.items()
    ]
    return markdown_table(["variant", *tasks, "mean", "bytes"], rows)


def number_table(results: Results, base: str = "") -> str:
    """Loss above the experts' by the number of experts."""
    found = results["ablation" + base]["num_experts"]
    rows = [[count, f"{row['first_two']:+.4f}", f"{row['all']:+.4f}"] for count, row in found.items()]
    return markdown_table(["experts", "the first two", "all of them"], rows)


def family_table(results: Results, base: str = "") -> str:
    """Experts that share a task: accuracy alone, named and routed, loss, and where the task's prompts were sent."""
    found = results["hard" + base]["family"]
    rows = []
    for name in found["names"]:
        accuracies, losses = ([share(found[kind]["tasks"][name]["accuracy"]) for kind in ("own", "named", "routed")],
                              [f"{found[kind]['tasks'][name]['loss']:.3f}" for kind in ("own", "named")])  # fmt: skip
        sent = {to: part for to, part in found["routing"][name].items() if part >= 0.005 and to != "flagged"}
        where = ", ".join(f"{to} {share(part)}" for to, part in sorted(sent.items(), key=lambda pair: -pair[1]))
        rows.append([name, *accuracies, *losses, where])
    header = ["expert", "accuracy alone", "named", "routed", "loss alone", "named", "its test prompts went to"]
    return markdown_table(header, rows)


def gates_table(results: Results, base: str = "") -> str:
    """Variants of the gate."""
    rows = [
        [name, f"{row['right expert']:.3f}", f"{row['smallest']:.3f}", f"{row['base, unknown']:.3f}"]
        for name, row in results["hard" + base]["gates"].items()
    ]
    header = ["gate", "right expert's weight, known prompts", "smallest", "base's weight, unknown prompts"]
    return markdown_table(header, rows)


def mixed_table(results: Results, base: str = "") -> str:
    """Where prompts of two tasks and second turns were sent."""
    found = results["hard" + base]
    rows = []
    for label, key in (("two tasks in one prompt", "two_tasks"), ("second turn of another task", "turns")):
        row = found.get(key)
        if row is not None:
            rows.append([label, *(share(row[kind]) for kind in ("first", "second", "other expert", "base", "flagged"))])
    return markdown_table(["prompts", "first's expert", "second's", "another", "base", "flagged"], rows)


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
    "second-comparison": second_comparison_table,
    "both-runs": both_runs_table,
    "tests": p_values_table,
    "experts-forget": experts_forget_table,
    "build": build_table,
    "decode": decode_table,
    "routing": routing_table,
    "conflict": conflict_table,
    "conflict-by-matrix": kinds_table,
    "ablation": ablation_table,
    "forms": forms_table,
    "verdict": verdict_table,
    "against-random": against_random_table,
    "equal-bytes": equal_bytes_table,
    "parts": parts_table,
    "number": number_table,
    "family": family_table,
    "gates": gates_table,
    "mixed": mixed_table,
}
"""Name in the page's markers → what makes the table."""
