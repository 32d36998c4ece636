"""The table of merge methods as text, generated from its rows; and what was not taken up, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import MERGE_METHODS

REJECTED: dict[str, str] = {
    "R-TSVM, RESM (arXiv 2502.06876)": "only the abstract could be read and there is no code: the weights against "
    "outliers and the rule for ranks are not known. `tsv` is the published method that it starts from.",
    "MWA (arXiv 2504.18580)": "no row of its own: weights from losses or steps are `coefficients.json` for `weighted`. "
    "The paper's own formula was not seen.",
    "Frank-Wolfe merging (arXiv 2503.12649), MAP (arXiv 2406.07529), Expert Merging (arXiv 2509.25712), "
    "Evo-Merging (arXiv 2509.12951), AdaMerging (arXiv 2310.02575)": "searches that end in a weighted sum: they write "
    "`coefficients.json`, and `weighted` builds it. All but AdaMerging are there and were measured on real experts "
    "(docs/searching.md). AdaMerging minimises the entropy of predictions on test inputs; `expert_merging` imitates "
    "the experts instead.",
    "Concrete task arithmetic (arXiv 2312.06173)": "learns a mask of the size of the model on a GPU; about 2.5e15 "
    "floating-point operations for 135M parameters, 14 hours on a CPU core that does 5e10 a second.",
    "PLeaS (arXiv 2407.02447)": "for experts of one base the permutations are the identity, other widths give another "
    "architecture, and the stacked least-squares half is `regmean`.",
    "TALL-masks for each task (arXiv 2405.07813)": "a compression with one model for each task: "
    "`mediator-peft eval --baseline tall`. Its consensus is `consensus`.",
    "Unconstrained merging (arXiv 2410.13699)": "of one architecture: a search, see above. Of several: training by "
    "distillation.",
    "SLERP and Karcher mean of weights": "experts of one base have a cosine of about 0.99999: SLERP of the weights is "
    "linear interpolation there and the Karcher mean their average. `slerp` and `karcher` work on task vectors.",
}
"""Method → why it is no row."""


def catalogue() -> list[dict[str, Any]]:
    """One entry a method, ready for JSON."""
    return [
        {
            "method": name,
            "paper": row.paper,
            "data": row.data,
            "needs_base": row.needs_base,
            "experts": row.num_experts,
            "is_order_free": row.is_order_free,
            "cost": row.cost,
            "parameters": {
                key: {
                    "default": each.default,
                    "bounds": list(each.choices) or each.bounds,
                    "is_published": each.is_published,
                    "text": each.text,
                }
                for key, each in row.parameters.items()
            },
            "good_for": row.good_for,
        }
        for name, row in sorted(MERGE_METHODS.items())
    ]


def parameter_texts(entry: dict[str, Any]) -> list[str]:
    """One line for each parameter: default, where it comes from, what it is."""
    return [
        f"{name} = {each['default']} ({'published' if each['is_published'] else 'ours'}): {each['text']}"
        for name, each in entry["parameters"].items()
    ]


def markdown() -> str:
    """Both tables, as ``docs/methods.md`` has them."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "| method | paper | data | cost | parameters (default) | good for |"
    yield "|---|---|---|---|---|---|"
    for entry in catalogue():
        parameters = "<br>".join(parameter_texts(entry)) or "none"
        conditions = [
            *(["two experts"] if entry["experts"] == 2 else []),
            *([] if entry["is_order_free"] else ["depends on the order of names"]),
        ]
        good_for = "; ".join([entry["good_for"], *conditions])
        cells = (f"`{entry['method']}`", entry["paper"], entry["data"], entry["cost"], parameters, good_for)
        yield f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"
    yield ""
    yield "## Methods that are no rows"
    yield ""
    yield "| method | reason |"
    yield "|---|---|"
    for name, reason in REJECTED.items():
        yield f"| {name} | {reason} |"
