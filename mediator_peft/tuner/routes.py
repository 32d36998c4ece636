"""Expert weights on their way from a caller to the layers: forms, routes, and the board that hands routes down."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..bank.column_map import ColumnMap
from ..errors import RoutingError, UnsupportedError
from ..forking import renew_after_fork
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

    chosen: tuple[Tensor, tuple[str, ...]] | None = None
    """Expert weights and columns as the router or the caller gave them, where a column map made others of them."""

    @property
    def asked(self) -> tuple[Tensor, tuple[str, ...]]:
        """Expert weights and columns before any column map."""
        return (self.expert_weights, self.columns) if self.chosen is None else self.chosen

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
        if isinstance(mix[name], str) or not hasattr(mix[name], "__float__"):
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


def by_name(table: Tensor, columns: Sequence[str], now: Sequence[str]) -> Tensor:
    """Expert weights (B, C) of some columns, as a table of the columns that there are now.

    Raises:
        RoutingError: a row wants an expert that there is no more.
    """
    if tuple(columns) == tuple(now):
        return table
    used = [name for number, name in enumerate(columns) if bool((table[:, number] != 0).any())]
    gone = [name for name in used if name not in now]
    if gone:
        raise RoutingError(
            f"this request was routed to experts that were removed since: {gone}. Ask again; there are {list(now)}."
        )
    places = {name: number for number, name in enumerate(columns)}
    nothing = table.new_zeros(len(table))
    return torch.stack([table[:, places[name]] if name in places else nothing for name in now], dim=1)


def make_route(
    table: Tensor, columns: Sequence[str], may_merge: bool, execution: str | None, column_map: ColumnMap | None = None
) -> LayerRoute:
    """Group the rows of a batch by their mix.

    Args:
        table: (B, C)
        columns: names of the columns.
        may_merge: whether the mix may be written into the weights.
        execution: forced way of applying it, or None.
        column_map: from these columns to the stored ones; None where each is stored under its own name.
    """
    chosen = None
    if column_map is not None:
        chosen = (table, tuple(columns))
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
    return LayerRoute(table, tuple(columns), groups, may_merge, execution, key, gradient, chosen)


Rows: TypeAlias = tuple[tuple[float, ...], ...]
"""The distinct rows of a request's expert weights."""


class Pending(NamedTuple):
    """A request whose prompts are judged inside their own first forward pass."""

    input_ids: Tensor
    """(B, T)"""

    attention_mask: Tensor | None
    """(B, T)"""


class Request:
    """One generation or ``use_experts`` block: its expert weights, or the prompts they are still to be found for."""

    def __init__(self, expert_weights: Tensor | Pending, columns: Sequence[str]) -> None:
        self.expert_weights = expert_weights
        self.columns = tuple(columns)
        """Names of the columns of the weights, as they were when these were found."""
        self.made: tuple[Any, LayerRoute] | None = None
        """The last route that was made of it, and what of."""
        self.threads: frozenset[int | None] = frozenset()
        """Of a ``use_experts`` block: the threads that there were when it began."""

    @property
    def is_pending(self) -> bool:
        """Whether the weights are still to be found."""
        return isinstance(self.expert_weights, Pending)


