"""The tuner: injects routed layers, routes each prompt once, and hands the expert weights down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from tqdm import tqdm

from ..config import MediatorConfig
from ..errors import RouterNotFittedError, RoutingError, UnsupportedError
from ..registration import PREFIX
from ..routing.calibration import CalibrationReport
from ..routing.features import hidden_state, mean_over_tokens
from ..routing.gate import RouteOutput, gate
from ..routing.routers import ROUTERS, Router
from ..structure import find_blocks
from . import persistence
from .execution import check_execution
from .fitting import fit_router
from .layer import MediatorLayer
from .memory_build import build_in_memory
from .requests import RouteBoard
from .weights import ExpertWeights, LayerRoute, expand_rows, expert_weight_rows, make_route

_CACHE_TAG = "mediator_expert_weights"


class MediatorModel(persistence.AdapterFiles, BaseTuner):
    """A backbone with sparse experts, mixed per prompt.

    Made by :func:`get_mediator_model`, :func:`load_mediator`, or by PEFT itself; its methods can be called on the
    ``PeftModel`` around it.
    """

    prefix = PREFIX
    tuner_layer_cls = MediatorLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True

    # --- wrapping -----------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(config, MediatorConfig):
            raise UnsupportedError(f"a MediatorModel takes a MediatorConfig, got {type(config).__name__}.")
        if not hasattr(self, "_board"):
            self._board = RouteBoard()
            self._adapters_off = False
            self._execution: str | None = None
            self._built: dict[str, Any] = {}
            self.mediator_router = nn.ModuleDict()
        if not config.is_built:
            if any(isinstance(module, MediatorLayer) for module in model.modules()):
                raise UnsupportedError("this model carries a Mediator adapter already; unload() it before building one.")
            self._built[adapter_name] = build_in_memory(model, config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the layers that the configuration names; none is a valid answer (the experts agree everywhere)."""
        config = self.peft_config[adapter_name]
        modules = dict(model.named_modules())
        for name in config.routed_modules:
            target = modules.get(name)
            if target is None:
                raise UnsupportedError(f"the adapter has deltas for {name!r}, which this model has not.")
            parent, _, child = name.rpartition(".")
            self._create_and_replace(config, adapter_name, target, child, modules[parent] if parent else model, name)
            if name not in self.targeted_module_names:
                self.targeted_module_names.append(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, MediatorLayer):
            layer = MediatorLayer(target, self._board)
            self._replace_module(parent, target_name, layer, target)
        bank = layer.add_bank(adapter_name, peft_config.values)
        built = self._built.get(adapter_name)
        if built is not None:
            for column, delta in built.deltas[current_key].items():
                bank.put(column, delta)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._built.pop(adapter_name, None)
        self.mediator_router[adapter_name] = self._new_router(config)
        config.bind(self._on_save)
        if not hasattr(self, "_hooks"):
            self._add_hooks()

    def _add_hooks(self) -> None:
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._adapters_off = not enabled
        super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop one adapter with its bank and router."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.mediator_router:
            del self.mediator_router[adapter_name]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                "adapter_names= picks among PEFT adapters and does nothing here. Use expert_weights=, one name a row."
            )
        yield

    # --- what is active ------------------------------------------------------------------------------------------

    @property
    def _config(self) -> MediatorConfig:
        if len(self.active_adapters) != 1:
            raise UnsupportedError(
                f"one Mediator adapter can be active at a time, not {self.active_adapters}. Mix experts of one adapter "
                "with expert_weights=."
            )
        return self.peft_config[self.active_adapters[0]]

    @property
    def expert_names(self) -> list[str]:
        """Columns of the expert weights, in order; with ``fallback="base"`` the last is ``"base"``."""
        return self._config.columns

    @property
    def router(self) -> Router:
        """The active adapter's router."""
        return self.mediator_router[self.active_adapters[0]]  # type: ignore[return-value]

    def routed_layers(self) -> dict[str, MediatorLayer]:
        """Layer name → routed layer."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, MediatorLayer)}

    def set_execution(self, execution: str | None) -> None:
        """Force how deltas are applied: ``"fold"``, ``"sparse"``, ``"densify"``, or None to let the library pick.

        Raises:
            ConfigError: any other name.
        """
        self._execution = check_execution(execution)

    def _new_router(self, config: MediatorConfig) -> Router:
        hidden_size = self.model.config.get_text_config().hidden_size
        return ROUTERS[config.router](len(config.expert_names or config.experts), hidden_size)

    def _blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)

    @property
    def router_layer(self) -> int:
        """After how many blocks the router reads the hidden state."""
        num_blocks = self._config.num_blocks or len(self._blocks())
        chosen = self._config.router_layer
        return max(1, round(num_blocks / 10)) if chosen is None else min(chosen, num_blocks)

    # --- routing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prompt_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pooled hidden state of the backbone: (B, T) token ids → (B, H) float32."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self._board.no_route():
            hidden = hidden_state(self.model.base_model, self._blocks(), self.router_layer, input_ids, mask)
        return mean_over_tokens(hidden, mask)

    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> RouteOutput:
        """Decide the expert weights of each prompt.

        Args:
            input_ids: (B, T)
            attention_mask: (B, T), 1 for real tokens; padding may be on either side.
            token_type_ids: what some tokenizers return besides; not used.

        Raises:
            RouterNotFittedError: the router has not been fitted.
        """
        if not self.router.is_fitted:
            raise RouterNotFittedError(
                "the router is not fitted, so prompts cannot be routed. Fit it with model.fit_router(dataset, tokenizer) "
                "or `mediator-peft calibrate`, or say which expert to use: expert_weights='name' or "
                "model.use_experts('name')."
            )
        features = self.prompt_features(input_ids, attention_mask)
        features = features.to(self.router.known_novelty.device)
        with torch.no_grad():
            novelty = self.router.novelty(features)
        return gate(
            self.router.scores(features),
            novelty,
            self.router.known_novelty,
            ood_alpha=self._config.ood_alpha,
            top_p=self._config.top_p,
            fallback_column=self._config.fallback == "base",
        )

    def fit_router(
        self,
        dataset: Any,
        tokenizer: Any,
        text_column: str = "prompt",
        label_column: str = "expert",
        batch_size: int = 16,
        max_length: int = 2048,
        show_progress: bool = False,
    ) -> CalibrationReport:
        """Fit the router on texts with known experts.

        Args:
            dataset: a ``datasets.Dataset``, or a dict expert name → texts.
            tokenizer: the backbone's.
            text_column: column with the prompt, as it will be tokenised in use.
            label_column: column with the expert's name.
            batch_size: texts per forward pass.
            max_length: longer texts are cut after this many tokens.
            show_progress: a bar on the error stream.

        Returns:
            What held-out texts say of the fit.

        Raises:
            RoutingError: the data cannot be used.
        """
        return fit_router(self, dataset, tokenizer, text_column, label_column, batch_size, max_length, show_progress)

    def _parse(self, spec: ExpertWeights) -> Tensor:
        config = self._config
        return expert_weight_rows(spec, config.columns, len(config.expert_names or ()))

    @contextmanager
    def use_experts(self, expert_weights: ExpertWeights) -> Iterator[MediatorModel]:
        """Use these expert weights for every forward pass and generation inside the block; None is the backbone."""
        with self._request(self._parse(expert_weights)):
            yield self

    @contextmanager
    def _request(self, table: Tensor) -> Iterator[None]:
        try:
            with self._board.open_request(table):
                yield
        finally:
            for layer in self.routed_layers().values():
                layer.unfold()

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
            table = self._parse(expert_weights)
        elif self._board.request is not None:
            return self.model.generate(*args, **kwargs)
        else:
            table = self._route_request(args, kwargs)
        with self._request(table):
            return self.model.generate(*args, **kwargs)

    def _route_request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        known = _cache_weights(kwargs.get("past_key_values"))
        if known is not None:
            return known
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._mask_from_padding(input_ids, kwargs)
        return self.route(input_ids, mask).expert_weights.detach()

    def _mask_from_padding(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What ``generate`` itself assumes when no mask is given: padding tokens, unless they also end texts."""
        settings = kwargs.get("generation_config") or self.model.generation_config
        pad, eos = kwargs.get("pad_token_id", settings.pad_token_id), settings.eos_token_id
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return (input_ids != pad).long()

    # --- forward passes ------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spec = kwargs.pop("expert_weights", None)
        self._board.route = None if self._adapters_off else self._layer_route(spec, args, kwargs)
        self._board.keep_for_backward(self._board.route if torch.is_grad_enabled() else None)
        return args, kwargs

    def _layer_route(self, spec: ExpertWeights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerRoute:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        rows = inputs if inputs is not None else kwargs.get("inputs_embeds")
        if rows is None:
            raise RoutingError("a forward pass needs input_ids or inputs_embeds.")
        request = self._board.request
        if spec is not None:
            table, may_fold = self._parse(spec), False
        elif request is not None:
            table, may_fold = request, self._board.has_one_mix and not torch.is_grad_enabled()
        else:
            table, may_fold = self._route_forward(inputs, kwargs), False
        return make_route(expand_rows(table, len(rows)), self.expert_names, may_fold, self._execution)

    def _route_forward(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        known = _cache_weights(kwargs.get("past_key_values"))
        if known is not None:
            return known
        if input_ids is None:
            raise RoutingError("prompts are routed by their token ids; with inputs_embeds give expert_weights=.")
        return self.route(input_ids, kwargs.get("attention_mask")).expert_weights

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        route = self._board.route
        if route is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None:
                setattr(cache, _CACHE_TAG, route.expert_weights.detach())
        if not torch.is_grad_enabled():
            self._board.route = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass; ``expert_weights=`` overrides routing."""
        return self.model(*args, **kwargs)

    # --- leaving -------------------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        expert_weights: ExpertWeights = None,
    ) -> nn.Module:
        """One fixed mix as a plain transformers model.

        Args:
            progressbar: show one.
            safe_merge: refuse a result with infinite values.
            adapter_names: not used; one adapter is active.
            expert_weights: one mix for all rows. Without it, that of the ``use_experts`` block around the call.

        Raises:
            RoutingError: no mix was given, or rows differ.
        """
        table = self._board.request if expert_weights is None else self._parse(expert_weights)
        if table is None:
            raise RoutingError(
                "say which mix to merge: merge_and_unload(expert_weights='name'), or call it inside "
                "`with model.use_experts(...)`."
            )
        if len(table.unique(dim=0)) > 1:
            raise RoutingError("a merged model has one mix; the rows of expert_weights differ.")
        mix = make_route(table[:1], self.expert_names, False, None).groups[0].mix
        for layer in tqdm(self.routed_layers().values(), disable=not progressbar, desc="merging"):
            layer.merge_mix(mix, safe_merge)
            layer.merged_adapters.append(self.active_adapters[0])
        return self.unload()

    def unload(self) -> nn.Module:
        """The wrapped model without routed layers: the backbone, or the mix merged into it."""
        for name, layer in self.routed_layers().items():
            layer.unfold()
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        for handle in self._hooks:
            handle.remove()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for config in self.peft_config.values():
            config.bind(self._on_save)


def _cache_weights(cache: Any) -> Tensor | None:
    """Expert weights that a carried-over cache was filled under; None for none or an empty cache."""
    if cache is None or not cache.get_seq_length():
        return None
    return getattr(cache, _CACHE_TAG, None)
