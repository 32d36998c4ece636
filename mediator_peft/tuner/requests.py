"""Which route applies where: one per thread and request, never global."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from .expert_weights import LayerRoute, expand_rows, make_route

Mix = tuple[tuple[float, ...], ...]


class Pending(NamedTuple):
    """A request whose prompts are judged inside their own first forward pass."""

    input_ids: Tensor
    """(B, T)"""

    attention_mask: Tensor | None
    """(B, T)"""


class RouteBoard:
    """What a model hands down to its layers. One board belongs to one model; each thread sees its own entries.

    A *request* is a generation or a ``use_experts`` block: its expert weights hold for all its forward passes. The
    *route* is that of the forward pass at hand.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Mix] = []
        self._training_route: LayerRoute | None = None

    def __reduce__(self) -> tuple[type[RouteBoard], tuple[()]]:
        # Copies and pickles of a model start with an empty board of their own.
        return (RouteBoard, ())

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
            self._open.append(_mix_of(expert_weights))
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
                self._open.append(_mix_of(expert_weights))
        try:
            yield
        finally:
            settled = stack.pop()
            self._local.made = None
            if isinstance(settled, Tensor):
                with self._lock:
                    self._open.remove(_mix_of(settled))

    @contextmanager
    def no_route(self) -> Iterator[None]:
        """The backbone alone, for the forward passes inside the block."""
        before = getattr(self._local, "route", None)
        self._local.route = None
        try:
            yield
        finally:
            self._local.route = before


def _mix_of(expert_weights: Tensor) -> Mix:
    return tuple(tuple(row) for row in expert_weights.detach().cpu().unique(dim=0).tolist())
