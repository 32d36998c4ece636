"""``mediator-peft inspect``: what an artefact holds, from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import ALWAYS, ALWAYS_PREFIX, CORRECTION, FAMILY_PREFIX
from .common import AsJson, OutputFolder, check_output, console, print_json, reading_output

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.adapter_sizes import AdapterInfo

_LEVELS = " ▁▂▃▄▅▆▇█"


def inspect(out: OutputFolder, as_json: AsJson = False) -> None:
    """Show sizes by part, settings and routed layers of OUT, from its JSON files and tensor headers alone.

    Example:
      mediator-peft inspect out
    """
    from ..checkpoints.adapter_sizes import read_adapter_info

    check_output(out)
    with reading_output(out):
        info = read_adapter_info(out)
        if as_json:
            print_json(info.to_dict())
        else:
            print_info(info, console())


def print_info(info: AdapterInfo, target: Console) -> None:
    """An adapter's sizes, settings and plan as tables."""
    from rich.table import Table
    from rich.text import Text

    from ..checkpoints.adapter_sizes import format_bytes

    facts = info.to_dict()
    table = Table.grid(padding=(0, 2))
    for label, value in _facts(facts):
        table.add_row(Text(label, style="dim"), Text(value))
    target.print(table)
    sizes = Table(title="Bytes on disk", title_justify="left", pad_edge=False)
    parts = sorted({part for column in info.column_bytes.values() for part in column})
    for heading in ("part", *parts, "total"):
        sizes.add_column(heading, justify="left" if heading == "part" else "right")
    for name, column in info.column_bytes.items():
        cells = [format_bytes(column.get(part, 0)) for part in parts]
        label = _label(name, info.config.get("column_map") or {})
        sizes.add_row(Text(label), *cells, format_bytes(sum(column.values())))
    blank = [""] * len(parts)
    sizes.add_row("router", *blank, format_bytes(info.router_bytes) if info.has_router else "not fitted")
    sizes.add_row("adapter file", *blank, format_bytes(info.adapter_bytes))
    sizes.add_row("backbone", *blank, format_bytes(info.backbone_bytes))
    target.print(sizes)


def _label(name: str, rows: dict[str, dict[str, float]]) -> str:
    """What a stored delta is."""
    if name == CORRECTION:
        return "correction of the quantised backbone"
    users = [other for other in rows.get(name, {name: 1.0}) if other != ALWAYS]
    if name.startswith(FAMILY_PREFIX):
        return f"shared by {', '.join(users)}"
    is_in_family = any(set(users) & set(row) for other, row in rows.items() if other.startswith(FAMILY_PREFIX))
    what = "residual of" if is_in_family else "delta of"
    return f"{what} {', '.join(users)}" if users else f"always on: {name.removeprefix(ALWAYS_PREFIX)}"


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    settings = facts["settings"]
    provenance = facts["provenance"] or {}
    rows = [
        ("adapter", str(facts["adapter"])),
        ("backbone", str(facts["backbone"])),
        ("base", str(provenance.get("base", "unknown"))),
        *((f"expert {name}", str(path)) for name, path in (provenance.get("experts") or {}).items()),
        ("routed to", ", ".join(facts["columns"])),
        (
            "deltas",
            f"{settings['density']:.0%} of entries by {settings['sparsifier']}, stored as {settings['encoding']}",
        ),
        ("backbone by", str(settings["merge_method"])),
        ("router", _router(settings, facts["has_router"])),
        ("fallback", str(settings["fallback"])),
        ("routed layers", _plan(facts)),
    ]
    if facts["bytes_per_routed_parameter_and_expert"] is not None:
        each = facts["bytes_per_routed_parameter_and_expert"]
        rows.append(("bytes", f"{each:.3f} a routed parameter and expert"))
    conflict = (facts["conflict"] or {}).get(facts["conflict_score"])
    if conflict:
        bar = "".join(_LEVELS[min(8, int(score * 16))] for score in conflict)
        rows.append(
            ("conflict by block", f"{bar}  ({min(conflict):.2f} to {max(conflict):.2f}; full height is chance, 0.5)")
        )
    return rows


def _router(settings: Mapping[str, Any], is_fitted: bool) -> str:
    """Its kind, and what it was made of."""
    if not is_fitted:
        return f"{settings['router']}, not fitted: run fit-router"
    made = settings["router_made_from_deltas"]
    return f"{settings['router']}, fitted" if made is None else f"{made}, made from deltas without texts"


def _plan(facts: dict[str, Any]) -> str:
    routed, parameters = facts["routed_blocks"], facts["routed_parameters"]
    text = f"{facts['num_routed_layers']}"
    if routed is not None:
        text += f" in {len(routed)} of {facts['num_blocks']} blocks"
        if 0 < len(routed) < (facts["num_blocks"] or 0):
            text += f" ({', '.join(map(str, routed))})"
    if parameters is not None:
        text += f", {parameters:,} parameters"
    return text
