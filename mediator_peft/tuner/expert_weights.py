"""Expert weights as callers give them, as a table, and as one forward pass of the layers takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..bank.column_map import ColumnMap
from ..errors import RoutingError
from ..tables import unknown_name

RowSpec: TypeAlias = "str | Mapping[str, float] | None"
ExpertWeights: TypeAlias = "Tensor | str | Mapping[str, float] | Sequence[RowSpec] | None"
"""A (C,) or (B, C) tensor; a name or a dict name → weight for all rows; or one of these, or None, per row."""


class Columns(tuple[str, ...]):
    """Names of the columns of expert weights, and the edition of each: who is removed and added again is another.

    Equal where names and editions are; a plain sequence of names has no editions, and is equal where the names are.
    """

    editions: tuple[object, ...] = ()
    """One a column: the adapter's name, and how often what it held under the column's name was taken away."""

    @classmethod
    def of(cls, names: Iterable[str], editions: Iterable[object]) -> Columns:
        """Columns with an edition for each name."""
        made = cls(names)
        made.editions = tuple(editions)
        return made

    def edition(self, name: str) -> object:
        """That of a column; None where it is not known."""
        return dict(zip(self, self.editions, strict=False)).get(name)

    def __eq__(self, other: object) -> bool:
        is_same = isinstance(other, (tuple, list)) and tuple.__eq__(self, tuple(other))
        return is_same and (not isinstance(other, Columns) or self.editions == other.editions)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


Mix: TypeAlias = tuple[tuple[str, float], ...]
"""(column, weight) of each column that takes part; empty for the backbone alone."""


class Group(NamedTuple):
    """Rows of a batch that share one mix."""

    rows: Tensor | None
    """(n,) row numbers; None for all rows of the batch."""

    mix: Mix


class WeightGradient:
    """Gradient of a loss by the expert weights of one forward pass, as the layers find it."""

    def __init__(self, expert_weights: Tensor) -> None:
        self._total = torch.zeros_like(expert_weights, requires_grad=False)
        self.is_anchored = False
        """Whether somebody takes it on the way back."""

    def add(self, part: Tensor) -> None:
        """Add one layer's part, (B, C)."""
        self._total += part.to(self._total)

    def take(self) -> Tensor:
        """The sum (B, C), which starts from zero again."""
        total, self._total = self._total, torch.zeros_like(self._total)
        return total


class LayerRoute(NamedTuple):
    """What a layer needs to know of one forward pass."""

    expert_weights: Tensor
    """(B, C) float32"""

    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    may_merge: bool
    """Whether the mix may be written into the weights for the time being."""

    execution: str | None
    """``"merged"``, ``"sparse"`` or ``"dense"`` where the caller forces one."""

    key: tuple[tuple[float, ...], ...]
    """The table as plain numbers: equal keys, equal routes."""

    gradient: WeightGradient | None = None
    """Where layers add their gradient by the expert weights, if these have one."""

    chosen: tuple[Tensor, Columns] | None = None
    """Expert weights and columns as the router or the caller gave them, before any column map; None where these are
    those of the layers."""

    is_sharded: bool = False
    """Whether weights are only gathered for the pass at hand: a layer may call them, and read a copy."""

    @property
    def asked(self) -> tuple[Tensor, Columns]:
        """Expert weights and columns before any column map."""
        return (self.expert_weights, as_columns(self.columns)) if self.chosen is None else self.chosen

    @property
    def is_differentiable(self) -> bool:
        """Whether gradients flow to the expert weights."""
        return torch.is_grad_enabled() and self.expert_weights.requires_grad


def expert_weight_rows(spec: ExpertWeights, columns: Sequence[str], num_experts: int) -> Tensor:
    """Expert weights as a table.

    Args:
        spec: as the caller gave them; None is the backbone alone.
        columns: names of the columns, C of them.
        num_experts: how many of these are experts; a tensor may leave out the fallback's column.

    Returns:
        (1, C) where all rows share one mix, else (B, C); float32.

    Raises:
        RoutingError: a name is unknown, a shape does not fit, or a number is not finite.
    """
    if isinstance(spec, Tensor):
        if spec.is_complex():
            raise RoutingError(f"expert weights must be real numbers, got {spec.dtype}.")
        table = spec if spec.ndim == 2 else spec.unsqueeze(0)
        if table.ndim != 2 or table.shape[1] not in (len(columns), num_experts):
            raise RoutingError(
                f"expert weights have shape {tuple(spec.shape)}; give (C,) or (B, C) with C = {len(columns)}, the "
                f"columns {list(columns)}."
            )
        table = torch.nn.functional.pad(table.float(), (0, len(columns) - table.shape[1]))
    elif spec is None or isinstance(spec, (str, Mapping)):
        table = torch.tensor([_row(spec, columns)])
    else:
        if not isinstance(spec, Iterable):
            raise RoutingError(f"expert weights must be a name, a dict, a tensor, or one of these a row, got {spec!r}.")
        rows = list(spec)
        if not rows:
            raise RoutingError("expert weights are an empty list; give one entry for each prompt.")
        table = torch.tensor([_row(row, columns) for row in rows])
    if not torch.isfinite(table).all():
        raise RoutingError("expert weights must be finite numbers.")
    return table


