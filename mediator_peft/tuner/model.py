"""The tuner: injects routed layers, routes each prompt once, and hands the expert weights down."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from tqdm import tqdm

from ..bank.expert_store import ExpertStore
from ..config import warn_of_old_name
from ..errors import RoutingError, UnsupportedError
from ..merge.builder import Bank
from ..methods.rounding import ROUNDINGS
from ..registration import PREFIX
from ..routing.block_hook import BlockTap
from . import saving as persistence
from .build_in_memory import build_in_memory
from .config import MediatorConfig
from .embedding import MediatorEmbedding, tie_head, untie_head
from .execution import check_execution
from .expert_weights import ExpertWeights, make_route
from .forward import RoutedForward
from .layer import MediatorLayer
from .quantized import lay_out_plainly, quantization_of
from .requests import RouteBoard
from .routing import PromptRouting


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    lay_out_plainly(module)


class MediatorModel(RoutedForward, PromptRouting, persistence.AdapterFiles, BaseTuner):
    """A backbone with sparse experts, mixed per prompt.

    Made by :func:`get_mediator_model`, :func:`load_mediator`, or by PEFT itself; its methods can be called on the
    ``PeftModel`` around it.
    """

    prefix = PREFIX
    tuner_layer_cls = MediatorLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True
    model: Any  # a PreTrainedModel; nn.Module's own annotations know no more than Tensor | Module
    peft_config: dict[str, Any]  # of MediatorConfig

    # --- wrapping -----------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._board = RouteBoard()
        self._tap = BlockTap()
        self._adapters_off = False
        self._execution: str | None = None
        self.expert_store: ExpertStore | None = None
        self._built: dict[str, Bank] = {}
        self.mediator_router = nn.ModuleDict()
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            model.register_state_dict_pre_hook(_before_saving),
        ]

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
        if not config.is_built:
            if any(isinstance(module, MediatorLayer) for module in model.modules()):
                raise UnsupportedError(
                    "this model carries a Mediator adapter already; unload() it before building one."
                )
            self._built[adapter_name] = build_in_memory(model, config)
        modules = dict(model.named_modules())
        for name in config.routed_modules:
            target = modules.get(name)
            if target is None:
                raise UnsupportedError(f"the adapter has deltas for {name!r}, which this model has not.")
            parent, _, child = name.rpartition(".")
            self._create_and_replace(config, adapter_name, target, child, modules[parent] if parent else model, name)
            if name not in self.targeted_module_names:
                self.targeted_module_names.append(name)
        tie_head(model)
        self._built.pop(adapter_name, None)
        self._warn_of_other_quantization(config)
        self.mediator_router[adapter_name] = self._new_router(config)
        config.bind(self._on_save)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, MediatorLayer):
            kind = MediatorEmbedding if isinstance(target, nn.Embedding) else MediatorLayer
            layer = kind(target, self._board)
            self._replace_module(parent, target_name, layer, target)
        bank = layer.add_bank(adapter_name, peft_config.encoding)
        quantization = quantization_of(layer.base_layer)
        bank.is_corrected = quantization is not None and quantization == peft_config.for_quantization
        built = self._built.get(adapter_name)
        if built is not None:
            for column, delta in built.deltas[current_key].items():
                bank.put(column, delta.to(layer.base_layer.weight.device))

    def _warn_of_other_quantization(self, config: MediatorConfig) -> None:
        kinds = {kind for layer in self.routed_layers().values() if (kind := quantization_of(layer.base_layer))}
        others = sorted(kinds & set(ROUNDINGS) - {config.for_quantization})
        if others and config.for_quantization is not None:
            warnings.warn(
                f"the adapter's correction is for a backbone in {config.for_quantization}, this one is in "
                f"{', '.join(others)}: its layers go without. Load it in {config.for_quantization}, or build with "
                f"for_quantization={others[0]!r}.",
                stacklevel=2,
            )

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

    def routed_layers(self) -> dict[str, MediatorLayer]:
        """Layer name → routed layer."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, MediatorLayer)}

    def set_execution(self, execution: str | None) -> None:
        """Force how deltas are applied: ``"merged"``, ``"sparse"``, ``"dense"``, or None to let the library pick.

        Raises:
            ConfigError: any other name.
        """
        self._execution = check_execution(execution)

    def cache_merged_experts(self, experts: Sequence[str]) -> None:
        """Hold whole weights of hot experts beside the backbone's: one dense copy of the routed layers for each.

        Prompts that want one of them, or the backbone alone, then cost what the plain backbone costs, also side by side
        in one batch; ``()`` gives the memory back. Copies of the model start without.

        Args:
            experts: names of columns; they replace those kept before.

        Raises:
            RoutingError: a name is unknown.
            UnsupportedError: the backbone is quantised or offloaded.
        """
        for name in experts:
            self._parse(name)
        for layer in self.routed_layers().values():
            layer.cache_merged_experts(tuple(experts))

    def keep_folded(self, experts: Sequence[str]) -> None:
        """Former name of :meth:`cache_merged_experts`."""
        warn_of_old_name("keep_folded", "cache_merged_experts")
        self.cache_merged_experts(experts)

    @property
    def reads_in_passing(self) -> bool:
        """Former name of :attr:`single_pass_routing`."""
        warn_of_old_name("reads_in_passing", "single_pass_routing")
        return self.single_pass_routing

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
            layer.unmerge()
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        untie_head(self.model)
        for handle in self._hooks:
            handle.remove()
        self._tap.remove()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for config in self.peft_config.values():
            config.bind(self._on_save)
