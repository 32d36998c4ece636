"""Bytes of each part of an adapter, from JSON and safetensors headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..config import CORRECTION, FALLBACK_EXPERT
from ..errors import AdapterError
from .adapter_files import (
    BANK_ATTRIBUTE,
    ROUTER_PREFIX,
    WEIGHTS_FILE,
    backbone_of,
    find_adapter,
    read_raw_config,
)
from .headers import Stored, read_header


def _stored_in(path: Path) -> dict[str, Stored]:
    try:
        found = read_header(path)[0] if path.exists() else None
    except (OSError, ValueError) as fault:
        raise AdapterError(f"{path} is damaged or cut short ({fault}). Copy or build it again.") from fault
    if found is None:
        raise AdapterError(f"no {path.name} in {path.parent}. Copy or build it again.")
    return found


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter as its files tell it."""

    folder: Path
    config: dict[str, Any]
    columns: list[str]
    """Names of the expert-weight columns."""

    column_bytes: dict[str, dict[str, int]]
    """Column, or correction → part (mask, signs, scales, …) → bytes in the adapter file."""

    router_bytes: int
    adapter_bytes: int
    """The whole adapter file."""

    backbone: str
    """Folder or hub id."""

    backbone_bytes: int | None
    """Of the backbone's weight files; None where it does not lie on this machine."""

    routed_parameters: int | None
    """Entries of all matrices that carry deltas, counted once; None where neither backbone nor report is at hand."""

    report: dict[str, Any]
    """What the build wrote to ``report/report.json``; empty where that is not at hand."""

    @property
    def has_router(self) -> bool:
        """Whether a fitted router is in the file."""
        return self.router_bytes > 0

    @property
    def bytes_per_parameter(self) -> float | None:
        """Bytes in the file for one routed parameter and one expert; the fallback's delta and a correction left out.

        What a family shares is counted once, and experts that are stored once count each.
        """
        shared = (FALLBACK_EXPERT, CORRECTION)
        sizes = [sum(parts.values()) for name, parts in self.column_bytes.items() if name not in shared]
        number = sum(name != FALLBACK_EXPERT for name in self.columns)
        if not sizes or not self.routed_parameters or not number:
            return None
        return sum(sizes) / (self.routed_parameters * number)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Column → bytes of its deltas in memory, where bitmaps are not compressed; without those of unknown size."""
        known = {}
        for name, parts in self.column_bytes.items():
            if name != CORRECTION and (self.routed_parameters or not parts.get("mask")):
                bitmap = (self.routed_parameters or 0) // 8 if parts.get("mask") else 0
                known[name] = bitmap + sum(size for part, size in parts.items() if part != "mask")
        return known

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        routed_modules = self.config.get("routed_modules") or []
        return {
            "adapter": str(self.folder),
            "backbone": self.backbone,
            "columns": self.columns,
            "settings": {
                name: self.config.get(name)
                for name in ("merge_method", "sparsifier", "density", "encoding", "router", "router_layer", "fallback")
            }
            | {"router_made_from_deltas": self.config.get("fitted_router")},
            "provenance": self.config.get("provenance"),
            "num_blocks": self.config.get("num_blocks"),
            "routed_blocks": self.report.get("routed_blocks"),
            "num_routed_layers": len(routed_modules),
            "routed_parameters": self.routed_parameters,
            "has_router": self.has_router,
            "bytes": {
                "backbone": self.backbone_bytes,
                "adapter": self.adapter_bytes,
                "router": self.router_bytes,
                "columns": self.column_bytes,
            },
            "bytes_per_routed_parameter_and_expert": self.bytes_per_parameter,
            "conflict_score": self.report.get("conflict_score"),
            "conflict": self.report.get("conflict"),
        }


def read_adapter_info(path: str | Path) -> AdapterInfo:
    """What lies in an output folder of a build, or in an adapter folder.

    Raises:
        AdapterError: there is no adapter, or its files are damaged.
    """
    folder = find_adapter(Path(path).expanduser())
    config = read_raw_config(folder)
    headers = _stored_in(folder / WEIGHTS_FILE)
    column_bytes: dict[str, dict[str, int]] = {}
    router_bytes = 0
    for key, header in headers.items():
        _, is_bank, buffer = key.partition(f".{BANK_ATTRIBUTE}.")
        if is_bank:
            column, _, part = buffer.partition(":")
            parts = column_bytes.setdefault(column, {})
            parts[part] = parts.get(part, 0) + header.num_bytes
        elif key.startswith(ROUTER_PREFIX):
            router_bytes += header.num_bytes
    experts = list(_strings(config.get("expert_names") or config.get("experts") or ()))
    columns = [*experts, FALLBACK_EXPERT] if config.get("fallback") == FALLBACK_EXPERT else experts
    mapped = config.get("column_map")
    stored = list(mapped) if isinstance(mapped, dict) else columns
    reference = config.get("base_model_name_or_path")
    backbone = backbone_of(folder, str(reference) if reference else None)
    report = _read_report(folder)
    shapes = _backbone_shapes(Path(backbone))
    return AdapterInfo(
        folder=folder,
        config=config,
        columns=columns,
        column_bytes={name: column_bytes[name] for name in [*stored, CORRECTION] if name in column_bytes},
        router_bytes=router_bytes,
        adapter_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        backbone=backbone,
        backbone_bytes=sum(header.num_bytes for header in shapes.values()) if shapes else None,
        routed_parameters=_routed_parameters(_strings(config.get("routed_modules") or ()), shapes, report),
        report=report,
    )


def _strings(names: object) -> Iterable[str]:
    return [str(name) for name in names] if isinstance(names, Iterable) else []


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / "report" / "report.json"
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise AdapterError(f"{path} is damaged ({fault}). Delete it or copy it again.") from fault
    return loaded if isinstance(loaded, dict) else {}


def _backbone_shapes(folder: Path) -> dict[str, Stored]:
    if not folder.is_dir():
        return {}
    headers: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        headers.update(_stored_in(path))
    return headers


def _routed_parameters(modules: Iterable[str], shapes: dict[str, Stored], report: dict[str, Any]) -> int | None:
    sizes = [_entries(module, shapes) for module in modules]
    known = [size for size in sizes if size is not None]
    if shapes and len(known) == len(sizes):
        return sum(known)
    return report.get("routed_parameters")


def _entries(module: str, shapes: dict[str, Stored]) -> int | None:
    """Of one matrix, which may be one of a fused tensor (E, O, I); None where the files do not have it."""
    if f"{module}.weight" in shapes:
        return prod(shapes[f"{module}.weight"].shape)
    fused = shapes.get(module.rpartition(".")[0])
    return prod(fused.shape[1:]) if fused is not None and len(fused.shape) == 3 else None


def format_bytes(size: int | None) -> str:
    """``269.1 MB``; powers of a thousand."""
    if size is None:
        return "–"
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{size} B"
