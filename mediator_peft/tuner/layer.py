"""Routed layers: a linear layer with the deltas of its experts."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bank.layer_bank import LayerBank
from ..bank.sparse_delta import SparseDelta
from ..errors import RoutingError, UnsupportedError
from .execution import LayerSteps, is_hooked
from .expert_weights import LayerRoute, Mix
from .merged_weight import (
    WeightState,
    copy_if_in_use,
    is_plain,
    mixed_bias,
    mixed_delta,
    mixed_weight,
    plain_weight,
)
from .quantized import device_of, readable_weight
from .request_board import RequestBoard

_NOT_COPIED = ("weight_state", "steps", "_snapshot")


class MediatorLayer(nn.Module, BaseTunerLayer):
    r"""A linear layer whose output is :math:`(D + \sum_k w_k(x) S_k)\, x`.

    The expert weights come down from the model on the board; the layer never looks up.
    """

    adapter_layer_names = ("mediator_bank",)
    other_param_names = ()
    base_layer: nn.Linear
    """``nn.Linear``, its quantised kin, or ``Conv1D``, which differs in the orientation of its weight alone."""

    def __init__(self, base_layer: nn.Linear, board: RequestBoard) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mediator_bank = nn.ModuleDict()
        self.board = board
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.weight_is_read = False
        """Whether the module around the layer also computes with its weight, past the layer's forward pass."""
        self._start()

    def _start(self) -> None:
        self.weight_state = WeightState(self.base_layer)
        self.steps = LayerSteps(self.weight_state, self.board)
        self._snapshot: weakref.ref[nn.Module] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        base = self.base_layer
        if isinstance(base, Conv1D):
            return (base.weight.shape[1], base.weight.shape[0])
        return (base.out_features, base.in_features)

    @property
    def is_transposed(self) -> bool:
        """Whether checkpoints have the weight as (I, O)."""
        return isinstance(self.base_layer, Conv1D)

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

    @property
    def active_bank(self) -> LayerBank | None:
        """Deltas of the active adapter; None where it has none for the layer."""
        for name in self.active_adapters:
            if name in self.mediator_bank:
                return self.bank(name)
        return None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; where the module around computes with it, that of the mix of the pass under way.

        Raises:
            UnsupportedError: the rows of the batch have different mixes, so there is no one weight.
        """
        mixed = self._mix_for_reader()
        base: Any = self.base_layer
        if mixed is None:
            return base.weight
        weight = readable_weight(base)
        route = self.board.route
        weight = mixed_weight(weight.clone() if route is not None and route.is_sharded else weight, *mixed)
        return weight.T if isinstance(base, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """As :attr:`weight`."""
        mixed = self._mix_for_reader()
        base: Any = self.base_layer
        shift = None if mixed is None else mixed_bias(*mixed)
        return base.bias if shift is None else (base.bias.float() + shift).to(base.bias.dtype)

    def _mix_for_reader(self) -> tuple[LayerBank, Mix] | None:
        """Bank and mix of the pass under way, where the module around computes with the weight."""
        if not self.weight_is_read or self._disable_adapters or self.merged_adapters:
            return None
        self.unmerge()
        route, bank = self.board.route, self.active_bank
        if route is None or bank is None:
            return None
        if len(route.groups) > 1:
            raise UnsupportedError(
                "this model takes the weight of a routed layer past the layer's own forward pass, so all prompts of a "
                "batch must have the same expert weights. Run them one by one, or leave the layer out with "
                "target_modules."
            )
        return bank, route.groups[0].mix

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In a decode step of a small model every microsecond of a layer counts, and torch's way of calling a module
        # takes several: it is gone past where the layer goes on as in the step before and nothing is hooked to it.
        if not (args or kwargs or is_hooked(self) or torch.compiler.is_compiling()):
            result = self._next_step(x)
            if result is not None:
                return result
        return super().__call__(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        # Locks, and weights that change between steps, are nothing for a compiled graph: it breaks around the layer.
        if torch.compiler.is_compiling():
            return self._outside_graph(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    @torch.compiler.disable
    def _outside_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = None if args or kwargs else self._next_step(x)
        if result is not None:
            return result
        with self.weight_state.lock:
            return self._first_pass(x, None if self._disable_adapters else self.board.route, *args, **kwargs)

    def _next_step(self, x: Tensor) -> Tensor | None:
        route = None if self._disable_adapters or self.merged_adapters else self.board.route
        return None if route is None else self.steps.next(x, self._modules["base_layer"], route)

    def _first_pass(self, x: Tensor, route: LayerRoute | None, *args: Any, **kwargs: Any) -> Tensor:
        return self.steps.first(x, self.base_layer, self.active_bank, route, *args, **kwargs)

    def forget_steps(self) -> None:
        """Drop what was kept for further steps under the last route."""
        self.steps.short_way = None
        self.weight_state.merged.route = None

    def put_delta(self, adapter_name: str, expert: str, delta: SparseDelta) -> None:
        """Set one expert's delta, while other threads answer; whole weights that were kept of it are dropped."""
        with self.weight_state.lock:
            if any(name == expert for mix in self.weight_state.cached.mixes for name, _ in mix):
                self.cache_merged_experts(())
            self.steps.short_way = None
            self.bank(adapter_name).put(expert, delta)

    def remove_delta(self, adapter_name: str, expert: str) -> None:
        """Drop one expert's delta and all kept weights, while other threads answer."""
        with self.weight_state.lock:
            self.cache_merged_experts(())
            self.bank(adapter_name).remove(expert)

    def let_go(self, experts: Sequence[str]) -> None:
        """Drop copies of deltas that were brought to where the layer computes."""
        with self.weight_state.lock:
            for bank in self.mediator_bank.values():
                for name in experts:
                    bank.let_go(name)  # type: ignore[operator]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what the last active adapter left is taken out first."""
        self.cache_merged_experts(())
        super().set_adapter(*args, **kwargs)

    def unmerge(self) -> None:
        """Bring the weight back to the backbone's, bit for bit; of a merged adapter, all layers' weights."""
        if self.merged_adapters:
            warnings.warn("the merged mix is taken out again: this needs the backbone's own weights.", stacklevel=2)
            self.board.unmerge()
        with self.weight_state.lock:
            self.forget_steps()
            self.weight_state.restore()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The backbone's own weight inside the block: no other thread computes with the layer or merges into it."""
        self.unmerge()
        with self.weight_state.lock:
            # Another thread may have merged between the two.
            self.forget_steps()
            self.weight_state.restore()
            yield

    def cache_merged_experts(self, mixes: Sequence[Mix]) -> None:
        """Hold the whole weights of these experts' mixes beside the backbone's, and of no others.

        Raises:
            UnsupportedError: the weight is quantised or offloaded.
        """
        bank = self.active_bank
        with self.weight_state.lock:
            self.unmerge()
            if not mixes or bank is None:
                self.weight_state.cached.drop()
                return
            if not is_plain(self.base_layer):
                raise UnsupportedError(
                    "weights of experts cannot be kept beside a quantised or offloaded backbone: they would be as "
                    "large as the unquantised one's. Load the backbone unquantised and whole."
                )
            self.weight_state.cached.keep(mixes, self.base_layer, bank)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the weights that ``cache_merged_experts`` holds."""
        return self.weight_state.cached.num_bytes

    @property
    def merged_bytes(self) -> int:
        """Bytes held to bring the weight back to the backbone's; 0 while nothing is folded in."""
        return self.weight_state.merged.num_bytes

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not done by a layer: the mix is the model's.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("merge by the model: model.merge_adapter(expert_weights='name').")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the layer: within :meth:`MediatorModel.convert_to_lora`, which fixes a mix."""
        return self.board.converted is not None

    def get_delta_weight(self, adapter_name: str, mix: Mix | None = None) -> Tensor:
        """``sum_k w_k S_k`` of one adapter, (O, I) float32.

        Args:
            adapter_name: PEFT's name of the adapter.
            mix: (column, weight) of each column that takes part. None takes the mix that is merged or converted now.

        Raises:
            RoutingError: no mix is given nor fixed.
        """
        if mix is None and self.board.merged is not None and self.board.merged[0] == adapter_name:
            mix = self.board.merged[1]
        mix = self.board.converted if mix is None else mix
        if mix is None:
            raise RoutingError(
                "a delta depends on the expert weights. Give mix=(('name', 1.0),), or merge one for the time being: "
                "model.merge_adapter(expert_weights='name')."
            )
        bank = self.bank(adapter_name) if adapter_name in self.mediator_bank else None
        delta = None if bank is None else mixed_delta(bank, mix)
        return torch.zeros(self.shape, device=device_of(self.base_layer)) if delta is None else delta

    def check_mergeable(self) -> None:
        """Refuse a weight that cannot be written.

        Raises:
            UnsupportedError: it is quantised or offloaded.
        """
        if not is_plain(self.base_layer):
            raise UnsupportedError(
                "a quantised weight cannot take a mix (rounding it again would lose the delta), nor one offloaded. "
                "Load the backbone unquantised and whole to merge."
            )

    def hold_mix(self, adapter_name: str, mix: Mix) -> None:
        """Write a mix into the weight until :meth:`unmerge`."""
        bank = self.mediator_bank[adapter_name] if adapter_name in self.mediator_bank else None  # noqa: SIM401 - a ModuleDict has no default
        with self.weight_state.lock:
            self.unmerge()
            self.weight_state.merged.switch(bank, mix)  # type: ignore[arg-type]
            self.merged_adapters.append(adapter_name)

    def merged_weight(self, mixes: Mapping[str, Mix]) -> Tensor | None:
        """Weight (O, I) with the mixes of some adapters in it, rounded once; None where none has a delta here."""
        with self.plain():
            deltas = [self.get_delta_weight(name, mix) for name, mix in mixes.items() if name in self.mediator_bank]
            if not deltas:
                return None
            weight = plain_weight(self.base_layer)
            return torch.stack(deltas).sum(dim=0).add_(weight).to(weight.dtype)

    def merge_mixes(self, mixes: Mapping[str, Mix]) -> None:
        """Write the mixes of some adapters into the backbone's weight for good."""
        self.cache_merged_experts(())
        with self.plain():
            merged, base = self.merged_weight(mixes), self.base_layer
            if merged is not None:
                plain_weight(base).copy_(merged)
            for name, mix in mixes.items():
                shift = mixed_bias(self.bank(name), mix) if name in self.mediator_bank else None
                if shift is not None:
                    base.bias.data.copy_((base.bias.data.float() + shift).to(base.bias.dtype))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch. While requests are open its tensors are copies: those of the layer may be merged into later."""
        with self.plain():
            state = super().state_dict(*args, **kwargs)
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            keep_vars = kwargs.get("keep_vars", False)
            copy_if_in_use(state, f"{prefix}base_layer.", ("weight", "bias"), self.board, keep_vars)
            return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.board.check_idle("load_state_dict")
        # Merged weights that are cached belong to the former tensors.
        self.cache_merged_experts(())
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> MediatorLayer:
        kept = self.weight_state.cached.mixes
        self.cache_merged_experts(())
        with self.plain():
            super()._apply(fn, recurse)
        # Made anew from what moved, so that a change of dtype rounds once.
        self.cache_merged_experts(kept)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MediatorLayer:
        with self.plain():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self._copied_state(), memo))
            return copied

    def _copied_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __getstate__(self) -> dict[str, Any]:
        with self.plain():
            state = self._copied_state()
            if self.board.has_requests:
                # Tensors are written after all objects have been gone through, and may be merged into before that.
                snapshot = copy.deepcopy(self.base_layer)
                state["_modules"] = {**state["_modules"], "base_layer": snapshot}
                self._snapshot = weakref.ref(snapshot)
            return state

    def snapshot_weight(self) -> Tensor | None:
        """Copy of the weight that is being pickled in the layer's place, if there is one."""
        snapshot = None if self._snapshot is None else self._snapshot()
        return None if snapshot is None else snapshot.weight  # type: ignore[return-value]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def __repr__(self) -> str:
        return "mediator." + super().__repr__()


def routed_layers(model: nn.Module) -> dict[str, MediatorLayer]:
    """Layer name → routed layer of a wrapped model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MediatorLayer)}


@contextmanager
def reading_weights(model: nn.Module) -> Iterator[None]:
    """The backbone's own weights in all layers inside the block, also while other threads answer.

    These go on meanwhile, by ways that merge nothing.
    """
    layers = routed_layers(model).values()
    with ExitStack() as stack:
        for board in {id(layer.board): layer.board for layer in layers}.values():
            stack.enter_context(board.reading())
        # From here on no layer merges any more.
        for layer in layers:
            layer.unmerge()
        yield
