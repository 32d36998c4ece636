"""From what the router chooses to what the bank stores: ``u = M w + b``.

A *stored column* is one delta of each routed layer. Mostly each expert has its own. Where experts are equal, they share
one (an *alias*); experts of one *family* share a delta and have thin residuals of their own; an *always-on* delta has a
weight whatever the expert weights are, and so has the correction of a quantised backbone:

>>> family = {"_family 1": {"a": 1.0, "b": 1.0}, "a": {"a": 1.0}, "b": {"b": 1.0}, "_safety": {"*": 0.1}}
>>> ColumnMap.of(family, ["a", "b"]).apply(torch.tensor([[0.7, 0.3]]))
tensor([[1.0000, 0.7000, 0.3000, 0.1000]])

Layers, kernels and the residency of experts see stored columns alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ..config import ALWAYS, FAMILY_PREFIX
from ..deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


Rows: TypeAlias = Mapping[str, Mapping[str, float]]
"""Stored column → column of the expert weights → entry of M; under ``ALWAYS`` the entry of b."""


class ColumnMap(NamedTuple):
    """An affine map of expert weights, with names for both sides."""

    inputs: tuple[str, ...]
    """Columns of the expert weights, C."""

    columns: tuple[str, ...]
    """Stored columns, S."""

    rows: tuple[tuple[tuple[int, float], ...], ...]
    """Of each stored column, (number of an input, entry of M) where that is not 0."""

    constants: tuple[float, ...]
    """b, (S,)"""

    @classmethod
    def of(cls, rows: Rows, inputs: Sequence[str]) -> ColumnMap:
        """A map from its saved form."""
        # Sums do not depend on the order of the experts.
        entries = [
            tuple((inputs.index(name), row[name]) for name in sorted(row) if name != ALWAYS and row[name] != 0)
            for row in rows.values()
        ]
        constants = tuple(float(row.get(ALWAYS, 0.0)) for row in rows.values())
        return cls(tuple(inputs), tuple(rows), tuple(entries), constants)

    def apply(self, table: Tensor) -> Tensor:
        """``w M^T + b``, term by term: (B, C) → (B, S) float32."""
        columns = []
        for entries, constant in zip(self.rows, self.constants, strict=True):
            terms = [table[:, number] if entry == 1.0 else table[:, number] * entry for number, entry in entries]
            total = sum(terms[1:], terms[0]) if terms else torch.zeros_like(table[:, 0])
            columns.append(total + constant if constant else total)
        return torch.stack(columns, dim=1)


def identity_rows(columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """The map under which every expert has a delta of its own."""
    return {name: {name: 1.0} for name in columns}


def without_input(rows: Rows, name: str) -> dict[str, dict[str, float]]:
    """The map without one column of the expert weights; stored columns that nothing uses any more are left out."""
    fewer = {stored: {other: entry for other, entry in row.items() if other != name} for stored, row in rows.items()}
    return {stored: row for stored, row in fewer.items() if row}


def members(rows: Rows, stored: str) -> list[str]:
    """Columns of the expert weights that use a stored column."""
    return [name for name in rows[stored] if name != ALWAYS]


def families(rows: Rows) -> dict[str, list[str]]:
    """Stored column → its members, of each family."""
    return {stored: members(rows, stored) for stored in rows if stored.startswith(FAMILY_PREFIX)}


def new_family(rows: Rows) -> str:
    """A name for one more family."""
    number = 1
    while f"{FAMILY_PREFIX}{number}" in rows:
        number += 1
    return f"{FAMILY_PREFIX}{number}"


def average_linkage(cosines: ArrayLike, names: Sequence[str], least: float) -> list[list[str]]:
    """Groups of experts whose mean pairwise cosine is at least ``least``: clusters by average linkage.

    The two clusters with the highest mean cosine between their members are joined, as long as it reaches ``least``.
    Ties go to the names that come first, so the order of the experts changes nothing.

    Args:
        cosines: (K, K), symmetric.
        names: K of them.
        least: in [-1, 1].

    Returns:
        Names of each cluster, sorted; clusters of one are among them.
    """
    order = sorted(range(len(names)), key=lambda number: names[number])
    clusters = [[number] for number in order]
    table = np.asarray(cosines, dtype=np.float64)
    while len(clusters) > 1:
        best: tuple[float, int, int] | None = None
        for first in range(len(clusters)):
            for second in range(first + 1, len(clusters)):
                mean = float(table[clusters[first]][:, clusters[second]].mean())
                if best is None or mean > best[0] + 1e-12:
                    best = (mean, first, second)
        assert best is not None
        if best[0] < least:
            break
        _, first, second = best
        clusters[first] = clusters[first] + clusters.pop(second)
    return [sorted(names[number] for number in cluster) for cluster in clusters]
