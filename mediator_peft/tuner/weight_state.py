"""The weight that a routed layer computes with, and how its forward passes go on from one step to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.layer_bank import LayerBank
from ..errors import UnsupportedError
from ..forking import renew_after_fork
from . import execution
from .execution import ShortWay, is_hooked
from .expert_weights import LayerRoute
from .merged_weight import MergedWeight, MergedWeightCache
from .request_board import RequestBoard


class WeightState:
    """Lock and state of one layer's weight; modules that share the weight share this.

    Args:
        base_layer: has the weight.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        self.lock: Any = threading.RLock()
        """Nobody computes with a weight while somebody else writes to it."""
        self._is_lock_shared = False
        self.merged = MergedWeight(base_layer)
        """The mix that is written into the weight now."""
        self.cached = MergedWeightCache()
        """Whole weights of hot experts beside it."""
        renew_after_fork(self)

    def share_lock(self, lock: Any) -> None:
        """Use the lock of an owner, which renews it after a fork."""
        self.lock, self._is_lock_shared = lock, True

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return () if self._is_lock_shared else (self.lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        if not self._is_lock_shared:
            self.lock = threading.RLock()

    def restore(self) -> None:
        """Bring the weight back to the backbone's, bit for bit."""
        self.merged.switch(None, ())


class LayerSteps:
    """Forward passes of one module, of which a step goes on as the last one went where it may.

    Args:
        state: of the weight that the module computes with.
        board: of the model.
    """

    def __init__(self, state: WeightState, board: RequestBoard) -> None:
        self._state, self._board = state, board
        self.short_way: ShortWay | None = None
        """What was kept for further steps under one route."""

    def next(self, x: Tensor, base_layer: Any, route: LayerRoute) -> Tensor | None:
        """A forward pass that goes on as the last one went; None where it cannot.

        Args:
            x: (B, ..., I), or (B * T, I) where a model flattens its batch.
            base_layer: the backbone's layer.
            route: of this pass.

        Returns:
            (B, ..., O) or (B * T, O)
        """
        state = self._state
        with state.lock:
            if state.merged.route is route:
                if type(base_layer) is not nn.Linear or is_hooked(base_layer):
                    return base_layer(x)
                parameters = base_layer._parameters
                return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
            short_way = self.short_way
            if short_way is not None and short_way.route is route and short_way.is_for(x):
                state.restore()
                return short_way(x)
        return None

    def first(
        self, x: Tensor, base_layer: Any, bank: LayerBank | None, route: LayerRoute | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A forward pass that could not go on as the last one went; the caller holds the lock.

        Args:
            x: as in :meth:`next`.
            base_layer: the backbone's layer.
            bank: the active adapter's deltas of the layer; None where it has none.
            route: of this pass; None for the backbone alone.
            *args: for a base layer without deltas.
            **kwargs: likewise.

        Raises:
            UnsupportedError: the deltas were offloaded.
        """
        state = self._state
        if route is None or bank is None:
            state.restore()
            return base_layer(x, *args, **kwargs)
        route = self._board.as_readers_allow(route)
        if bank.device.type == "meta":
            raise UnsupportedError(
                "the deltas of this layer were offloaded. Offload without buffers (offload_buffers=False), and limit "
                "their memory with load_mediator(max_resident_experts=...)."
            )
        self.short_way = execution.short_way(x, base_layer, bank, route, state.cached)
        if self.short_way is not None:
            state.restore()
            return self.short_way(x)
        return execution.apply(x, base_layer, bank, route, state.merged, state.cached)


def copy_if_in_use(
    state: dict[str, Any], prefix: str, names: Iterable[str], board: RequestBoard, keep_vars: bool
) -> None:
    """In a state dict, put copies in the place of tensors that a mix may be merged into later.

    Args:
        state: key → tensor, changed in place while requests are open.
        prefix: of the keys.
        names: what follows it.
        board: of the model.
        keep_vars: the caller wants the parameters themselves.
    """
    if keep_vars or not board.has_requests:
        return
    for name in names:
        if isinstance(state.get(prefix + name), Tensor):
            state[prefix + name] = state[prefix + name].clone()
