"""A ``lm_head`` that shares the weight of a routed embedding."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .embedding import MediatorEmbedding
from .execution import LayerSteps
from .merged_weight import copy_if_in_use


class TiedHead(nn.Module):
    """A ``lm_head`` whose weight is the embedding's: their deltas, lock and fold are the embedding's, too."""

    def __init__(self, base_layer: nn.Linear, embedding: MediatorEmbedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not a part of this module: its tensors are saved once, with the embedding.
        self._owner = (embedding,)
        self._start()
        embedding.has_tied_head = True
        # To whoever reads or writes tensors, it is the layer itself.
        self.register_state_dict_post_hook(_without_wrapper)
        self.register_load_state_dict_pre_hook(_with_wrapper)

    def _start(self) -> None:
        owner = self._owner[0]
        self._steps = LayerSteps(owner.weight_state, owner.board)

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
        with owner.weight_state.lock:
            bank = owner.active_bank
            result = None if route is None or bank is None else self._steps.next(x, self.base_layer, route)
            return self._steps.first(x, self.base_layer, bank, route) if result is None else result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; see :meth:`MediatorLayer.state_dict`."""
        owner = self._owner[0]
        with owner.plain():
            state = super().state_dict(*args, **kwargs)
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            copy_if_in_use(state, prefix, ("weight",), owner.board, kwargs.get("keep_vars", False))
            return state

    def _copied_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_steps"}

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedHead:
        with self._owner[0].plain():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self._copied_state(), memo))
            return copied

    def __getstate__(self) -> dict[str, Any]:
        state = self._copied_state()
        weight = self._owner[0].snapshot_weight()
        if weight is not None:
            head = copy.deepcopy(self.base_layer, {id(self.base_layer.weight): weight})
            state["_modules"] = {**state["_modules"], "base_layer": head}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base_layer.")]:
        state[key.replace(f"{prefix}base_layer.", prefix, 1)] = state.pop(key)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(f"{prefix}base_layer.")]:
        state[key.replace(prefix, f"{prefix}base_layer.", 1)] = state.pop(key)


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
        check_tie(model, head, embedding.base_layer.weight)


def untie_head(model: Any) -> None:
    """The reverse of :func:`tie_head`."""
    for module in list(model.modules()):
        if isinstance(module, TiedHead):
            model.set_output_embeddings(module.base_layer)


def check_tie(model: Any, head: nn.Linear, weight: Tensor) -> None:
    """Refuse a head that should share the weight of a routed embedding and does not.

    Raises:
        UnsupportedError: the configuration ties them, but the head has a weight of its own.
    """
    if head.weight is not weight and getattr(model.config, "tie_word_embeddings", False):
        raise UnsupportedError(
            "the adapter has deltas for tied embeddings, but this model's lm_head has a weight of its own (it was "
            "quantised or offloaded apart). Load the model whole, or build without embed_tokens in target_modules."
        )
