"""Storing a bank smaller: equal experts once, and what a family of experts has in common once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..bank.column_map import average_linkage, families, identity_rows, members, new_family
from ..bank.delta_rows import DeltaRows
from ..bank.layer_bank import LayerBank
from ..bank.sparse_delta import SparseDelta
from ..config import ALWAYS, MediatorSettings
from ..errors import ConfigError, UnsupportedError
from ..merge.family_packing import MIN_COSINE, RESIDUAL_DENSITY, pack_family
from ..merge.family_packing import residual_density as density_of_residuals
from ..methods.encoding import ENCODINGS
from .active_adapter import ActiveAdapter
from .config import FALLBACK_EXPERT
from .layer import MediatorLayer
from .saving import storage_type

_SAMPLED_ROWS = 64


@dataclass
class CondenseReport:
    """What was stored once."""

    aliases: dict[str, str] = field(default_factory=dict)
    """Expert → the expert whose delta it shares, being equal to it."""

    families: dict[str, list[str]] = field(default_factory=dict)
    """Shared delta → experts."""

    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Expert → expert → cosine of their deltas, by a sample of rows."""

    fidelity: dict[str, float] = field(default_factory=dict)
    """Expert of a family → cosine of what is stored of it now and before."""

    bytes_before: int = 0
    """In memory, all deltas."""

    bytes_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def condense(
    active: ActiveAdapter,
    min_cosine: float = MIN_COSINE,
    residual_density: float = RESIDUAL_DENSITY,
    with_families: bool = True,
    dry_run: bool = False,
) -> CondenseReport:
    """Store equal experts once, and families as one shared delta and thin residuals. The router is not touched.

    A family's shared delta is the mean of its members' deltas, thinned to the bank's density; the residual of a member
    is what its delta differs from that, thinned to ``residual_density``. At density 1 with ``encoding="float"`` nothing
    is lost for any expert weights, otherwise members change a little. Experts that are in no family keep their bytes.

    Args:
        active: the adapter; its deltas are changed in place.
        min_cosine: mean pairwise cosine of deltas from which on experts become a family (average linkage).
        residual_density: share of a residual's entries that is kept; 1 where the bank's density is 1.
        with_families: whether to form families, or only to share what is equal.
        dry_run: only say what would be stored once; bytes and fidelity are those of now then.

    Raises:
        ConfigError: a number is out of range.
        UnsupportedError: the deltas are products of factors and families are wanted, or they lie in mapped files.
    """
    with active.changes_wait():
        return _condense(active, min_cosine, residual_density, with_families, dry_run)


def _condense(
    active: ActiveAdapter, min_cosine: float, residual_density: float, with_families: bool, dry_run: bool
) -> CondenseReport:
    if not -1 <= min_cosine <= 1 or not 0 < residual_density <= 1:
        raise ConfigError(
            f"min_cosine must be in [-1, 1] and residual_density in (0, 1], got {min_cosine!r} and "
            f"{residual_density!r}."
        )
    config, layers = active.config, active.layers
    banks = {name: layer.bank(active.name) for name, layer in layers.items() if active.name in layer.mediator_bank}
    if any(bank.stays for bank in banks.values()):
        raise UnsupportedError("deltas lie in mapped files: load the model without max_resident_experts first.")
    before = config.column_map or identity_rows([name for name in config.columns if _has_delta(banks, name)])
    rows: dict[str, dict[str, float]] = {stored: dict(row) for stored, row in before.items()}
    report = CondenseReport(bytes_before=sum(bank.num_bytes for bank in banks.values()))
    removed = _share_equal(banks, rows, report)
    alone = [stored for stored in rows if _may_join(stored, rows)]
    cosines = _cosines(banks, alone)
    report.cosines = {
        name: {other: round(float(cosines[a, b]), 4) for b, other in enumerate(alone)} for a, name in enumerate(alone)
    }
    found = average_linkage(cosines, alone, min_cosine) if with_families and alone else []
    groups = [group for group in found if len(group) > 1]
    if groups and not ENCODINGS[config.encoding].has_positions:
        raise UnsupportedError(
            f"deltas in encoding {config.encoding!r} are products of factors, which families do not have. Store equal "
            "experts once, without families."
        )
    for group in groups:
        shared = new_family(rows)
        report.families[shared] = sorted(name for stored in group for name in members(rows, stored))
        rows = {shared: dict.fromkeys(report.families[shared], 1.0), **rows}
    if not dry_run:
        layers = {name: layer for name, layer in layers.items() if name in banks}
        _store(active, layers, rows, removed, dict(zip(report.families, groups, strict=True)), residual_density, report)
    report.bytes_after = sum(bank.num_bytes for bank in banks.values())
    return report


