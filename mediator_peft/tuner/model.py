"""The tuner: injects routed layers, routes each prompt once, and hands the expert weights down."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from typing_extensions import Self

from ..bank.expert_store import ExpertStore
from ..config import warn_of_old_name
from ..errors import UnsupportedError
from ..merge.builder import Bank
from ..ranks import Ranks
from ..registration import PREFIX
from ..routing.background import Background
from ..routing.calibration import CalibrationReport
from ..routing.calibration_data import Columns
from ..routing.explain import Explanation
from ..routing.gate import RouteOutput
from ..routing.routers import Router
from .active_adapter import ActiveAdapter
from .build_in_memory import build_in_memory
from .condensing import CondenseReport, condense
from .config import FitSettings, MediatorConfig
from .editing import add_expert, remove_expert
from .execution import check_execution
from .expert_weights import ExpertWeights
from .fitting import fit_router
from .fitting_from_deltas import DeltaReport, fit_router_from_deltas
from .forward import RoutedForward
from .fused_experts import wrap_experts
from .injection import (
    add_deltas,
    check_layers,
    routed,
    unwrap_layers,
    warn_of_other_quantization,
    warn_of_other_reading,
)
from .layer import MediatorLayer, reading_weights, routed_layers
from .merging import AdapterMerging
from .request_board import RequestBoard
from .routing import PromptRouter
from .saving import AdapterFiles
from .tied_head import tie_head


class _State(dict[str, Any]):
    """The state of a model. A fit or an edit of another thread is in a deep copy of it whole or not at all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        with self["active"].changes_wait(), self["prompt_router"].block_hook.none_added():
            return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> Any:
        return (dict, (dict(self),))


