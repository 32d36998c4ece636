"""Routed token embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..bank.delta_rows import DeltaRows
from ..bank.layer_bank import LayerBank
from ..errors import UnsupportedError
from ..structure import only_looks_up, unroutable
from . import execution
from .expert_weights import LayerRoute
from .layer import MediatorLayer
from .request_board import RequestBoard


class MediatorEmbedding(MediatorLayer):
    r"""An embedding whose row for token :math:`i` is :math:`D_i + \sum_k w_k(x) S_{k,i}`.

    Only the rows of the tokens at hand are unpacked; where a ``lm_head`` shares the weight and may fold, the fold
    serves both.

    Raises:
        UnsupportedError: the embedding does more than look rows up.
    """

    base_layer: nn.Embedding  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Embedding, board: RequestBoard) -> None:
        check_embedding(base_layer)
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
        bank = self.active_bank
        if route is None or bank is None:
            self.weight_state.restore()
            return self.base_layer(x)
        route = self.board.as_readers_allow(route)
        if self.has_tied_head and self._way(x, route, bank) == "merged":
            self.weight_state.merged.switch(bank, route.groups[0].mix)
            self.weight_state.merged.route = route
            return self.base_layer(x)
        self.weight_state.restore()
        return self._differentiable(x, bank, route) if route.is_differentiable else self._mixed(x, bank, route)

    def _way(self, ids: Tensor, route: LayerRoute, bank: LayerBank) -> str:
        return execution.choose(ids, route, self.base_layer, bank, self.weight_state.cached)  # type: ignore[arg-type]

    def _mixed(self, ids: Tensor, bank: LayerBank, route: LayerRoute) -> Tensor:
        """(B, T) → (B, T, H); ``D + sum_k w_k S_k`` summed in float32 and rounded once."""
        result = self.base_layer(ids)
        _check_rows(ids, route)
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
        _check_rows(ids, route)
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


def check_embedding(embedding: nn.Embedding) -> None:
    """Refuse an embedding that does more than look rows up.

    Raises:
        UnsupportedError: its ``forward`` is not torch's, or it renormalises rows.
    """
    if not only_looks_up(embedding):
        raise UnsupportedError(unroutable(type(embedding).__name__))


def _check_rows(ids: Tensor, route: LayerRoute) -> None:
    """Refuse token ids that cannot be told apart by prompt.

    Raises:
        UnsupportedError: they are not (B, T).
    """
    if ids.ndim != 2 or len(ids) != len(route.expert_weights):
        raise UnsupportedError(
            f"a routed embedding got token ids of shape {tuple(ids.shape)} for {len(route.expert_weights)} rows; it "
            "cannot tell which row a token belongs to. Leave the embedding out of target_modules."
        )
