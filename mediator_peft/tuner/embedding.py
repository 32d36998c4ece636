"""A routed token embedding, and a ``lm_head`` that shares its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bank.delta_rows import DeltaRows
from ..bank.layer_bank import LayerBank
from ..errors import UnsupportedError
from . import execution
from .expert_weights import LayerRoute
from .few_rows import DeviceRows, FewRows
from .layer import MediatorLayer
from .requests import RouteBoard


class MediatorEmbedding(MediatorLayer):
    r"""An embedding whose row for token :math:`i` is :math:`D_i + \sum_k w_k(x) S_{k,i}`.

    Only the rows of the tokens at hand are unpacked; where a ``lm_head`` shares the weight and may fold, the fold
    serves both.

    Raises:
        UnsupportedError: the embedding does more than look rows up.
    """

    base_layer: nn.Embedding  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Embedding, board: RouteBoard) -> None:
        if type(base_layer).forward is not nn.Embedding.forward or base_layer.max_norm is not None:
            raise UnsupportedError(
                f"an embedding of type {type(base_layer).__name__} does more than look rows up, so it cannot be "
                "routed. Leave it out of target_modules and build again."
            )
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
            if not self.merged:
                self._merged_weight.switch(None, ())
            return self.base_layer(x)
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
        if known is None or known.delta.mask is not delta.mask:
            known = self._rows[name] = DeltaRows(delta)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_rows"}


class TiedHead(nn.Module):
    """A ``lm_head`` whose weight is the embedding's: their deltas, lock and fold are the embedding's, too."""

    def __init__(self, base_layer: nn.Linear, embedding: MediatorEmbedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not a part of this module: its tensors are saved once, with the embedding.
        self._owner = (embedding,)
        self._few_rows: FewRows | DeviceRows | None = None
        embedding.has_tied_head = True

    @property
    def weight(self) -> Tensor:
        """As of the layer itself."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._outside_graph(x) if torch.compiler.is_compiling() else self._forward(x)

    @torch.compiler.disable
    def _outside_graph(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        owner = self._owner[0]
        route = None if owner.disable_adapters or owner.merged_adapters else owner._board.route
        bank, merged_weight = owner._active_bank(), owner._merged_weight
        with owner._lock:
            if route is None or bank is None:
                if not owner.merged:
                    merged_weight.switch(None, ())
                return self.base_layer(x)
            if merged_weight.route is route:
                return self.base_layer(x)
            known = self._few_rows
            if known is None or known.route is not route or not known.is_for(x):
                known = self._few_rows = execution.few_rows(x, self.base_layer, bank, route, owner._kept)
            if known is not None:
                merged_weight.switch(None, ())
                return known(x)
            return execution.apply(x, self.base_layer, bank, route, merged_weight, owner._kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_few_rows": None}


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
    elif getattr(model.config, "tie_word_embeddings", False):
        raise UnsupportedError(
            "the adapter has deltas for tied embeddings, but this model's lm_head has a weight of its own (it was "
            "quantised or offloaded apart). Load the model whole, or build without embed_tokens in target_modules."
        )


def untie_head(model: Any) -> None:
    """The reverse of :func:`tie_head`."""
    for module in list(model.modules()):
        if isinstance(module, TiedHead):
            model.set_output_embeddings(module.base_layer)