class MediatorModel(BaseTuner):
    """A backbone with sparse experts, mixed per prompt.

    Made by :func:`get_mediator_model`, :func:`load_mediator`, or by PEFT itself; its methods can be called on the
    ``PeftModel`` around it. It owns the parts that do the work, and hands each call to one of them.
    """

    prefix = PREFIX
    tuner_layer_cls = MediatorLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True
    model: Any  # a PreTrainedModel; nn.Module's own annotations know no more than Tensor | Module
    peft_config: dict[str, Any]  # of MediatorConfig

    # --- wrapping -----------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Make all parts. PEFT calls this from its ``__init__``, before it injects the first adapter."""
        self.mediator_router = nn.ModuleDict()
        """Adapter name → router. Its name is a part of the keys of saved adapters."""
        self.active = ActiveAdapter(model, self.peft_config, self.mediator_router, self._active_names)
        self.board = RequestBoard()
        self.prompt_router = PromptRouter(self.active, self.board)
        self.routed_forward = RoutedForward(self.active, self.board, self.prompt_router)
        self.merging = AdapterMerging(self.active, self.board, self.routed_forward)
        self.adapter_files = AdapterFiles(model)
        self._built: dict[str, Bank] = {}

    def _active_names(self) -> list[str]:
        return self.active_adapters

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the layers that the configuration names; none is a valid answer (the experts agree everywhere).

        A refused adapter leaves the model as it was.
        """
        try:
            config = self._build_or_check(model, adapter_name)
        except BaseException:
            if not self.mediator_router:
                self.routed_forward.remove()
                self.adapter_files.remove()
            raise
        wrap_experts(model, config.routed_modules or (), self.board)
        modules = dict(model.named_modules())
        for name in config.routed_modules or ():
            parent, _, child = name.rpartition(".")
            owner = modules[parent] if parent else model
            self._create_and_replace(config, adapter_name, modules[name], child, owner, name)
            if name not in self.targeted_module_names:
                self.targeted_module_names.append(name)
        tie_head(model)
        self._built.pop(adapter_name, None)
        warn_of_other_quantization(self.routed_layers().values(), config)
        warn_of_other_reading(self.routed_layers().values(), adapter_name, config)
        self.mediator_router[adapter_name] = self.prompt_router.new_router(config)
        config.bind(self.adapter_files.before_saving)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _build_or_check(self, model: nn.Module, adapter_name: str) -> MediatorConfig:
        """The configuration of an adapter that can be injected, built if it was not."""
        config: MediatorConfig = self.peft_config[adapter_name]
        if config.was_built_here and not config.inference_mode:  # with it, PEFT is about to load an adapter
            # The deltas went into another model, or under another name: they are computed anew.
            config = self.peft_config[adapter_name] = config.to_be_built()
        if not config.is_built:
            others = [name for name in self.peft_config if name != adapter_name]
            if others and config.merge_method != "base":
                raise UnsupportedError(
                    f"the model has adapters already ({', '.join(others)}), and merge_method={config.merge_method!r} "
                    "would change the weights that they belong to. Use merge_method='base', or unload() first."
                )
            self._built[adapter_name] = build_in_memory(model, config, partial(check_layers, model))
        else:
            check_layers(model, config.routed_modules or ())
            self.adapter_files.check_backbone(config)
            if config.routed_modules:
                self.active.awaited.add(adapter_name)
        return config

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
        layer = routed(target, parent, target_name, self.board)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        built = self._built.get(adapter_name)
        add_deltas(layer, adapter_name, peft_config, None if built is None else built.deltas[current_key])

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if not enabled:
            self.merging.unmerge()
        self.routed_forward.adapters_off = not enabled
        super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop one adapter with its bank and router."""
        super().delete_adapter(adapter_name)
        self.active.awaited.discard(adapter_name)
        self.active.begin_edition(adapter_name)
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
    def expert_names(self) -> list[str]:
        """Columns of the expert weights, in order; with ``fallback="base"`` the last is ``"base"``."""
        return self.active.config.columns

    def routed_layers(self) -> dict[str, MediatorLayer]:
        """Layer name → routed layer."""
        return routed_layers(self.model)

    @property
    def expert_store(self) -> ExpertStore | None:
        """Where deltas lie, if the configuration limits how many experts are held in memory."""
        return self.routed_forward.expert_store

    # --- running -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass.

        ``expert_weights=`` overrides routing. ``context_mask=`` (B, T) says which tokens the route is taken from: 1 for
        those of the prompt, 0 for an answer that is to be scored. All candidate answers to a prompt then have the same
        route.
        """
        if "expert_weights" in kwargs and self.board.merged is not None:
            self.routed_forward.check_not_merged("expert_weights=")
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, expert_weights: ExpertWeights = None, **kwargs: Any) -> Any:
        """``transformers``' ``generate``, with each prompt routed once before its first token.

        Args:
            *args: as for the wrapped model.
            expert_weights: use these instead of routing; None routes (or follows ``use_experts``).
            **kwargs: as for the wrapped model.
        """
        return self.routed_forward.generate(*args, expert_weights=expert_weights, **kwargs)

    @contextmanager
    def use_experts(self, expert_weights: ExpertWeights) -> Iterator[Self]:
        """Use these expert weights for every forward pass and generation inside the block; None is the backbone.

        The block is a context variable, as in Python's ``contextvars``: each thread and each asyncio task has its own.
        A task made inside the block, ``asyncio.to_thread`` and ``contextvars.copy_context().run`` carry it along, also
        past its end; a plain new thread begins without it and warns of it once, unless Python was told otherwise
        (``sys.flags.thread_inherit_context``). Generators share the context of whoever runs them: where two of them
        hold a block each and are run in turns, the block that was opened last counts for both; the end of the first
        warns of it.

        Expert weights are kept by name: an expert that is added inside the block gets weight 0, and a forward pass that
        asks for a removed expert is refused.

        Args:
            expert_weights: a name, a dict name -> weight, one of these or None a row, or a (C,) or (B, C) tensor.

        Raises:
            RoutingError: a name is unknown, or a shape does not fit.
            UnsupportedError: a mix is merged into the weights.
        """
        with self.routed_forward.request(*self.active.named_table(expert_weights), is_block=True):
            yield self

    @contextmanager
    def reading_weights(self) -> Iterator[Self]:
        """Read or copy the backbone's tensors inside the block, while other threads answer.

        Layers merge no mix meanwhile. Saving, ``state_dict``, copies and pickles see to it themselves; use it around
        what takes tensors from the model directly (``named_parameters``).
        """
        with reading_weights(self.model):
            yield self

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: transformers' continuous batching mixes the tokens of many prompts in one row.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "continuous batching (generate_batch) puts the tokens of many prompts into one row, which has one route. "
            "Use generate() with a batch of prompts, or merge one expert first: model.merge_and_unload("
            "expert_weights='name')."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def set_execution(self, execution: str | None) -> None:
        """Force how deltas are applied: ``"merged"``, ``"sparse"``, ``"dense"``, or None to let the library pick.

        Raises:
            ConfigError: any other name.
        """
        self.routed_forward.execution = check_execution(execution)

    def cache_merged_experts(self, experts: Sequence[str]) -> None:
        """Hold whole weights of hot experts beside the backbone's: one dense copy of the routed layers for each.

        Prompts that want one of them, or the backbone alone, then cost what the plain backbone costs, also side by side
        in one batch; ``()`` gives the memory back. Copies of the model start without.

        Args:
            experts: names of columns; they replace those kept before.

        Raises:
            RoutingError: a name is unknown.
            UnsupportedError: the backbone is quantised, offloaded or sharded.
        """
        self.merging.cache(experts)

    def keep_folded(self, experts: Sequence[str]) -> None:
        """Former name of :meth:`cache_merged_experts`."""
        warn_of_old_name("keep_folded", "cache_merged_experts")
        self.cache_merged_experts(experts)

    @property
    def reads_in_passing(self) -> bool:
        """Former name of :attr:`single_pass_routing`."""
        warn_of_old_name("reads_in_passing", "single_pass_routing")
        return self.single_pass_routing

    # --- routing -------------------------------------------------------------------------------------------------

    @property
    def router(self) -> Router:
        """The active adapter's router."""
        return self.active.router

    @property
    def router_layer(self) -> int:
        """After how many blocks the router reads the hidden state."""
        return self.prompt_router.router_layer

    @property
    def single_pass_routing(self) -> bool:
        """Whether a plain prompt is routed inside its own forward pass, without a second one.

        This is so where all routed layers lie above ``router_layer``. A prompt with a template, a system prompt or
        earlier turns still takes a second pass over the user's text alone, so that its route depends on nothing else.
        """
        return self.prompt_router.single_pass_routing

    def learn_turns(self, tokenizer: Any) -> None:
        """Note how the tokenizer marks user turns and what it adds to a plain text, so that neither changes a route."""
        self.prompt_router.learn_turns(tokenizer)

    def prompt_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pooled hidden state of the backbone over the text that is routed on: (B, T) token ids → (B, H) float32."""
        return self.prompt_router.features(input_ids, attention_mask)

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
        return self.prompt_router.route(input_ids, attention_mask)

    def explain(
        self, prompts: Any, tokenizer: Any = None, use_template: bool = True, max_length: int = 2048
    ) -> list[Explanation]:
        """Why prompts go where they go.

        Args:
            prompts: a text, a chat (list of messages), a list of these, or what a tokenizer returned.
            tokenizer: the backbone's; not needed for tokenised prompts.
            use_template: whether texts are rendered as a user's turn, where the tokenizer has a chat template.
            max_length: longer texts are cut after this many tokens.

        Returns:
            One explanation a prompt; ``str()`` of it is a sentence.

        Raises:
            RouterNotFittedError: the router has not been fitted.
            RoutingError: texts were given without a tokenizer.
        """
        return self.prompt_router.explain(prompts, tokenizer, use_template, max_length)

    def fit_router(
        self,
        dataset: Any,
        tokenizer: Any,
        text_column: str = "prompt",
        label_column: str = "expert",
        batch_size: int = 16,
        max_length: int = 2048,
        show_progress: bool = False,
        *,
        group_column: str | None = None,
        max_samples: int | None = None,
        split: str = "train",
        cache_folder: str | os.PathLike[str] | None = None,
        background: Background | str | os.PathLike[str] | None = None,
        augmented: bool = True,
        hard_negatives: bool = True,
        over_ranks: bool = False,
        variations: bool | None = None,
        neighbours: bool | None = None,
    ) -> CalibrationReport:
        """Fit the router on texts with known experts.

        Args:
            dataset: a ``datasets.Dataset``, ``DatasetDict`` or streaming dataset; a JSONL, CSV or Parquet file; or a
                dict expert name → texts, or any of these.
            tokenizer: the backbone's.
            text_column: column with the prompt, as it will be tokenised in use; or with a chat, a list of messages,
                which is rendered with the tokenizer's template.
            label_column: column with the expert's name.
            batch_size: texts per forward pass, more where they are short: until a pass has 512 tokens.
            max_length: longer texts are cut after this many tokens.
            show_progress: a bar on the error stream.
            group_column: column with what texts have in common (a template, a source). Whole groups are then held out
                together, so that the held-out statistics allow for unseen ones.
            max_samples: at most so many texts an expert, drawn by the configuration's seed; None takes all.
            split: which one of a ``DatasetDict``.
            cache_folder: keep features there, by content, for later fits on the same backbone.
            background: prompts of yours that belong to no expert, added to the library's background families:
                prompts, family → prompts, or a JSONL or text file. An empty list leaves out the library's as well, and
                with them the decision rule.
            augmented: fit on altered copies of the texts as well: words left out, letters mistyped, something said
                around it, put as another kind of request. So other wordings of a known task are recognised. Takes three
                times as long to read.
            hard_negatives: train the decision rule on hard negatives too: other requests about the words and numbers
                of the texts ("What does … mean?").
            over_ranks: share the reading of texts among the processes that torchrun started; each of them must call
                this with the same arguments, and ends with the same router.
            variations: former name of ``augmented``.
            neighbours: former name of ``hard_negatives``.

        Returns:
            Metrics of the fit on held-out texts.

        Raises:
            RoutingError: the data cannot be used.
        """
        if variations is not None:
            warn_of_old_name("variations", "augmented")
            augmented = variations
        if neighbours is not None:
            warn_of_old_name("neighbours", "hard_negatives")
            hard_negatives = neighbours
        return fit_router(
            self.prompt_router,
            dataset,
            tokenizer,
            Columns(text_column, label_column, group_column),
            batch_size=batch_size,
            max_length=max_length,
            max_samples=max_samples,
            split=split,
            cache_folder=cache_folder,
            background=background,
            augmented=augmented,
            hard_negatives=hard_negatives,
            show_progress=show_progress,
            ranks=Ranks() if over_ranks else Ranks.alone(),
        )

    def fit_router_from_deltas(
        self,
        tokenizer: Any,
        batch_size: int = 16,
        max_length: int = 2048,
        show_progress: bool = False,
        *,
        background: Background | str | os.PathLike[str] | None = None,
        over_ranks: bool = False,
    ) -> DeltaReport:
        """Make a router from the experts' deltas, without texts of theirs: a start until there are some.

        A router that :meth:`fit_router` fits on texts is better, and takes its place. See
        :mod:`~mediator_peft.routing.routers.spectral` for the formula; ``docs/routing.md`` has measurements.

        Args:
            tokenizer: the backbone's.
            batch_size: background prompts per forward pass.
            max_length: longer ones are cut after this many tokens.
            show_progress: a bar on the error stream.
            background: prompts of yours that belong to no expert, added to the library's background families.
            over_ranks: as for :meth:`fit_router`.

        Returns:
            What background prompts say of it.

        Raises:
            RoutingError: there are too few background prompts.
            UnsupportedError: there are no deltas at the depth of ``router_layer``, or two experts cannot be told apart.
        """
        return fit_router_from_deltas(
            self.prompt_router,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            background=background,
            show_progress=show_progress,
            ranks=Ranks() if over_ranks else Ranks.alone(),
        )

    # --- editing -------------------------------------------------------------------------------------------------

    def add_expert(self, name: str, checkpoint: Any, texts: Any = None, tokenizer: Any = None, **options: Any) -> None:
        """Add one expert to the built model; see :func:`mediator_peft.tuner.editing.add_expert`."""
        add_expert(self.prompt_router, name, checkpoint, texts, tokenizer, **options)

    def remove_expert(self, name: str) -> None:
        """Take one expert out of the built model; see :func:`mediator_peft.tuner.editing.remove_expert`."""
        remove_expert(self.active, name)

    def condense(self, **options: Any) -> CondenseReport:
        """Store equal experts once, and families as a shared delta and residuals; see
        :func:`mediator_peft.tuner.condensing.condense`."""
        with nullcontext() if options.get("dry_run") else self.board.alone("condense"):
            return condense(self.active, **options)

    # --- saving and loading --------------------------------------------------------------------------------------

    def set_backbone(self, path: str) -> None:
        """Say where the backbone lies (folder or hub id), so that ``save_pretrained`` need not write it."""
        self.adapter_files.know_backbone(path, None)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return AdapterFiles.saved_tensors(model, state_dict, adapter_name, FitSettings.of(config))  # type: ignore[arg-type]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put an adapter file's tensors into the model, and give PEFT the same tensors under the model's names."""
        tuner: Any = model.base_model
        tuner.board.check_idle("loading an adapter's tensors")
        state_dict = dict(state_dict)
        settings = AdapterFiles.fit_settings(state_dict)
        router = tuner.mediator_router[adapter_name]
        if settings is not None:
            router = tuner.prompt_router.of_kind(router, config, settings)
        loaded, store = tuner.adapter_files.load(config, router, adapter_name, state_dict)
        if settings is not None:
            tuner.active.put_settings(adapter_name, settings, router)
        tuner.routed_forward.expert_store = store
        if adapter_name in tuner.active.awaited:
            tuner.active.awaited.remove(adapter_name)
        else:
            tuner.active.begin_edition(adapter_name)
        return loaded

    # --- leaving -------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        expert_weights: ExpertWeights = None,
    ) -> None:
        """Write one fixed mix into the backbone's weights, until :meth:`unmerge_adapter` restores them bit for bit.

        Until then the model is a plain one: it routes nothing, and its forward pass has no locks, no hooks and no graph
        breaks, so that ``torch.compile(fullgraph=True)`` and ``torch.export`` take it.

        Args:
            adapter_names: one adapter; None takes the active one.
            safe_merge: refuse NaN and infinity before anything is written.
            expert_weights: one mix for all rows.

        Raises:
            RoutingError: no mix was given, or rows differ.
            AdapterError: ``safe_merge`` found NaN or infinity.
            UnsupportedError: the backbone is quantised or offloaded, a request is under way, or there is no such
                adapter.
        """
        self.merging.merge(expert_weights, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take the mix that :meth:`merge_adapter` wrote out of the weights, and route prompts again.

        Raises:
            UnsupportedError: no mix is merged.
        """
        if self.board.merged is None:
            raise UnsupportedError("no mix is merged, so there is nothing to take out: prompts are routed.")
        self.merging.unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a delta is one matrix only under a fixed mix. See :meth:`convert_to_lora`."""
        return False

    def convert_to_lora(
        self, rank: int | float, expert_weights: ExpertWeights, adapter_name: str = "default", progressbar: bool = False
    ) -> tuple[Any, dict[str, Tensor]]:
        """One fixed mix as a LoRA on this backbone, by PEFT's ``convert_to_lora``: a singular value decomposition.

        Args:
            rank: of each layer, or a share of squared singular values in (0, 1] that decides it.
            expert_weights: one mix for all rows.
            adapter_name: PEFT's name of the adapter.
            progressbar: show one.

        Returns:
            The LoRA's configuration and its tensors, for ``set_peft_model_state_dict``.

        Raises:
            RoutingError: rows of the mix differ.
            UnsupportedError: deltas of biases or embeddings, which have no place in such a LoRA.
        """
        return self.merging.as_lora(self, rank, expert_weights, adapter_name, progressbar)

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
            safe_merge: refuse NaN and infinity before anything is written.
            adapter_names: adapters whose mixes are added up; None takes the active one.
            expert_weights: one mix for all rows. Without it, that of the ``use_experts`` block around the call, or that
                merged by :meth:`merge_adapter`.

        Raises:
            RoutingError: no mix was given, or rows differ.
            AdapterError: ``safe_merge`` found NaN or infinity.
            UnsupportedError: the backbone is quantised or offloaded, there is no such adapter, or other threads have
                requests open.
        """
        with self.board.alone("merge_and_unload"):
            mixes = self.merging.mixes(expert_weights, adapter_names, board_mix=True)
            self.merging.merge_for_good(mixes, safe_merge, progressbar)
            return self.unload()

    def unload(self) -> nn.Module:
        """The wrapped model without routed layers: the backbone, or the mix merged into it.

        Raises:
            UnsupportedError: other threads or tasks have requests open.
        """
        with self.board.alone("unload"):
            return self._unloaded()

    def _unloaded(self) -> nn.Module:
        self.merging.unmerge()
        unwrap_layers(self.model)
        self.routed_forward.remove()
        self.adapter_files.remove()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def get_extra_state(self) -> Tensor:
        """What fitting wrote into the configurations, for a state dict: without it a fitted router reads other states.

        Returns:
            JSON as bytes, (N,) uint8, so that any file of tensors can hold it.
        """
        settings = {adapter: FitSettings.of(config)._asdict() for adapter, config in self.peft_config.items()}
        return torch.tensor(list(json.dumps(settings, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave, for adapters of the same names."""
        for adapter, settings in json.loads(bytes(state.tolist())).items():
            if adapter in self.peft_config:
                self.prompt_router.put_settings(adapter, FitSettings(*map(settings.get, FitSettings._fields)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; a router that is fitted or edited meanwhile is in it as it was, whole."""
        with self.active.changes_wait():
            return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.board.check_idle("load_state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No __deepcopy__: PeftModel would find it by its __getattr__, and be copied as what it wraps.
        if self.board.merged is not None:
            # Before anything is copied: while a mix is merged, the model has no hooks.
            next(iter(self.routed_layers().values())).unmerge()
        made: Any = super().__reduce_ex__(protocol)
        return (*made[:2], _State(made[2]), *made[3:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.board.unmerge = self.merging.unmerge
        for config in self.peft_config.values():
            config.bind(self.adapter_files.before_saving)
