"""``mediator-peft methods``: the merge methods, with paper, data, cost and parameters."""

from __future__ import annotations

from .common import AsJson, console, print_json


def methods(as_json: AsJson = False) -> None:
    """List the merge methods: paper, data, cost, parameters with their defaults, what each is good for.

    A default is "published" where it is the paper's or its authors' code's, and "ours" otherwise.

    Example:
      mediator-peft methods --json
    """
    from rich.table import Table

    from ..methods.merging.catalogue import catalogue, parameter_texts

    entries = catalogue()
    if as_json:
        print_json(entries)
        return
    table = Table(show_lines=True)
    for title in ("method", "paper", "data", "cost", "parameters", "good for"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        parameters = "\n".join(parameter_texts(entry))
        table.add_row(entry["method"], entry["paper"], entry["data"], entry["cost"], parameters, entry["good_for"])
    console().print(table)
