"""Expert weights on their way from a caller to the layers: forms, routes, and the board that hands routes down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import RoutingError, UnsupportedError
from ..tables import unknown_name

RowSpec: TypeAlias = "str | Mapping[str, float] | None"
ExpertWeights: TypeAlias = "Tensor | str | Mapping[str, float] | Sequence[RowSpec] | None"
"""A (C,) or (B, C) tensor; a name or a dict name → weight for all rows; or one of these, or None, per row."""


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


def make_route(table: Tensor, columns: Sequence[str], may_merge: bool, execution: str | None) -> LayerRoute:
    """Group the rows of a batch by their mix.

    Args:
        table: (B, C)
        columns: names of the columns.
        may_merge: whether the mix may be written into the weights.
        execution: forced way of applying it, or None.
    """
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
    return LayerRoute(table, tuple(columns), groups, may_merge, execution, tuple(map(tuple, values)), gradient)


Rows: TypeAlias = tuple[tuple[float, ...], ...]
"""The distinct rows of a request's expert weights."""


class Pending(NamedTuple):
    """A request whose prompts are judged inside their own first forward pass."""

    input_ids: Tensor
    """(B, T)"""

    attention_mask: Tensor | None
    """(B, T)"""


class RequestBoard:
    """What a model hands down to its layers. One board belongs to one model; each thread sees its own entries.

    A *request* is a generation or a ``use_experts`` block: its expert weights hold for all its forward passes. The
    *route* is that of the forward pass at hand.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Rows] = []
        self._num_readers = 0
        self._merge_lock = threading.RLock()
        self._training_route: LayerRoute | None = None
        self.merged: tuple[str, Mix] | None = None
        """Adapter and mix that are merged into the weights until further notice; no prompt is routed then."""
        self.converted: Mix | None = None
        """The mix that is being converted to another PEFT method."""
        self.unmerge: Callable[[], None] = _nothing
        """Takes the merged mix out of all layers; set by the model."""

    def __reduce__(self) -> tuple[type[RequestBoard], tuple[()]]:
        # Copies and pickles of a model start with an empty board of their own.
        return (RequestBoard, ())

    @property
    def route(self) -> LayerRoute | None:
        """The route of this thread's forward pass.

        Recomputation under gradient checkpointing may run in a thread of autograd's own, which has no entry: it gets
        the route of the last forward pass that was recorded for gradients.
        """
        return getattr(self._local, "route", self._training_route)

    @route.setter
    def route(self, route: LayerRoute | None) -> None:
        self._local.route = route

    def keep_for_backward(self, route: LayerRoute | None) -> None:
        """Remember the route of a pass that gradients will flow through."""
        self._training_route = route

    @property
    def request(self) -> Tensor | None:
        """Expert weights (1 or B, C) of this thread's innermost request; None where there is none, or none yet."""
        entry = self._innermost
        return entry if isinstance(entry, Tensor) else None

    @property
    def pending(self) -> Pending | None:
        """This thread's innermost request, if its expert weights are still to be found."""
        entry = self._innermost
        return entry if isinstance(entry, Pending) else None

    @property
    def _innermost(self) -> Tensor | Pending | None:
        stack = getattr(self._local, "requests", None)
        return stack[-1] if stack else None

    def settle(self, expert_weights: Tensor) -> None:
        """Give this thread's pending request its expert weights (1 or B, C)."""
        with self._lock:
            self._open.append(_distinct_rows(expert_weights))
        self._local.requests[-1] = expert_weights

    def request_route(self, batch_size: int, making: tuple[list[str], bool, str | None]) -> LayerRoute:
        """The route of this thread's innermost request for a batch: one object, as long as nothing of it changes.

        Args:
            batch_size: rows of the batch.
            making: what ``make_route`` gets besides: columns, whether the mix may be folded, forced execution.
        """
        table = self._local.requests[-1]
        made = getattr(self._local, "made", None)
        if made is None or made[0] is not table or made[1] != (batch_size, making):
            route = make_route(expand_rows(table, batch_size), *making)
            self._local.made = made = (table, (batch_size, making), route)
        return made[2]

    @property
    def has_requests(self) -> bool:
        """Whether any thread has a request open."""
        return bool(self._open) or self._innermost is not None

    @property
    def has_one_mix(self) -> bool:
        """Whether all open requests, of all threads, want one and the same mix for all their rows."""
        with self._lock:
            return len(set(self._open)) == 1 and len(set(self._open[0])) == 1

    @contextmanager
    def open_request(self, expert_weights: Tensor | Pending) -> Iterator[None]:
        """Hold expert weights for the forward passes inside the block."""
        if not hasattr(self._local, "requests"):
            self._local.requests = []
        stack: list[Tensor | Pending] = self._local.requests
        stack.append(expert_weights)
        if isinstance(expert_weights, Tensor):
            with self._lock:
                self._open.append(_distinct_rows(expert_weights))
        try:
            yield
        finally:
            settled = stack.pop()
            self._local.made = None
            if isinstance(settled, Tensor):
                with self._lock:
                    self._open.remove(_distinct_rows(settled))

    @property
    def is_read(self) -> bool:
        """Whether somebody reads the backbone's weights now, so that no layer may merge a mix."""
        return self._num_readers > 0

    def as_readers_allow(self, route: LayerRoute) -> LayerRoute:
        """The route, without leave to merge while somebody reads the weights."""
        return route._replace(may_merge=False) if self._num_readers and route.may_merge else route

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep layers from merging inside the block. What is merged already, the reader takes out."""
        with self._merge_lock, self._lock:
            self._num_readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_readers -= 1

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Write to the backbone's weights inside the block; readers wait for its end.

        Raises:
            UnsupportedError: somebody reads them now.
        """
        with self._merge_lock:
            if self.is_read:
                raise UnsupportedError("the backbone's weights are being read (saved or copied) now; merge afterwards.")
            yield

    @contextmanager
    def no_route(self) -> Iterator[None]:
        """The backbone alone, for the forward passes inside the block."""
        before = getattr(self._local, "route", None)
        self._local.route = None
        try:
            yield
        finally:
            self._local.route = before


def _nothing() -> None:
    pass


def _distinct_rows(expert_weights: Tensor) -> Rows:
    return tuple(tuple(row) for row in expert_weights.detach().cpu().unique(dim=0).tolist())
