"""What happens at a forward pass and a generation: expert weights are found once and put on the board."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..bank.expert_store import ExpertStore
from ..errors import RoutingError
from ..routing.block_hook import BlockTap
from ..routing.features import mean_over_tokens
from ..routing.gate import RouteOutput
from ..routing.routers import Router
from .caches import cache_weights, empty_cache, tag_cache
from .chat_turns import turn_mask
from .config import MediatorConfig
from .expert_weights import ExpertWeights, LayerRoute, expand_rows, expert_weight_rows, make_route
from .layer import MediatorLayer
from .requests import Pending, RouteBoard
from .single_pass import readable_mask


class RoutedForward:
    """The part of the tuner that runs the wrapped model under a route."""

    model: Any
    _board: RouteBoard
    _tap: BlockTap
    _adapters_off: bool
    _execution: str | None
    expert_store: ExpertStore | None

    if TYPE_CHECKING:

        @property
        def _config(self) -> MediatorConfig: ...

        def route(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
        ) -> RouteOutput: ...

        def routed_layers(self) -> dict[str, MediatorLayer]: ...

        @property
        def single_pass_routing(self) -> bool: ...

        @property
        def router_layer(self) -> int: ...

        def _blocks(self) -> nn.ModuleList: ...

        def _judge(self, features: Tensor) -> RouteOutput: ...

        def _fitted_router(self) -> Router: ...

    def _parse(self, spec: ExpertWeights) -> Tensor:
        config = self._config
        return expert_weight_rows(spec, config.columns, len(config.expert_names or ()))

    @contextmanager
    def use_experts(self, expert_weights: ExpertWeights) -> Iterator[Self]:
        """Use these expert weights for every forward pass and generation inside the block; None is the backbone."""
        with self._request(self._parse(expert_weights)):
            yield self

    @contextmanager
    def _request(self, table: Tensor | Pending) -> Iterator[None]:
        try:
            with self._board.open_request(table):
                yield
        finally:
            for layer in self.routed_layers().values():
                layer.unmerge()

    def generate(self, *args: Any, expert_weights: ExpertWeights = None, **kwargs: Any) -> Any:
        """``transformers``' ``generate``, with each prompt routed once before its first token.

        Args:
            *args: as for the wrapped model.
            expert_weights: use these instead of routing; None routes (or follows ``use_experts``).
            **kwargs: as for the wrapped model.
        """
        if self._adapters_off:
            return self.model.generate(*args, **kwargs)
        if expert_weights is not None:
            table: Tensor | Pending = self._parse(expert_weights)
        elif self._board.request is not None:
            return self.model.generate(*args, **kwargs)
        else:
            table = self._route_request(args, kwargs)
        with self._request(table):
            return self.model.generate(*args, **kwargs)

    def _route_request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Pending:
        """Expert weights of one generation, or the prompts where these can be found in passing.

        A cache filled under other weights is emptied, so that it is filled anew.
        """
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        cache: Any = kwargs.get("past_key_values")
        known = cache_weights(cache)
        # A later turn can be judged, and the cache be filled again, only with the whole chat at hand.
        has_chat = input_ids is not None and known is not None and input_ids.shape[1] > cache.get_seq_length()
        if known is not None and not (has_chat and self._config.routing_turn != "first"):
            return known
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._mask_from_padding(input_ids, kwargs)
        if known is None and self.single_pass_routing:
            self._fitted_router()
            return Pending(input_ids, mask)
        weights = self.route(input_ids, mask).expert_weights.detach()
        if known is not None and not torch.equal(known.to(weights), expand_rows(weights, len(known))):
            empty_cache(cache)
        return weights

    def _mask_from_padding(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What ``generate`` itself assumes when no mask is given: padding tokens, unless they also end texts."""
        settings = kwargs.get("generation_config") or self.model.generation_config
        pad, eos = kwargs.get("pad_token_id", settings.pad_token_id), settings.eos_token_id
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return (input_ids != pad).long()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spec = kwargs.pop("expert_weights", None)
        if self._adapters_off or (spec is None and self._starts_reading(args, kwargs)):
            self._post(None)
        else:
            self._post(self._layer_route(spec, args, kwargs))
        return args, kwargs

    def _post(self, route: LayerRoute | None) -> None:
        """Put the route of this forward pass up for the layers."""
        self._board.route = route
        if route is not None and self.expert_store is not None:
            self._let_go(self.expert_store.use({name for group in route.groups for name, _ in group.mix}))
        self._board.keep_for_backward(self._board.route if torch.is_grad_enabled() else None)

    def _starts_reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Have the route decided half-way, where this forward pass allows for it."""
        pending = self._board.pending
        inputs: Any = kwargs.get("input_ids", args[0] if args else None)
        mask = None if self._board.request is not None else readable_mask(kwargs, inputs)
        # Of a prompt that is read in pieces, the first is not the whole.
        is_part = mask is not None and pending is not None and inputs.shape[1] != pending.input_ids.shape[1]
        if mask is None or is_part or not self.single_pass_routing:
            return False
        self._fitted_router()
        prompt = without_answers(inputs, mask, kwargs.get("labels"))
        pooled = turn_mask(
            inputs, mask if prompt is None else prompt, self._config.turn_markers, self._config.routing_turn
        )

        def decide(hidden: Tensor) -> None:
            table = self._judge(mean_over_tokens(hidden, pooled)).expert_weights
            if pending is not None:
                self._board.settle(table)
            self._post(self._made_route(table, len(inputs), pending is not None))

        self._tap.start(self._blocks(), self.router_layer, decide)
        return True

    def _made_route(self, table: Tensor, batch_size: int, is_request: bool) -> LayerRoute:
        may_merge = is_request and self._board.has_one_mix and not torch.is_grad_enabled()
        making = (self._config.columns, may_merge, self._execution)
        if is_request:
            return self._board.request_route(batch_size, making)
        return make_route(expand_rows(table, batch_size), *making)

    def _let_go(self, experts: Sequence[str]) -> None:
        """Drop what was copied to a GPU of experts that leave memory."""
        for layer in self.routed_layers().values() if experts else ():
            layer.let_go(experts)

    def _layer_route(self, spec: ExpertWeights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerRoute:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        rows = inputs if inputs is not None else kwargs.get("inputs_embeds")
        if rows is None:
            raise RoutingError("a forward pass needs input_ids or inputs_embeds.")
        pending = self._board.pending
        if spec is None and pending is not None:
            self._board.settle(self.route(pending.input_ids, pending.attention_mask).expert_weights.detach())
        request = self._board.request
        if spec is not None:
            return self._made_route(self._parse(spec), len(rows), False)
        if request is not None:
            return self._made_route(request, len(rows), True)
        return self._made_route(self._route_forward(inputs, kwargs), len(rows), False)

    def _route_forward(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        known = cache_weights(kwargs.get("past_key_values"))
        if known is not None:
            return known
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        mask = without_answers(input_ids, kwargs.get("attention_mask"), kwargs.get("labels"))
        return self.route(input_ids, mask).expert_weights

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._tap.stop() and output is not None:
            raise RuntimeError("the model ran without reaching the block at which this prompt was to be routed")
        route = self._board.route
        if route is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None:
                tag_cache(cache, route.expert_weights)
        if not torch.is_grad_enabled():
            self._board.route = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass; ``expert_weights=`` overrides routing."""
        return self.model(*args, **kwargs)


def without_answers(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """The mask without the tokens a loss is taken on: in use, the router will not have seen the answer.

    A row whose every token is in the loss (plain language modelling) has no prompt to tell apart and stays whole.

    Args:
        input_ids: (B, T)
        attention_mask: (B, T) or None.
        labels: (B, T), -100 where no loss is taken; or None.
    """
    if labels is None:
        return attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompt = mask * (labels == -100).to(mask)
    return torch.where(prompt.sum(dim=1, keepdim=True) > 0, prompt, mask)
