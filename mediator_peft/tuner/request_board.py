"""The board that hands the expert weights of requests down to the layers, as the route of each forward pass."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ..bank.column_map import ColumnMap
from ..errors import UnsupportedError
from ..forking import renew_after_fork
from .expert_weights import LayerRoute, Mix, as_columns, by_name, expand_rows, make_route

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
        self.columns = as_columns(columns)
        """Names and editions of the columns of the weights, as they were when these were found."""
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
        self._unrouted: ContextVar[bool] = ContextVar("unrouted", default=False)
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
        request.columns, request.expert_weights = as_columns(columns), expert_weights
        with self._lock:
            self._waiting.discard(request)
            self._open[request] = rows

    def request_route(
        self, request: Request, batch_size: int, making: tuple[Sequence[str], bool, str | None, ColumnMap | None, bool]
    ) -> LayerRoute:
        """The route of a request for a batch: one object, as long as nothing of it changes.

        Args:
            request: whose expert weights are known.
            batch_size: rows of the batch.
            making: what ``make_route`` gets besides: columns, whether the mix may be folded, forced execution,
                column map, whether weights are sharded.

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
    def no_route(self, correction: LayerRoute | None = None) -> Iterator[None]:
        """The backbone alone, for the forward passes inside the block.

        Args:
            correction: what is added to a quantised backbone; None for nothing.
        """
        before, was_unrouted = self._route.get(), self._unrouted.get()
        self._route.set((correction,))
        self._unrouted.set(True)
        try:
            yield
        finally:
            self._route.set(before)
            self._unrouted.set(was_unrouted)

    @property
    def is_unrouted(self) -> bool:
        """Whether a :meth:`no_route` block is around."""
        return self._unrouted.get()


def _nothing() -> None:
    pass


def _distinct_rows(expert_weights: Tensor) -> Rows:
    return tuple(tuple(row) for row in expert_weights.detach().cpu().unique(dim=0).tolist())