def _row(spec: RowSpec, columns: Sequence[str]) -> list[float]:
    if spec is None:
        return [0.0] * len(columns)
    mix = {spec: 1.0} if isinstance(spec, str) else spec
    if not isinstance(mix, Mapping):
        raise RoutingError(f"a row of expert weights must be a name, a dict name -> weight or None, got {spec!r}.")
    for name in mix:
        if name not in columns:
            raise RoutingError(unknown_name(name, columns, "expert"))
        try:
            number = None if isinstance(mix[name], str) else float(mix[name])
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise RoutingError(f"the weight of expert {name!r} must be a number, got {mix[name]!r}.")
    return [float(mix.get(name, 0.0)) for name in columns]


def expand_rows(table: Tensor, batch_size: int) -> Tensor:
    """Expert weights for a batch that may hold several sequences a prompt (beams, ``num_return_sequences``).

    Args:
        table: (1, C) or (B, C)
        batch_size: rows of the batch, a multiple of B; the sequences of a prompt stand together.

    Returns:
        (batch_size, C)

    Raises:
        RoutingError: the numbers do not fit.
    """
    if len(table) == 1:
        return table.expand(batch_size, -1)
    if batch_size % len(table):
        raise RoutingError(f"expert weights have {len(table)} rows, the batch has {batch_size}.")
    return table.repeat_interleave(batch_size // len(table), dim=0)


def as_columns(names: Sequence[str]) -> Columns:
    """Names of columns, their editions kept where they are known."""
    return names if isinstance(names, Columns) else Columns(names)


def by_name(table: Tensor, columns: Sequence[str], now: Sequence[str]) -> Tensor:
    """Expert weights (B, C) of some columns, as a table of the columns that there are now.

    Raises:
        RoutingError: a row wants an expert that there is no more, or that is another by now.
    """
    then, now = as_columns(columns), as_columns(now)
    if then == now:
        return table
    used = [name for number, name in enumerate(then) if bool((table[:, number] != 0).any())]
    gone = [name for name in used if name not in now]
    if gone:
        raise RoutingError(
            f"this request was routed to experts that were removed since: {gone}. Ask again; there are {list(now)}."
        )
    others = [name for name in used if then.editions and now.editions and then.edition(name) != now.edition(name)]
    if others:
        raise RoutingError(
            "this request, or the cache that it continues, was computed with experts that were replaced since: "
            f"{others}. Ask again, with a new cache."
        )
    places = {name: number for number, name in enumerate(then)}
    nothing = table.new_zeros(len(table))
    return torch.stack([table[:, places[name]] if name in places else nothing for name in now], dim=1)


def make_route(
    table: Tensor,
    columns: Sequence[str],
    may_merge: bool,
    execution: str | None,
    column_map: ColumnMap | None = None,
    is_sharded: bool = False,
) -> LayerRoute:
    """Group the rows of a batch by their mix.

    Args:
        table: (B, C)
        columns: names of the columns.
        may_merge: whether the mix may be written into the weights.
        execution: forced way of applying it, or None.
        column_map: from these columns to the stored ones; None where each is stored under its own name.
        is_sharded: whether weights are only gathered for a pass, so that none may be written to.
    """
    asked = (table, as_columns(columns))
    if column_map is not None:
        table, columns = column_map.apply(table), column_map.columns
    values = table.detach().cpu().tolist()
    rows_of: dict[tuple[float, ...], list[int]] = {}
    for row, weights in enumerate(values):
        rows_of.setdefault(tuple(weights), []).append(row)
    groups = tuple(
        Group(
            None if len(rows_of) == 1 else torch.tensor(rows, device=table.device),
            tuple((name, weight) for name, weight in zip(columns, weights, strict=True) if weight != 0),
        )
        for weights, rows in rows_of.items()
    )
    has_gradient = torch.is_grad_enabled() and table.requires_grad
    gradient = WeightGradient(table) if has_gradient else None
    key = tuple(map(tuple, values))
    may_merge = may_merge and not is_sharded
    return LayerRoute(table, tuple(columns), groups, may_merge, execution, key, gradient, asked, is_sharded)
