"""One routed linear layer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bank.layer_bank import LayerBank
from ..errors import UnsupportedError
from . import execution
from .expert_weights import LayerRoute
from .few_rows import DeviceRows, FewRows
from .merged_weight import MergedWeight, mixed_bias, mixed_delta, plain_weight
from .merged_weight_cache import MergedWeightCache
from .quantized import is_plain
from .requests import RouteBoard

_NOT_COPIED = ("_lock", "_fold", "_kept", "_few_rows")


class MediatorLayer(nn.Module, BaseTunerLayer):
    r"""A linear layer whose output is :math:`(D + \sum_k w_k(x) S_k)\, x`.

    The expert weights come down from the model on the board; the layer never looks up.
    """

    adapter_layer_names = ("mediator_bank",)
    other_param_names = ()
    base_layer: nn.Linear
    """``nn.Linear``, its quantised kin, or ``Conv1D``, which differs in the orientation of its weight alone."""

    def __init__(self, base_layer: nn.Linear, board: RouteBoard) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mediator_bank = nn.ModuleDict()
        self._board = board
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._start()

    def _start(self) -> None:
        # One lock a layer: nobody computes with a weight while somebody else writes to it.
        self._lock = threading.RLock()
        self._merged_weight = MergedWeight(self.base_layer)
        self._kept = MergedWeightCache()
        self._few_rows: FewRows | DeviceRows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        base = self.base_layer
        if isinstance(base, Conv1D):
            return (base.weight.shape[1], base.weight.shape[0])
        return (base.out_features, base.in_features)

    def add_bank(self, adapter_name: str, coding: str) -> LayerBank:
        """An empty bank for one adapter."""
        bank = LayerBank(self.shape, coding, getattr(self.base_layer, "bias", None) is not None)
        self.mediator_bank[adapter_name] = bank
        return bank

    def bank(self, adapter_name: str) -> LayerBank:
        """One adapter's deltas."""
        bank = self.mediator_bank[adapter_name]
        if not isinstance(bank, LayerBank):
            raise TypeError(f"{adapter_name!r} is no bank")
        return bank

    def _active_bank(self) -> LayerBank | None:
        for name in self.active_adapters:
            if name in self.mediator_bank:
                return self.bank(name)
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Locks, and weights that change between steps, are nothing for a compiled graph: it breaks around the layer.
        if torch.compiler.is_compiling():
            return self._outside_graph(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    @torch.compiler.disable
    def _outside_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In a decode step of a small model every microsecond of this counts: looked up past nn.Module's own way.
        route = None if self._disable_adapters or self.merged_adapters else self._board.route
        base_layer: Any = self._modules["base_layer"]
        with self._lock:
            if route is not None:
                if self._merged_weight.route is route:
                    return base_layer(x, *args, **kwargs)
                if self._few_rows is not None and self._few_rows.route is route and self._few_rows.is_for(x):
                    self._merged_weight.switch(None, ())
                    return self._few_rows(x)
            return self._first_pass(x, route, *args, **kwargs)

    def _first_pass(self, x: Tensor, route: LayerRoute | None, *args: Any, **kwargs: Any) -> Tensor:
        """A forward pass that could not go on as the last one went."""
        bank = self._active_bank()
        if route is None or bank is None:
            if not self.merged:
                self._merged_weight.switch(None, ())
            return self.base_layer(x, *args, **kwargs)
        self._few_rows = execution.few_rows(x, self.base_layer, bank, route, self._kept)
        if self._few_rows is not None:
            self._merged_weight.switch(None, ())
            return self._few_rows(x)
        return execution.apply(x, self.base_layer, bank, route, self._merged_weight, self._kept)

    def forget_steps(self) -> None:
        """Drop what was kept for further steps under the last route."""
        self._few_rows = None
        self._merged_weight.route = None

    def let_go(self, experts: Sequence[str]) -> None:
        """Drop copies of deltas that were brought to where the layer computes."""
        with self._lock:
            for bank in self.mediator_bank.values():
                for name in experts:
                    bank.let_go(name)  # type: ignore[operator]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what the last active adapter left is taken out first."""
        self.cache_merged_experts(())
        super().set_adapter(*args, **kwargs)

    def unmerge(self) -> None:
        """Bring the weight back to the backbone's, bit for bit."""
        with self._lock:
            self.forget_steps()
            self._merged_weight.switch(None, ())

    def cache_merged_experts(self, experts: Sequence[str]) -> None:
        """Hold the whole weights of these experts beside the backbone's, and of no others.

        Raises:
            UnsupportedError: the weight is quantised or offloaded.
        """
        bank = self._active_bank()
        with self._lock:
            self.unmerge()
            if not experts or bank is None:
                self._kept.drop()
                return
            if not is_plain(self.base_layer):
                raise UnsupportedError(
                    "weights of experts cannot be kept beside a quantised or offloaded backbone: they would be as "
                    "large as the unquantised one's. Load the backbone unquantised and whole."
                )
            self._kept.keep(experts, self.base_layer, bank)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the weights that ``cache_merged_experts`` holds."""
        return self._kept.num_bytes

    @property
    def merged_bytes(self) -> int:
        """Bytes held to bring the weight back to the backbone's; 0 while nothing is folded in."""
        return self._merged_weight.num_bytes

    def get_delta_weight(self, mix: tuple[tuple[str, float], ...]) -> Tensor | None:
        """``sum_k w_k S_k`` (O, I) float32; None where no column of the mix has a delta here."""
        bank = self._active_bank()
        return None if bank is None else mixed_delta(bank, mix)

    def merge_mix(self, mix: tuple[tuple[str, float], ...], safe_merge: bool = False) -> None:
        """Write a mix into the backbone's weight for good.

        Raises:
            UnsupportedError: the weight is quantised or offloaded.
        """
        bank = self._active_bank()
        base = self.base_layer
        if not is_plain(base):
            raise UnsupportedError(
                "a quantised weight cannot take a mix (rounding it again would lose the delta), nor one offloaded. "
                "Load the backbone unquantised and whole to merge."
            )
        self.cache_merged_experts(())
        delta = None if bank is None else mixed_delta(bank, mix)
        if bank is None or delta is None:
            return
        weight = plain_weight(base)
        merged = delta.add_(weight).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise UnsupportedError("the merged weight has infinite values; its dtype cannot hold this mix.")
        weight.copy_(merged)
        shift = mixed_bias(bank, mix)
        if shift is not None:
            base.bias.data.copy_((base.bias.data.float() + shift).to(base.bias.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unmerge()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> MediatorLayer:
        kept = self._kept.names
        self.cache_merged_experts(())
        super()._apply(fn, recurse)
        # Made anew from what moved, so that a change of dtype rounds once.
        self.cache_merged_experts(kept)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.unmerge()
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def __repr__(self) -> str:
        return "mediator." + super().__repr__()