def _store(
    active: ActiveAdapter,
    layers: Mapping[str, MediatorLayer],
    rows: dict[str, dict[str, float]],
    removed: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    residual_density: float,
    report: CondenseReport,
) -> None:
    """Pack all deltas anew, then change the map and the deltas."""
    config = active.config
    density = density_of_residuals(config.density, residual_density)
    inner: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for group in groups.values() for name in group}
    fresh: list[tuple[MediatorLayer, str, SparseDelta]] = []
    for name, layer in layers.items():
        bank = layer.bank(active.name)
        for shared, group in groups.items():
            deltas = {stored: delta for stored in group if (delta := bank.stored(stored)) is not None}
            packed = shared_deltas(config, name, shared, deltas, density)
            for stored, delta in packed.items():
                if stored in deltas:
                    _compare(inner[stored], deltas[stored], delta, packed[shared])
                fresh.append((layer, stored, delta))
    report.fidelity = {name: round(a / (b * c) ** 0.5, 4) for name, (a, b, c) in inner.items() if b and c}
    if not (report.aliases or groups):
        return
    # Nothing fails from here on. The map is first: by it, a pass that began before sees that deltas have changed.
    if groups:
        active.begin_edition(active.name)
    active.put_router(active.router, list(config.expert_names or ()), config.experts, rows)
    for layer, stored, delta in fresh:
        layer.put_delta(active.name, stored, delta)
    for layer in layers.values():
        for stored in removed:
            layer.remove_delta(active.name, stored)
        layer.cache_merged_experts(())


def shared_deltas(
    config: MediatorSettings, layer: str, shared: str, deltas: Mapping[str, SparseDelta], thin: float
) -> dict[str, SparseDelta]:
    """One layer's deltas of a family, from those that are stored of its members; residuals of density ``thin``."""
    order = sorted(deltas)
    dense = {stored: deltas[stored].dense().cpu() for stored in order}
    biases = {stored: bias.cpu() for stored in order if (bias := deltas[stored].bias) is not None}
    dtype = storage_type(config)  # type: ignore[arg-type]
    packed = pack_family(config, f"{layer}.weight", shared, dense, biases, (config.density, thin), dtype)
    device = deltas[order[0]].mask.device
    return {stored: delta.to(device) for stored, delta in packed.items()}


def equal_deltas(first: SparseDelta, second: SparseDelta) -> bool:
    """Whether two deltas are the same bytes."""
    pairs = [(first.mask, second.mask), *((first.parts[name], second.parts[name]) for name in first.parts)]
    if first.bias is not None and second.bias is not None:
        pairs.append((first.bias, second.bias))
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _has_delta(banks: Mapping[str, LayerBank], name: str) -> bool:
    return any(bank.stored(name) is not None for bank in banks.values())


