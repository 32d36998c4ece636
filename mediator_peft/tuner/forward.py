"""What happens at a forward pass and a generation: expert weights are found once and put on the board."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bank.expert_store import ExpertStore
from ..errors import RoutingError, UnsupportedError
from .active_adapter import ActiveAdapter
from .cache_route import cache_tag, carried_cache, empty_cache, is_filled, returned_cache, tag_cache
from .differentiable import anchor
from .expert_weights import ExpertWeights, LayerRoute, as_columns, by_name, expand_rows, make_route
from .request_board import Pending, RequestBoard
from .routing import PromptRouter, check_ids, check_mask
from .sharded import check_root, is_sharded


class RoutedForward:
    """Runs a wrapped model under routes: its forward passes, generations and ``use_experts`` blocks.

    Args:
        active: the active adapter.
        board: what is handed down to the layers of this model.
        prompts: decides the expert weights of prompts.
    """

    def __init__(self, active: ActiveAdapter, board: RequestBoard, prompts: PromptRouter) -> None:
        self._active, self._board, self._prompts = active, board, prompts
        self.adapters_off = False
        """Whether the plain backbone answers, as in PEFT's ``disable_adapter``."""
        self.execution: str | None = None
        """Forced way of applying deltas; see :meth:`MediatorModel.set_execution`."""
        self.expert_store: ExpertStore | None = None
        """Where deltas lie, if only some of them are held in memory."""
        self._is_anchored = False
        self._hooks: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks on the model."""
        model = self._active.model
        self._is_anchored = False
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._hooks:
            handle.remove()
        self._prompts.block_hook.remove()

    def check_not_merged(self, what: str) -> None:
        """Refuse what needs routed layers.

        Raises:
            UnsupportedError: a mix is merged into the weights.
        """
        if self._board.merged is not None:
            raise UnsupportedError(
                f"{what} needs the backbone, and the mix {dict(self._board.merged[1])} is merged into it. Call "
                "unmerge_adapter() first."
            )

    @contextmanager
    def request(self, table: Tensor | Pending, columns: Sequence[str], is_block: bool = False) -> Iterator[None]:
        """Hold expert weights, or prompts that they are still to be found for, through the block of a user's or of one
        generation."""
        self.check_not_merged("use_experts")
        try:
            with self._board.open_request(table, columns, is_block):
                yield
        finally:
            for layer in self._active.layers.values():
                layer.unmerge()

    def generate(self, *args: Any, expert_weights: ExpertWeights = None, **kwargs: Any) -> Any:
        """See :meth:`MediatorModel.generate`."""
        generate = self._active.model.generate
        sharded = is_sharded(self._active.model)
        if sharded:
            check_root(self._active.model)
        if expert_weights is not None:
            self.check_not_merged("expert_weights=")
        if self._is_plain(expert_weights) or self._board.merged is not None:
            return generate(*args, **kwargs)
        if expert_weights is not None:
            table: Tensor | Pending
            columns: Sequence[str]
            table, columns = self._active.named_table(expert_weights)
        elif self._board.request is not None:
            return generate(*args, **kwargs)
        else:
            self._board.warn_of_blocks_elsewhere()
            given = _named(type(self._active.model).generate, args, kwargs)
            with torch.no_grad():  # as in generation itself: in training, gradients would mix in every expert
                table, columns = self._route_request(given, sharded)
        with self.request(table, columns):
            return generate(*args, **kwargs)

    def _is_plain(self, expert_weights: ExpertWeights) -> bool:
        """Whether the plain backbone answers, as adapters are off, or none is left.

        Raises:
            UnsupportedError: expert weights were given, and no adapter has such experts.
        """
        if not self.adapters_off and not self._active.exists and expert_weights is not None:
            self._active.table(expert_weights)
        return self.adapters_off or not self._active.exists

    def _route_request(self, given: Mapping[str, Any], sharded: bool) -> tuple[Tensor | Pending, Sequence[str]]:
        """Expert weights and columns of one generation, or the prompts where single-pass routing applies.

        A cache filled under other weights is emptied, so that it is filled anew.
        """
        input_ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
        cache = carried_cache(given)
        known = self._cache_weights(cache)
        # A later turn can be judged, and the cache be filled again, only with the whole chat at hand.
        has_chat = input_ids is not None and known is not None and input_ids.shape[1] > cache.get_seq_length()
        reading = self._prompts.reading()
        # Without markers of turns, the model's own answer would be read as a part of the prompt.
        may_change = reading.routing_turn != "first" and reading.turn_markers is not None
        if known is not None and not (has_chat and may_change):
            return known, self._active.columns
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        check_ids(input_ids)
        _check_one_prompt_a_row(given)
        mask = given.get("attention_mask")
        check_mask(input_ids, mask)
        if mask is None:
            mask = self._mask_from_padding(input_ids, given)
        # Sharded parameters are at hand within a forward pass alone.
        if known is None and (sharded or self._prompts.single_pass_routing):
            self._prompts.fitted_reading()
            return Pending(input_ids, mask), ()
        weights, columns = self._prompts.routed_table(input_ids, mask)
        weights = weights.detach()
        if known is not None and not torch.equal(known.to(weights), expand_rows(weights, len(known))):
            empty_cache(cache)
        return weights, columns

    def _mask_from_padding(self, input_ids: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """What ``generate`` itself assumes when no mask is given: padding tokens, unless they also end texts."""
        model = self._active.model
        settings = given.get("generation_config") or getattr(model, "generation_config", None) or model.config
        pad = given.get("pad_token_id", getattr(settings, "pad_token_id", None))
        eos = getattr(settings, "eos_token_id", None)
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return (input_ids != pad).long()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spec, context = kwargs.pop("expert_weights", None), kwargs.pop("context_mask", None)
        self._board.refuse_beside_others()
        if self._board.is_unrouted:
            self._board.route = None
            return args, kwargs
        if spec is None and self._board.request is None and self._board.pending is None:
            self._board.warn_of_blocks_elsewhere()
        given = _named(type(module).forward, args, kwargs)
        if self._is_plain(spec):
            self._post(None)
            return args, kwargs
        # Asked once a pass: it may go through all modules, and shards may come between two passes.
        sharded = is_sharded(self._active.model)
        starts_reading = spec is None and self._starts_reading(given, context, sharded)
        self._post(None if starts_reading else self._layer_route(spec, given, context, sharded))
        return args, kwargs

    def _post(self, route: LayerRoute | None) -> None:
        """Put the route of this forward pass up for the layers."""
        self._board.route = route
        if route is not None and self.expert_store is not None:
            self._let_go(self.expert_store.use(sorted({name for group in route.groups for name, _ in group.mix})))
        self._board.keep_for_backward(self._board.route if torch.is_grad_enabled() else None)
        if route is not None and route.gradient is not None and not self._is_anchored:
            self._is_anchored = True
            embedding = self._active.model.get_input_embeddings()
            self._hooks.append(embedding.register_forward_hook(self._after_embedding))

    def _after_embedding(self, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        route = self._board.route
        return hidden if route is None or route.gradient is None else anchor(hidden, route)

    def _starts_reading(self, given: Mapping[str, Any], context: Tensor | None, sharded: bool) -> bool:
        """Have the route decided half-way, where this forward pass allows for it."""
        # Processes that share parameters must make the same passes, whatever their own prompts are.
        if sharded:
            return False
        pending = self._board.pending
        inputs: Any = given.get("input_ids")
        mask = None if self._board.request is not None else _readable_mask(given, inputs)
        if mask is not None and pending is None:
            _check_one_prompt_a_row(given)
        if mask is not None and pending is None and given.get("attention_mask") is None:
            padding = self._mask_from_padding(inputs, {})
            mask = mask if padding is None else padding
            # Positions that count padding are not those that prompts are read with.
            mask = None if (mask[:, :1] == 0).any() else mask
        # Of a prompt that is read in pieces, the first is not the whole.
        is_part = mask is not None and pending is not None and inputs.shape[1] != pending.input_ids.shape[1]
        if mask is None or is_part:
            return False
        # Of one fit to the end of this pass, whatever is fitted meanwhile.
        reading = self._prompts.reading()
        if not self._prompts.reads_in_one_pass(reading.layer):
            return False
        self._prompts.check_fitted(reading)
        prompt = prompt_mask(inputs, mask, given.get("labels"), context)
        pooled = self._prompts.tokens_in_place(inputs, mask if prompt is None else prompt, reading)
        if pooled is None:
            return False

        def decide(hidden: Tensor) -> None:
            features = self._prompts.pooled(hidden, pooled, reading.router)
            table, columns = self._prompts.judged_table(features, reading)
            if pending is not None:
                self._board.settle(table, columns)
                self._post(self._of_request(len(inputs), sharded))
            else:
                self._post(self._made_route(table, columns, len(inputs), sharded))

        self._prompts.block_hook.start(self._prompts.blocks, reading.layer, decide)
        return True

    def _made_route(self, table: Tensor, columns: Sequence[str], batch_size: int, sharded: bool) -> LayerRoute:
        now = self._active.columns
        rows = expand_rows(by_name(table, columns, now), batch_size)
        return make_route(rows, now, False, self.execution, self._active.column_map(), sharded)

    def _of_request(self, batch_size: int, sharded: bool) -> LayerRoute:
        """The route of the request at hand, whose expert weights are known."""
        request = self._board.request
        if request is None:
            raise RuntimeError("no request is open")
        may_merge = not torch.is_grad_enabled() and self._board.may_merge(request)
        making = (self._active.columns, may_merge, self.execution, self._active.column_map(), sharded)
        return self._board.request_route(request, batch_size, making)

    def _let_go(self, experts: Sequence[str]) -> None:
        """Drop what was copied to a GPU of experts that leave memory."""
        for layer in self._active.layers.values() if experts else ():
            layer.let_go(experts)

    def _layer_route(
        self, spec: ExpertWeights, given: Mapping[str, Any], context: Tensor | None, sharded: bool
    ) -> LayerRoute:
        inputs = given.get("input_ids")
        self._active.check_loaded()
        rows = inputs if inputs is not None else given.get("inputs_embeds")
        if rows is None:
            raise RoutingError("a forward pass needs input_ids or inputs_embeds.")
        pending = self._board.pending
        if spec is None and pending is not None:
            weights, columns = self._prompts.routed_table(pending.input_ids, pending.attention_mask)
            self._board.settle(weights.detach(), columns)
        if spec is None and self._board.request is not None:
            return self._of_request(len(rows), sharded)
        named = self._route_forward(inputs, given, context) if spec is None else self._active.named_table(spec)
        return self._made_route(*named, len(rows), sharded)

    def _route_forward(
        self, input_ids: Tensor | None, given: Mapping[str, Any], context: Tensor | None
    ) -> tuple[Tensor, Sequence[str]]:
        known = self._cache_weights(carried_cache(given))
        if known is not None:
            return known, self._active.columns
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        check_ids(input_ids)
        _check_one_prompt_a_row(given)
        mask = given.get("attention_mask")
        check_mask(input_ids, mask)
        if mask is None:
            mask = self._mask_from_padding(input_ids, {})
        mask = prompt_mask(input_ids, mask, given.get("labels"), context)
        return self._prompts.routed_table(input_ids, mask)

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        route = self._board.route
        if route is None:
            # It may still be waiting for the block at which its prompt was to be routed.
            if self._prompts.block_hook.stop() and output is not None:
                raise RuntimeError("the model ran without reaching the block at which this prompt was to be routed")
        else:
            self._check_still_there(route)
            cache = returned_cache(output)
            if cache is None:
                cache = carried_cache(_named(type(module).forward, args, kwargs))
            if cache is not None:
                tag_cache(cache, route)
        if not torch.is_grad_enabled():
            self._board.route = None

    def _check_still_there(self, route: LayerRoute) -> None:
        """Refuse the output of a pass during which one of its experts was removed, or all were stored in another way:
        some layers ran with other deltas than others."""
        exists = self._active.exists
        now = self._active.columns if exists else as_columns(())
        weights, columns = route.asked
        if exists and list(columns) == list(now) and list(route.columns) != self._stored_columns(now):
            raise RoutingError("the experts were condensed during this forward pass. Ask again.")
        if columns != now:
            by_name(weights.detach(), columns, now)

    def _stored_columns(self, now: Sequence[str]) -> list[str]:
        made = self._active.column_map()
        return list(now if made is None else made.columns)

    def _cache_weights(self, cache: Any) -> Tensor | None:
        """Expert weights that a carried-over cache was filled under, in the columns of now."""
        tag = cache_tag(cache)
        return None if tag is None else by_name(*tag, self._active.columns)


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """What a call was given, by name, whether it was given by name or by position."""
    if not args:
        return kwargs
    names = list(signature(function).parameters)[1:] if len(args) > 1 else ["input_ids"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def prompt_mask(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, context_mask: Tensor | None
) -> Tensor | None:
    """The mask of the tokens that a route is taken from: what ``context_mask`` says, or else all but the labels.

    Args:
        input_ids: (B, T)
        attention_mask: (B, T) or None.
        labels: (B, T), -100 where no loss is taken; or None.
        context_mask: (B, T), 1 for tokens of the prompt; or None.

    Raises:
        RoutingError: the context mask has another shape, or a row of it is empty.
    """
    if context_mask is None:
        return without_answers(input_ids, attention_mask, labels)
    if context_mask.shape != input_ids.shape:
        raise RoutingError(
            f"context_mask has shape {tuple(context_mask.shape)}, input_ids {tuple(input_ids.shape)}: give one entry a "
            "token, 1 for the prompt's and 0 for the answer's."
        )
    mask = context_mask if attention_mask is None else context_mask.to(attention_mask) * attention_mask
    if bool((mask.sum(dim=1) == 0).any()):
        raise RoutingError("context_mask leaves a row without any token: a route needs a prompt of one token at least.")
    return mask


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


def _check_one_prompt_a_row(given: Mapping[str, Any]) -> None:
    """Refuse batches whose rows hold several prompts: each row has one route.

    Raises:
        UnsupportedError: positions begin anew within a row, or prompts are numbered there.
    """
    mask, positions, numbers = (given.get(name) for name in ("attention_mask", "position_ids", "seq_idx"))
    is_packed = given.get("cu_seq_lens_q") is not None
    if isinstance(positions, Tensor) and positions.ndim == 2 and mask is None:
        is_packed = is_packed or bool((positions[:, 1:] <= positions[:, :-1]).any())
    if isinstance(numbers, Tensor) and numbers.ndim == 2:
        is_packed = is_packed or bool((numbers[:, 1:] != numbers[:, :-1]).any())
    if is_packed:
        raise UnsupportedError(
            "a packed batch holds several prompts in a row, and a row has one route. Give one prompt a row with an "
            "attention mask, or say which experts to use: expert_weights=."
        )


def _readable_mask(given: Mapping[str, Any], input_ids: Tensor | None) -> Tensor | None:
    """The mask of a forward pass that a route can be taken from; None where the pass is not of that kind.

    It must see whole prompts from their start (no cache yet), with a plain mask, outside of autograd and compilation,
    and with positions that do not count padding.
    """
    if is_filled(carried_cache(given)):
        return None
    if input_ids is None or not input_ids.numel() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    mask = given.get("attention_mask")
    if mask is None:
        return torch.ones_like(input_ids)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        return None
    pads_left = bool((mask[:, 0] == 0).any())
    return None if pads_left and given.get("position_ids") is None else mask
