"""Routed layers: a linear layer, a token embedding, and a ``lm_head`` that shares the embedding's weight."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bank.delta_rows import DeltaRows
from ..bank.layer_bank import LayerBank
from ..bank.sparse_delta import SparseDelta
from ..errors import RoutingError, UnsupportedError
from ..forking import renew_after_fork
from . import execution
from .execution import DeviceRows, FewRows, is_hooked
from .merged_weight import MergedWeight, MergedWeightCache, mixed_bias, mixed_delta, mixed_weight, plain_weight
from .quantized import device_of, is_plain, readable_weight
from .routes import LayerRoute, Mix, RequestBoard

_NOT_COPIED = ("_lock", "_merged_weight", "_kept", "_few_rows", "_snapshot")


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
        # One lock a layer: nobody computes with a weight while somebody else writes to it.
        self._lock = threading.RLock()
        self._merged_weight = MergedWeight(self.base_layer)
        self._kept = MergedWeightCache()
        self._few_rows: FewRows | DeviceRows | None = None
        self._snapshot: weakref.ref[nn.Module] | None = None
        renew_after_fork(self)

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return (self._lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        self._lock = threading.RLock()

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

    def _active_bank(self) -> LayerBank | None:
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
        weight = mixed_weight(readable_weight(base), *mixed)
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
        route, bank = self.board.route, self._active_bank()
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
        with self._lock:
            return self._first_pass(x, None if self._disable_adapters else self.board.route, *args, **kwargs)

    def _next_step(self, x: Tensor) -> Tensor | None:
        """A forward pass that goes on as the last one went; None where it cannot."""
        route = None if self._disable_adapters or self.merged_adapters else self.board.route
        if route is None:
            return None
        with self._lock:
            if self._merged_weight.route is route:
                base_layer: Any = self._modules["base_layer"]
                if type(base_layer) is not nn.Linear or is_hooked(base_layer):
                    return base_layer(x)
                parameters = base_layer._parameters
                return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
            few_rows = self._few_rows
            if few_rows is not None and few_rows.route is route and few_rows.is_for(x):
                self._merged_weight.switch(None, ())
                return few_rows(x)
        return None

    def _first_pass(self, x: Tensor, route: LayerRoute | None, *args: Any, **kwargs: Any) -> Tensor:
        """A forward pass that could not go on as the last one went."""
        bank = self._active_bank()
        if route is None or bank is None:
            self._merged_weight.switch(None, ())
            return self.base_layer(x, *args, **kwargs)
        route = self.board.as_readers_allow(route)
        if bank.device.type == "meta":
            raise UnsupportedError(
                "the deltas of this layer were offloaded. Offload without buffers (offload_buffers=False), and limit "
                "their memory with load_mediator(max_resident_experts=...)."
            )
        self._few_rows = execution.few_rows(x, self.base_layer, bank, route, self._kept)
        if self._few_rows is not None:
            self._merged_weight.switch(None, ())
            return self._few_rows(x)
        return execution.apply(x, self.base_layer, bank, route, self._merged_weight, self._kept)

    def forget_steps(self) -> None:
        """Drop what was kept for further steps under the last route."""
        self._few_rows = None
        self._merged_weight.route = None

    def put_delta(self, adapter_name: str, expert: str, delta: SparseDelta) -> None:
        """Set one expert's delta, while other threads answer."""
        with self._lock:
            self._few_rows = None
            self.bank(adapter_name).put(expert, delta)

    def remove_delta(self, adapter_name: str, expert: str) -> None:
        """Drop one expert's delta and all kept weights, while other threads answer."""
        with self._lock:
            self.cache_merged_experts(())
            self.bank(adapter_name).remove(expert)

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
        """Bring the weight back to the backbone's, bit for bit; of a merged adapter, all layers' weights."""
        if self.merged_adapters:
            warnings.warn("the merged mix is taken out again: this needs the backbone's own weights.", stacklevel=2)
            self.board.unmerge()
        with self._lock:
            self.forget_steps()
            self._merged_weight.switch(None, ())

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The backbone's own weight inside the block: no other thread computes with the layer or merges into it."""
        self.unmerge()
        with self._lock:
            # Another thread may have merged between the two.
            self.forget_steps()
            self._merged_weight.switch(None, ())
            yield

    def cache_merged_experts(self, mixes: Sequence[Mix]) -> None:
        """Hold the whole weights of these experts' mixes beside the backbone's, and of no others.

        Raises:
            UnsupportedError: the weight is quantised or offloaded.
        """
        bank = self._active_bank()
        with self._lock:
            self.unmerge()
            if not mixes or bank is None:
                self._kept.drop()
                return
            if not is_plain(self.base_layer):
                raise UnsupportedError(
                    "weights of experts cannot be kept beside a quantised or offloaded backbone: they would be as "
                    "large as the unquantised one's. Load the backbone unquantised and whole."
                )
            self._kept.keep(mixes, self.base_layer, bank)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the weights that ``cache_merged_experts`` holds."""
        return self._kept.num_bytes

    @property
    def merged_bytes(self) -> int:
        """Bytes held to bring the weight back to the backbone's; 0 while nothing is folded in."""
        return self._merged_weight.num_bytes

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
        with self._lock:
            self.unmerge()
            self._merged_weight.switch(bank, mix)  # type: ignore[arg-type]
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
            self._detach_state(state, f"{prefix}base_layer.", kwargs.get("keep_vars", False))
            return state

    def _detach_state(self, state: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Copies in place of tensors that may be merged into, while requests are open."""
        if keep_vars or not self.board.has_requests:
            return
        for name in ("weight", "bias"):
            if isinstance(state.get(prefix + name), Tensor):
                state[prefix + name] = state[prefix + name].clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.board.check_idle("load_state_dict")
        # Merged weights that are cached belong to the former tensors.
        self.cache_merged_experts(())
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> MediatorLayer:
        kept = self._kept.mixes
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


class MediatorEmbedding(MediatorLayer):
    r"""An embedding whose row for token :math:`i` is :math:`D_i + \sum_k w_k(x) S_{k,i}`.

    Only the rows of the tokens at hand are unpacked; where a ``lm_head`` shares the weight and may fold, the fold
    serves both.

    Raises:
        UnsupportedError: the embedding does more than look rows up.
    """

    base_layer: nn.Embedding  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Embedding, board: RequestBoard) -> None:
        _check_embedding(base_layer)
        super().__init__(base_layer, board)  # type: ignore[arg-type]
        self.has_tied_head = False

    def _start(self) -> None:
        super()._start()
        self._rows: dict[str, DeltaRows] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(number of tokens, H)"""
        return (self.base_layer.num_embeddings, self.base_layer.embedding_dim)

    def _first_pass(self, x: Tensor, route: LayerRoute | None, *args: Any, **kwargs: Any) -> Tensor:
        bank = self._active_bank()
        if route is None or bank is None:
            self._merged_weight.switch(None, ())
            return self.base_layer(x)
        route = self.board.as_readers_allow(route)
        if self.has_tied_head and self._way(x, route, bank) == "merged":
            self._merged_weight.switch(bank, route.groups[0].mix)
            self._merged_weight.route = route
            return self.base_layer(x)
        self._merged_weight.switch(None, ())
        return self._differentiable(x, bank, route) if route.is_differentiable else self._mixed(x, bank, route)

    def _way(self, ids: Tensor, route: LayerRoute, bank: LayerBank) -> str:
        return execution.choose(ids, route, self.base_layer, bank, self._kept)  # type: ignore[arg-type]

    def _mixed(self, ids: Tensor, bank: LayerBank, route: LayerRoute) -> Tensor:
        """(B, T) → (B, T, H); ``D + sum_k w_k S_k`` summed in float32 and rounded once."""
        result = self.base_layer(ids)
        check_rows(ids, route)
        for rows, mix in route.groups:
            place = slice(None) if rows is None else rows.to(ids.device)
            tokens, inverse = ids[place].unique(return_inverse=True)
            total = self.base_layer.weight.detach()[tokens].float()
            for name, weight in mix:
                delta = self._delta_rows(bank, name)
                if delta is not None:
                    total += weight * delta.dense(tokens)
            if mix:
                result[place] = total.to(result.dtype)[inverse]
        return result

    def _differentiable(self, ids: Tensor, bank: LayerBank, route: LayerRoute) -> Tensor:
        """As :meth:`_mixed`, with gradients to the expert weights."""
        result = self.base_layer(ids)
        check_rows(ids, route)
        tokens, inverse = ids.unique(return_inverse=True)
        for column, name in enumerate(route.columns):
            delta = self._delta_rows(bank, name)
            if delta is not None:
                weights = route.expert_weights[:, column, None, None].to(result.device)
                result = result + (weights * delta.dense(tokens)[inverse]).to(result.dtype)
        return result

    def _delta_rows(self, bank: LayerBank, name: str) -> DeltaRows | None:
        delta = bank.get(name)
        if delta is None:
            return None
        known = self._rows.get(name)
        first = next(iter(delta.parts))
        if known is None or known.delta.parts[first] is not delta.parts[first]:
            known = self._rows[name] = DeltaRows(delta)
        return known

    def _copied_state(self) -> dict[str, Any]:
        return {key: value for key, value in super()._copied_state().items() if key != "_rows"}


def _check_embedding(embedding: nn.Embedding) -> None:
    if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        raise UnsupportedError(
            f"an embedding of type {type(embedding).__name__} does more than look rows up, so it cannot be "
            "routed. Leave it out of target_modules and build again."
        )


def check_routable(model: Any, names: Sequence[str]) -> None:
    """Refuse layers that cannot be wrapped, before anything is changed.

    Args:
        model: may have wrapped layers already.
        names: of the layers that are to be routed.

    Raises:
        UnsupportedError: the model has no such layer, an embedding does more than look rows up, or it is tied to a head
            with a weight of its own.
    """
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if layer is None:
            raise UnsupportedError(f"the adapter has deltas for {name!r}, which this model has not.")
        if isinstance(layer, nn.Embedding):
            _check_embedding(layer)
            head = model.get_output_embeddings()
            if layer is model.get_input_embeddings() and isinstance(head, nn.Linear):
                _check_tie(model, head, layer.weight)


def _check_tie(model: Any, head: nn.Linear, weight: Tensor) -> None:
    if head.weight is not weight and getattr(model.config, "tie_word_embeddings", False):
        raise UnsupportedError(
            "the adapter has deltas for tied embeddings, but this model's lm_head has a weight of its own (it was "
            "quantised or offloaded apart). Load the model whole, or build without embed_tokens in target_modules."
        )


class TiedHead(nn.Module):
    """A ``lm_head`` whose weight is the embedding's: their deltas, lock and fold are the embedding's, too."""

    def __init__(self, base_layer: nn.Linear, embedding: MediatorEmbedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not a part of this module: its tensors are saved once, with the embedding.
        self._owner = (embedding,)
        self._few_rows: FewRows | DeviceRows | None = None
        embedding.has_tied_head = True
        # To whoever reads or writes tensors, it is the layer itself.
        self.register_state_dict_post_hook(_without_wrapper)
        self.register_load_state_dict_pre_hook(_with_wrapper)

    @property
    def weight(self) -> Tensor:
        """As of the layer itself."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._owner[0].merged_adapters:
            return self.base_layer(x)
        return self._outside_graph(x) if torch.compiler.is_compiling() else self._forward(x)

    @torch.compiler.disable
    def _outside_graph(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        owner = self._owner[0]
        route = None if owner.disable_adapters else owner.board.route
        bank, merged_weight = owner._active_bank(), owner._merged_weight
        with owner._lock:
            if route is None or bank is None:
                merged_weight.switch(None, ())
                return self.base_layer(x)
            if merged_weight.route is route:
                return self.base_layer(x)
            route = owner.board.as_readers_allow(route)
            known = self._few_rows
            if known is None or known.route is not route or not known.is_for(x):
                known = self._few_rows = execution.few_rows(x, self.base_layer, bank, route, owner._kept)
            if known is not None:
                merged_weight.switch(None, ())
                return known(x)
            return execution.apply(x, self.base_layer, bank, route, merged_weight, owner._kept)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; see :meth:`MediatorLayer.state_dict`."""
        owner = self._owner[0]
        with owner.plain():
            state = super().state_dict(*args, **kwargs)
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            if not kwargs.get("keep_vars", False) and owner.board.has_requests:
                state[f"{prefix}weight"] = state[f"{prefix}weight"].clone()
            return state

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedHead:
        with self._owner[0].plain():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy({**self.__dict__, "_few_rows": None}, memo))
            return copied

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_few_rows": None}
        weight = self._owner[0].snapshot_weight()
        if weight is not None:
            head = copy.deepcopy(self.base_layer, {id(self.base_layer.weight): weight})
            state["_modules"] = {**state["_modules"], "base_layer": head}
        return state


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base_layer.")]:
        state[key.replace(f"{prefix}base_layer.", prefix, 1)] = state.pop(key)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(f"{prefix}base_layer.")]:
        state[key.replace(prefix, f"{prefix}base_layer.", 1)] = state.pop(key)


def check_rows(ids: Tensor, route: LayerRoute) -> None:
    """Refuse token ids that cannot be told apart by prompt.

    Raises:
        UnsupportedError: they are not (B, T).
    """
    if ids.ndim != 2 or len(ids) != len(route.expert_weights):
        raise UnsupportedError(
            f"a routed embedding got token ids of shape {tuple(ids.shape)} for {len(route.expert_weights)} rows; it "
            "cannot tell which row a token belongs to. Leave the embedding out of target_modules."
        )


def tie_head(model: Any) -> None:
    """Let the ``lm_head`` of a model follow a routed embedding whose weight it shares."""
    if not any(isinstance(module, MediatorEmbedding) for module in model.modules()):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(embedding, MediatorEmbedding) or not isinstance(head, nn.Linear):
        return
    if head.weight is embedding.base_layer.weight:
        model.set_output_embeddings(TiedHead(head, embedding))
    else:
        _check_tie(model, head, embedding.base_layer.weight)


def untie_head(model: Any) -> None:
    """The reverse of :func:`tie_head`."""
    for module in list(model.modules()):
        if isinstance(module, TiedHead):
            model.set_output_embeddings(module.base_layer)


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