def _may_join(stored: str, rows: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a stored column is the whole delta of its experts, so that it may become a member of a family."""
    if stored.startswith("_") or stored == FALLBACK_EXPERT or ALWAYS in rows[stored]:
        return False
    names = set(members(rows, stored))
    return not any(names & set(row) for other, row in rows.items() if other != stored)


def _share_equal(
    banks: Mapping[str, LayerBank], rows: dict[str, dict[str, float]], report: CondenseReport
) -> list[str]:
    """Give equal experts one row of the map; names of the stored columns that are no longer used."""
    removed: list[str] = []
    candidates = sorted(stored for stored in rows if _may_join(stored, rows))
    for number, first in enumerate(candidates):
        for second in candidates[number + 1 :] if first not in removed else ():
            if second not in removed and all(_are_equal(bank, first, second) for bank in banks.values()):
                report.aliases |= dict.fromkeys(members(rows, second), first)
                rows[first] |= rows.pop(second)
                removed.append(second)
    return removed


def _are_equal(bank: LayerBank, first: str, second: str) -> bool:
    ours, theirs = bank.stored(first), bank.stored(second)
    if ours is None or theirs is None:
        return ours is theirs
    return equal_deltas(ours, theirs)


def _cosines(banks: Mapping[str, LayerBank], names: Sequence[str]) -> Tensor:
    """Cosines of deltas over up to 64 rows of each layer: (K, K) float64."""
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    for bank in banks.values():
        height = bank.shape[0]
        rows = torch.arange(min(height, _SAMPLED_ROWS)) * height // min(height, _SAMPLED_ROWS)
        sampled = [
            DeltaRows(delta).dense(rows.to(delta.mask.device)).cpu().double().flatten()
            if (delta := bank.stored(name)) is not None
            else torch.zeros(len(rows) * bank.shape[1], dtype=torch.float64)
            for name in names
        ]
        if sampled:
            matrix = torch.stack(sampled)
            gram += matrix @ matrix.T
    norms = gram.diagonal().sqrt().clamp_min(1e-30)
    return gram / norms / norms[:, None]


def _compare(sums: list[float], before: SparseDelta, rest: SparseDelta, shared: SparseDelta | None) -> None:
    """Add up inner products of what was stored and what is stored now."""
    ours = before.dense().cpu().double()
    theirs = rest.dense().cpu().double()
    if shared is not None:
        theirs = theirs + shared.dense().cpu().double()
    for place, (first, second) in enumerate(((ours, theirs), (ours, ours), (theirs, theirs))):
        sums[place] += float((first * second).sum())


def nearest_family(
    active: ActiveAdapter, read: Callable[[str], Tensor], min_cosine: float = MIN_COSINE
) -> tuple[str, float] | None:
    """The family that a new expert joins: the shared delta with the largest cosine, from ``min_cosine`` on.

    Args:
        active: with a column map or without.
        read: layer → the expert's whole delta (O, I) float32.
        min_cosine: least cosine.
    """
    names = sorted(families(active.config.column_map or {}))
    sums = {shared: [0.0, 0.0, 0.0] for shared in names}
    for name, layer in active.layers.items() if names else ():
        delta = read(name).double()
        for shared in names:
            stored = layer.bank(active.name).stored(shared)
            if stored is not None:
                dense = stored.dense().cpu().double()
                for place, (first, second) in enumerate(((dense, delta), (delta, delta), (dense, dense))):
                    sums[shared][place] += float((first * second).sum())
    cosines = {shared: inner / (own * theirs) ** 0.5 for shared, (inner, own, theirs) in sums.items() if own and theirs}
    best = max(cosines, key=lambda shared: cosines[shared], default=None)
    return None if best is None or cosines[best] < min_cosine else (best, cosines[best])


def find_equal(active: ActiveAdapter, deltas: Mapping[str, SparseDelta], candidates: Sequence[str]) -> str | None:
    """The first of some stored columns that holds these very deltas in all layers; None where none does.

    Args:
        active: the adapter.
        deltas: layer → delta.
        candidates: stored columns.
    """
    for stored in candidates:
        pairs = [(active.layers[name].bank(active.name).stored(stored), delta) for name, delta in deltas.items()]
        if pairs and all(known is not None and equal_deltas(known, delta) for known, delta in pairs):
            return stored
    return None
