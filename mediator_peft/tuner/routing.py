"""How expert weights of prompts are decided: features, router, gate, and what they say of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from ..config import CORRECTION
from ..context_length import table_of_positions
from ..data_files import surrogate_fault
from ..errors import RouterNotFittedError, RoutingError, UnsupportedError
from ..routing.block_hook import BlockHook
from ..routing.explain import Explanation, explain_rows
from ..routing.feature_cache import FeatureCache
from ..routing.features import hidden_states
from ..routing.gate import GateSettings, RouteOutput, gate
from ..routing.routers import DELTA_ROUTERS, ROUTERS, Router
from ..routing.unreadable import split_unreadable, to_the_base
from ..structure import find_blocks
from .active_adapter import ActiveAdapter
from .chat_turns import padded, routing_rows, turn_markers, turn_mask
from .config import FitSettings, MediatorConfig
from .execution import float32_inside
from .expert_weights import Columns, LayerRoute, make_route
from .layer import MediatorLayer
from .prompt_form import FormedPrompts, PromptForm, formed, prompt_form
from .request_board import RequestBoard
from .sharded import check_router, is_gathered, is_sharded


class Reading(NamedTuple):
    """How prompts are read and judged. Taken once a request and never changed: no request mixes two fits."""

    router: Router
    columns: Columns
    """The columns that the router decides."""

    layer: int
    """After how many blocks the hidden state is read."""

    turn_markers: list[list[int]] | None
    prompt_form: dict[str, list[int]] | None
    routing_turn: str


class PromptRouter:
    """Decides the expert weights of prompts: reads their features, asks the router, and applies the gate.

    Args:
        active: the active adapter.
        board: of the same model; prompts are read under no route.
    """

    def __init__(self, active: ActiveAdapter, board: RequestBoard) -> None:
        self.active = active
        self.block_hook = BlockHook()
        self.feature_caches: dict[tuple[str, str], FeatureCache] = {}
        """Features of calibration texts: (what they depend on, folder) → cache."""
        self.background: Any = None
        """The user's background prompts at the last fit, for experts that are added later; not saved."""
        self._board = board
        self._blocks: nn.ModuleList | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A fit in another thread goes on filling the caches.
        return {**self.__dict__, "feature_caches": {}}

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's repeated blocks."""
        # Finding them takes as long as a hundredth of a short prompt.
        if self._blocks is None:
            self._blocks = find_blocks(self.active.model)
        return self._blocks

    @property
    def router_layer(self) -> int:
        """After how many blocks the router reads the hidden state."""
        return self._layer(self.active.config.fitted_router_layer)

    def _layer(self, fitted: int | None) -> int:
        config = self.active.config
        num_blocks, chosen = config.num_blocks or len(self.blocks), config.router_layer
        if isinstance(chosen, int):
            return min(chosen, num_blocks)
        # Adapters of earlier versions say None: a tenth of the depth. So it is before the first fit has chosen.
        return max(1, round(num_blocks / 10)) if fitted is None else min(fitted, num_blocks)

    @property
    def single_pass_routing(self) -> bool:
        """See :attr:`MediatorModel.single_pass_routing`."""
        return self.reads_in_one_pass(self.router_layer)

    def reads_in_one_pass(self, layer: int) -> bool:
        """Whether all routed layers lie above the first ``layer`` blocks."""
        return _lies_above(self.active.model, self.blocks, layer)

    def reading(self, settings: FitSettings | None = None) -> Reading:
        """How prompts are read and judged now; or would be by other settings, as while they are being fitted."""
        router, columns, fitted = self.active.fitted()
        settings = settings or fitted
        layer, config = self._layer(settings.fitted_router_layer), self.active.config
        return Reading(router, columns, layer, settings.turn_markers, settings.prompt_form, config.routing_turn)

    def fitted_reading(self) -> Reading:
        """The same.

        Raises:
            RouterNotFittedError: the router has not been fitted.
        """
        reading = self.reading()
        self.check_fitted(reading)
        return reading

    @staticmethod
    def check_fitted(reading: Reading) -> None:
        """Refuse a router that cannot judge yet.

        Raises:
            RouterNotFittedError: it has not been fitted.
        """
        if not reading.router.is_fitted:
            raise RouterNotFittedError(
                "the router is not fitted, so prompts cannot be routed. Fit it with model.fit_router(dataset, "
                "tokenizer) or `mediator-peft fit-router`; without texts, make one with "
                "model.fit_router_from_deltas(tokenizer) or `mediator-peft fit-router OUT --from-deltas`; or say which "
                "expert to use: expert_weights='name' or model.use_experts('name')."
            )

    @property
    def gate_settings(self) -> GateSettings:
        """How the gate turns scores into expert weights."""
        config, model = self.active.config, self.active.model
        # In training every expert takes part: a selection of one has weight 1 whatever its score, and no gradient.
        routing_top_p = 1.0 if model.training and torch.is_grad_enabled() else config.routing_top_p
        return GateSettings(config.ood_alpha, routing_top_p, config.fallback == "base", config.ood_beta)

    def new_router(self, config: MediatorConfig) -> Router:
        """An unfitted router for an adapter of this model."""
        hidden_size = self.active.model.config.get_text_config().hidden_size
        router = _kind(config)(len(config.expert_names or config.experts), hidden_size, config.seed)
        router.is_trainable = not config.inference_mode
        return router

    def of_kind(self, router: Router, config: MediatorConfig, settings: FitSettings) -> Router:
        """A router if it is of the kind that settings name; a new one of this kind if not."""
        config = copy.copy(config)
        settings.write_to(config)
        return router if isinstance(router, _kind(config)) else self.new_router(config).train(router.training)

    def put_settings(self, adapter_name: str, settings: FitSettings) -> None:
        """Change how an adapter's prompts are read; a router of another kind than the settings name is replaced."""
        with self.active.changes_wait():
            old: Any = self.active.routers[adapter_name]
            router = self.of_kind(old, self.active.configs[adapter_name], settings)
            self.active.put_settings(adapter_name, settings, router)

    def learn_turns(self, tokenizer: Any) -> None:
        """Note how the tokenizer marks user turns and what it adds to a plain text, so that neither changes a route."""
        self.active.put_settings(self.active.name, self.learned(tokenizer))

    def learned(self, tokenizer: Any) -> FitSettings:
        """The settings of now, with what is to be known of a tokenizer."""
        markers, form = turn_markers(tokenizer), prompt_form(tokenizer).to_config()
        return self.active.fitted()[2]._replace(turn_markers=markers, prompt_form=form)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, reading: Reading | None = None
    ) -> Tensor:
        """What the router sees of the text that is routed on, by ``Router.pool``: (B, T) token ids → (B, H) float32."""
        reading = reading or self.reading()
        return self.features_at(input_ids, attention_mask, [reading.layer], reading)[:, 0]

    @torch.no_grad()
    def features_at(
        self, input_ids: Tensor, attention_mask: Tensor | None, layers: Sequence[int], reading: Reading
    ) -> Tensor:
        """As :meth:`features`, at several depths by one pass.

        Args:
            input_ids: (B, T)
            attention_mask: (B, T) or None.
            layers: after how many blocks, in rising order.
            reading: how prompts are read; its own depth does not count.

        Returns:
            (B, D, H) float32
        """
        if self._board.merged is not None:
            raise UnsupportedError("prompts are read by the backbone, and a mix is merged into it: unmerge_adapter().")
        check_ids(input_ids)
        check_mask(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows, mask, pooled = self._rows_to_read(input_ids, mask, reading)
        states = self.states_at(layers, rows, mask)
        return torch.stack([self.pooled(hidden, pooled, reading.router) for hidden in states], dim=1)

    def states_at(self, layers: Sequence[int], rows: Tensor, mask: Tensor) -> list[Tensor]:
        """Hidden states of the backbone at several depths, (B, T, H) each; see :func:`hidden_states`."""
        with self._board.no_route(self._correction(len(rows))):
            model, sharded = self.active.model, is_sharded(self.active.model)
            # Only the root gathers what lies outside of the blocks.
            inner = model if sharded and not is_gathered(model) else model.base_model
            return hidden_states(inner, self.blocks, self.block_hook, layers, rows, mask, stops=not sharded)

    def _correction(self, batch_size: int) -> LayerRoute | None:
        """The correction of quantised weights, added while prompts are read: they are read nearly as by plain ones."""
        if not self.active.has_corrected_layers():
            return None
        return make_route(torch.ones(batch_size, 1), (CORRECTION,), False, None, None, is_sharded(self.active.model))

    def pooled(self, hidden: Tensor, mask: Tensor, router: Router) -> Tensor:
        """What a router sees of prompts; see :meth:`Router.pool`."""
        with float32_inside(hidden.device), onload_layer(self.active.routers):
            return router.pool(hidden, mask)

    def _rows_to_read(self, input_ids: Tensor, mask: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask, and the mask of what is pooled."""
        prompts = _formed_prompts(input_ids, mask, reading)
        if prompts is not None:
            return prompts.input_ids, prompts.attention_mask, prompts.pooled
        if self.reads_in_one_pass(reading.layer):
            return input_ids, mask, turn_mask(input_ids, mask, reading.turn_markers, reading.routing_turn)
        rows, mask = routing_rows(input_ids, mask, reading.turn_markers, reading.routing_turn)
        return rows, mask, mask

    def tokens_in_place(self, input_ids: Tensor, attention_mask: Tensor, reading: Reading) -> Tensor | None:
        """(B, T), 1 for each token that is routed on, where they can be read in the prompt's own pass; None elsewhere.

        A template, a system prompt or earlier turns would change what is read; such prompts take a second pass.
        """
        prompts = _formed_prompts(input_ids, attention_mask, reading)
        if prompts is not None:
            return prompts.places if prompts.in_place else None
        return turn_mask(input_ids, attention_mask, reading.turn_markers, reading.routing_turn)

    def within_positions(self, num_tokens: int) -> int:
        """As many tokens of a text as the model has positions for, where it looks these up in a table."""
        return min(num_tokens, table_of_positions(self.active.model) or num_tokens)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RouteOutput:
        """See :meth:`MediatorModel.route`."""
        reading = self.fitted_reading()
        return self._judged(reading.router, self.features(input_ids, attention_mask, reading))

    def routed_table(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Columns]:
        """Expert weights (B, C) of prompts, and the names of their columns."""
        reading = self.fitted_reading()
        return self.judged_table(self.features(input_ids, attention_mask, reading), reading)

    def judged_table(self, features: Tensor, reading: Reading) -> tuple[Tensor, Columns]:
        """(B, H) that were read so → expert weights (B, C), and the names of their columns."""
        return self._judged(reading.router, features).expert_weights, reading.columns

    def judge(self, features: Tensor) -> RouteOutput:
        """(B, H) → what the gate decides."""
        return self._judged(self.fitted_reading().router, features)

    def _judged(self, router: Router, features: Tensor) -> RouteOutput:
        check_router(router)
        features = features.to(router.known_novelty.device)
        readable, unreadable = split_unreadable(features)
        with float32_inside(features.device), onload_layer(self.active.routers):
            with torch.no_grad():
                ood_score, distance = router.ood_score(readable), router.distance(readable)
            settings = self.gate_settings
            output = gate(router.calibrated(readable), ood_score, distance, router.known, settings)
        return output if unreadable is None else to_the_base(output, unreadable, settings.fallback_column)

    @torch.no_grad()
    def explain(self, prompts: Any, tokenizer: Any, use_template: bool, max_length: int) -> list[Explanation]:
        """See :meth:`MediatorModel.explain`."""
        reading = self.fitted_reading()
        router = reading.router
        if isinstance(prompts, Mapping) and "input_ids" in prompts:
            ids = torch.as_tensor(prompts["input_ids"])
            mask = torch.as_tensor(prompts.get("attention_mask", torch.ones_like(ids)))
        else:
            ids, mask = _tokenised(prompts, tokenizer, use_template, self.within_positions(max_length))
        device = self.active.device
        features = self.features(ids.to(device), mask.to(device), reading).to(router.known_novelty.device)
        features, unreadable = split_unreadable(features)
        with float32_inside(features.device), onload_layer(self.active.routers):
            scores, ood_score = router.calibrated(features), router.ood_score(features)
            distance = router.distance(features)
        settings, columns = self.gate_settings, reading.columns
        return explain_rows(
            scores, ood_score, distance, router.known, settings, columns, unreadable, router.times_usual
        )


def _kind(config: MediatorConfig) -> type[Router]:
    """The class of an adapter's router."""
    return ROUTERS[config.router] if config.fitted_router is None else DELTA_ROUTERS[config.fitted_router]


def _formed_prompts(input_ids: Tensor, attention_mask: Tensor, reading: Reading) -> FormedPrompts | None:
    """Prompts in the form in which they are read for routing; None where the router was fitted without one."""
    if reading.prompt_form is None:
        return None
    form = PromptForm.from_config(reading.prompt_form)
    return formed(form, input_ids, attention_mask, reading.turn_markers, reading.routing_turn)


def check_ids(input_ids: Any) -> None:
    """Refuse token ids that hold no prompt.

    Raises:
        RoutingError: they are no (B, T) tensor, or there is no token.
    """
    shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
    if isinstance(input_ids, Tensor) and (input_ids.is_floating_point() or input_ids.is_complex()):
        raise RoutingError(f"token ids must be whole numbers, got {input_ids.dtype}. Embeddings are inputs_embeds=.")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise RoutingError(
            f"prompts are routed by token ids of shape (B, T) with at least one token, got {shape}. Tokenise with "
            "return_tensors='pt' and leave out empty prompts, or say which experts to use: expert_weights=."
        )


def check_mask(input_ids: Tensor, attention_mask: Any) -> None:
    """Refuse a mask that does not say of each token whether it belongs to the prompt.

    Args:
        input_ids: (B, T)
        attention_mask: (B, T), or None where all tokens do.

    Raises:
        UnsupportedError: it has another number of dimensions, or is a table of masks.
        RoutingError: it has another shape, or other entries than 0 and 1.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        is_tensor = isinstance(attention_mask, Tensor)
        shape = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise UnsupportedError(
            f"prompts are routed by an attention mask of shape (B, T), this one is {shape}. Give a 2-D mask, or say "
            "which experts to use: expert_weights=."
        )
    if attention_mask.shape != input_ids.shape:
        raise RoutingError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: give one "
            "entry a token."
        )
    if attention_mask.dtype != torch.bool and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise RoutingError(
            "attention_mask must hold 1 for the tokens of a prompt and 0 for padding. Masks that are added to scores, "
            "and numbers of packed prompts, say something else."
        )


def _lies_above(model: nn.Module, blocks: nn.ModuleList, layer: int) -> bool:
    """Whether all routed layers come after the first ``layer`` blocks, and a block follows these.

    Layers outside the blocks count as lying below, but for the language-model head, unless it is tied.
    """
    below = (module for block in list(blocks)[:layer] for module in block.modules())
    if layer >= len(blocks) or any(isinstance(module, MediatorLayer) for module in below):
        return False
    above = {module for block in list(blocks)[layer:] for module in block.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, MediatorLayer) and not getattr(model.config, "tie_word_embeddings", False):
        above.add(head)
    return all(module in above for module in model.modules() if isinstance(module, MediatorLayer))


def _tokenised(prompts: Any, tokenizer: Any, use_template: bool, max_length: int) -> tuple[Tensor, Tensor]:
    if not callable(tokenizer):
        raise RoutingError("give the tokenizer too: model.explain(prompt, tokenizer).")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise RoutingError(f"prompts are a text, a chat, a list of these, or input_ids=..., got {short(prompts)}.")
    one = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], Mapping)
    )
    has_template = getattr(tokenizer, "chat_template", None) is not None
    rows = []
    for prompt in [prompts] if one else prompts:
        if not isinstance(prompt, (str, list, tuple)):
            raise RoutingError(f"a prompt is a text or a chat, got {short(prompt)}.")
        if isinstance(prompt, str) and (fault := surrogate_fault(prompt)) is not None:
            raise RoutingError(f"a prompt {fault}.")
        if isinstance(prompt, str) and not (use_template and has_template):
            rows.append(tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"])
            continue
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, truncation=True, max_length=max_length, add_special_tokens=False)
        rows.append(encoded["input_ids"])
    if not rows:
        raise RoutingError("no prompts to explain.")
    return padded(rows)