class RequestBoard:
    """What a model hands down to its layers. One board belongs to one model.

    A *request* is a generation or a ``use_experts`` block: its expert weights hold for all its forward passes. The
    *route* is that of the forward pass at hand. Both are context variables: each thread and each asyncio task sees its
    own, and a copied context (a new task, ``asyncio.to_thread``) begins with those of its origin.
    """

    def __init__(self) -> None:
        self._requests: ContextVar[tuple[Request, ...]] = ContextVar("requests", default=())
        self._route: ContextVar[tuple[LayerRoute | None] | None] = ContextVar("route", default=None)
        self._lock = threading.Lock()
        # Request → its distinct rows, of all threads and tasks.
        self._open: dict[Request, Rows] = {}
        # Those whose prompts have not been judged yet.
        self._waiting: set[Request] = set()
        # Thread and name of whoever changes the model for all, once for each time that it has said so.
        self._alone: list[tuple[int, str]] = []
        # One entry a reader: the thread that it runs in.
        self._readers: list[int] = []
        self._merge_lock = threading.RLock()
        self._training_route: LayerRoute | None = None
        self._has_warned = False
        self.merged: tuple[str, Mix] | None = None
        """Adapter and mix that are merged into the weights until further notice; no prompt is routed then."""
        self.converted: Mix | None = None
        """The mix that is being converted to another PEFT method."""
        self.unmerge: Callable[[], None] = _nothing
        """Takes the merged mix out of all layers; set by the model."""
        renew_after_fork(self, rank=0)

    def locks(self) -> tuple[Any, ...]:
        """In the order in which they are taken."""
        return (self._merge_lock, self._lock)

    def renew_locks(self) -> None:
        """In a forked child: new locks, and no requests nor readers of threads that it does not have."""
        self._lock, self._merge_lock = threading.Lock(), threading.RLock()
        own = self._requests.get()
        self._open = {request: rows for request, rows in self._open.items() if request in own}
        self._waiting = {request for request in self._waiting if request in own}
        self._alone = [entry for entry in self._alone if entry[0] == threading.get_ident()]
        self._readers = [thread for thread in self._readers if thread == threading.get_ident()]

    def __reduce__(self) -> tuple[type[RequestBoard], tuple[()]]:
        # Copies and pickles of a model start with an empty board of their own.
        return (RequestBoard, ())

    @property
    def route(self) -> LayerRoute | None:
        """The route of the forward pass at hand.

        Recomputation under gradient checkpointing may run in a thread of autograd's own, which has no entry: it gets
        the route of the last forward pass that was recorded for gradients.
        """
        entry = self._route.get()
        return self._training_route if entry is None else entry[0]

    @route.setter
    def route(self, route: LayerRoute | None) -> None:
        self._route.set((route,))

    def keep_for_backward(self, route: LayerRoute | None) -> None:
        """Remember the route of a pass that gradients will flow through."""
        self._training_route = route

    @property
    def request(self) -> Request | None:
        """The innermost request at hand whose expert weights are known; None where there is none, or none yet."""
        entry = self._innermost
        return None if entry is None or entry.is_pending else entry

    @property
    def pending(self) -> Pending | None:
        """The innermost request at hand, if its expert weights are still to be found."""
        entry = self._innermost
        return entry.expert_weights if entry is not None and isinstance(entry.expert_weights, Pending) else None

    @property
    def _innermost(self) -> Request | None:
        requests = self._requests.get()
        return requests[-1] if requests else None

    def settle(self, expert_weights: Tensor, columns: Sequence[str]) -> None:
        """Give the pending request at hand its expert weights (1 or B, C)."""
        request, rows = self._requests.get()[-1], _distinct_rows(expert_weights)
        request.columns, request.expert_weights = tuple(columns), expert_weights
        with self._lock:
            self._waiting.discard(request)
            self._open[request] = rows

    def request_route(
        self, request: Request, batch_size: int, making: tuple[list[str], bool, str | None, ColumnMap | None]
    ) -> LayerRoute:
        """The route of a request for a batch: one object, as long as nothing of it changes.

        Args:
            request: whose expert weights are known.
            batch_size: rows of the batch.
            making: what ``make_route`` gets besides: columns, whether the mix may be folded, forced execution,
                column map.

        Raises:
            RoutingError: the request wants an expert that was removed since.
        """
        made = request.made
        if made is None or made[0] != (batch_size, making):
            table = by_name(request.expert_weights, request.columns, making[0])  # type: ignore[arg-type]
            made = request.made = ((batch_size, making), make_route(expand_rows(table, batch_size), *making))
        return made[1]

    @property
    def has_requests(self) -> bool:
        """Whether any thread or task has a request open."""
        return bool(self._open) or bool(self._waiting) or self._innermost is not None

    def _check_no_others(self, what: str) -> None:
        own = self._requests.get()
        others = [request for request in (*self._open, *self._waiting) if request not in own]
        if others:
            raise UnsupportedError(
                f"{what} changes the weights that {len(others)} generations or use_experts blocks of other threads or "
                "tasks compute with. Wait for their end."
            )

    def check_idle(self, what: str) -> None:
        """Refuse to write weights of the backbone or the bank while a mix may be merged into them.

        Raises:
            UnsupportedError: a request is open, or a mix is merged until further notice.
        """
        if self.merged is not None:
            raise UnsupportedError(
                f"{what} writes the backbone's weights, and a mix is merged: unmerge_adapter() first."
            )
        if self.has_requests:
            raise UnsupportedError(
                f"{what} writes the weights that a generation or a use_experts block computes with now. Wait for its "
                "end, or leave the block first."
            )

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """No other thread or task opens a request or begins a forward pass inside the block.

        Raises:
            UnsupportedError: one is open already, or another thread is in such a block.
        """
        entry = (threading.get_ident(), what)
        with self._lock:
            self._check_no_others(what)
            self.refuse_beside_others()
            self._alone.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._alone.remove(entry)

    def refuse_beside_others(self) -> None:
        """Refuse a request or a forward pass while another thread changes the model for all.

        Raises:
            UnsupportedError: one does.
        """
        # Asked at every pass: nearly always there is none.
        for thread, what in tuple(self._alone):
            if thread != threading.get_ident():
                raise UnsupportedError(f"another thread is in {what}() of this model now; it takes no requests.")

    def may_merge(self, request: Request) -> bool:
        """Whether the request is open, and all open requests have the same mix for all their rows."""
        with self._lock:
            all_rows = set(self._open.values())
            return request in self._open and len(all_rows) == 1 and len(set(next(iter(all_rows)))) == 1

    def warn_of_blocks_elsewhere(self) -> None:
        """Say once of a thread without a request that it was started inside another thread's ``use_experts`` block."""
        if self._has_warned or not self._open:
            return
        own = threading.get_ident()
        with self._lock:
            inside = [request for request in self._open if request.threads and own not in request.threads]
            self._has_warned = bool(inside)
        if inside:
            warnings.warn(
                "this thread was started inside a use_experts block of another thread, and does not see it: its "
                "prompts are routed. Use expert_weights=, open a block in this thread, or run "
                "contextvars.copy_context().run(function) in it.",
                stacklevel=2,
            )

    @contextmanager
    def open_request(
        self, expert_weights: Tensor | Pending, columns: Sequence[str], is_block: bool = False
    ) -> Iterator[None]:
        """Hold expert weights, with the names of their columns, for the forward passes inside the block.

        Args:
            expert_weights: (1 or B, C), or the prompts that they are still to be found for.
            columns: names of the columns.
            is_block: a block of the user's, not one generation.
        """
        request = Request(expert_weights, columns)
        if is_block:
            request.threads = frozenset(thread.ident for thread in threading.enumerate())
        rows = _distinct_rows(expert_weights) if isinstance(expert_weights, Tensor) else None
        with self._lock:
            self.refuse_beside_others()
            if rows is None:
                self._waiting.add(request)
            else:
                self._open[request] = rows
        self._requests.set((*self._requests.get(), request))
        try:
            yield
        finally:
            # A generator may be closed in another context than it was begun in: no token would fit there.
            mine = self._requests.get()
            self._requests.set(tuple(other for other in mine if other is not request))
            if request in mine and mine[-1] is not request:
                warnings.warn(
                    "use_experts blocks overlapped in one thread or task without one being inside the other, as those "
                    "of generators do: passes had the experts of the block that was opened last. Give each "
                    "generate() or forward pass its expert_weights= there, or run each generator in a task of its own.",
                    stacklevel=2,
                )
            request.made = None
            with self._lock:
                self._open.pop(request, None)
                self._waiting.discard(request)

    @property
    def is_read(self) -> bool:
        """Whether somebody reads the backbone's weights now, so that no layer may merge a mix."""
        return bool(self._readers)

    def as_readers_allow(self, route: LayerRoute) -> LayerRoute:
        """The route, without leave to merge while somebody reads the weights."""
        return route._replace(may_merge=False) if self._readers and route.may_merge else route

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep layers from merging inside the block. What is merged already, the reader takes out."""
        thread = threading.get_ident()
        with self._merge_lock, self._lock:
            self._readers.append(thread)
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(thread)

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
        before = self._route.get()
        self._route.set((None,))
        try:
            yield
        finally:
            self._route.set(before)


def _nothing() -> None:
    pass


def _distinct_rows(expert_weights: Tensor) -> Rows:
    return tuple(tuple(row) for row in expert_weights.detach().cpu().unique(dim=0).tolist())
