"""The part of the tuner that decides expert weights: features, router, gate, and what they say of a prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import RouterNotFittedError, RoutingError
from ..ranks import Ranks
from ..routing.block_hook import BlockTap
from ..routing.calibration import CalibrationReport
from ..routing.calibration_data import Columns
from ..routing.explain import Explanation, explain_rows
from ..routing.features import hidden_state, mean_over_tokens
from ..routing.gate import GateSettings, RouteOutput, gate
from ..routing.routers import ROUTERS, Router
from ..structure import find_blocks
from .chat_turns import routing_rows, turn_markers, turn_mask
from .config import MediatorConfig
from .editing import add_expert, remove_expert
from .fitting import fit_router, padded
from .requests import RouteBoard
from .single_pass import lies_above


class PromptRouting:
    """Methods of the tuner around its router."""

    model: Any
    training: bool
    active_adapters: list[str]
    mediator_router: nn.ModuleDict
    _board: RouteBoard
    _tap: BlockTap

    if TYPE_CHECKING:

        @property
        def _config(self) -> MediatorConfig: ...

    @property
    def router(self) -> Router:
        """The active adapter's router."""
        return self.mediator_router[self.active_adapters[0]]  # type: ignore[return-value]

    @property
    def router_layer(self) -> int:
        """After how many blocks the router reads the hidden state."""
        num_blocks = self._config.num_blocks or len(self._blocks())
        chosen = self._config.router_layer
        return max(1, round(num_blocks / 10)) if chosen is None else min(chosen, num_blocks)

    def _new_router(self, config: MediatorConfig) -> Router:
        hidden_size = self.model.config.get_text_config().hidden_size
        return ROUTERS[config.router](len(config.expert_names or config.experts), hidden_size, config.seed)

    def _blocks(self) -> nn.ModuleList:
        # Finding them takes as long as a hundredth of a short prompt. Kept past nn.Module, as no part of this module.
        kept: nn.ModuleList | None = self.__dict__.get("_found_blocks")
        if kept is None:
            kept = self.__dict__["_found_blocks"] = find_blocks(self.model)
        return kept

    def learn_turns(self, tokenizer: Any) -> None:
        """Note how the tokenizer's chat template marks user turns, for ``routing_turn``."""
        self._config.turn_markers = turn_markers(tokenizer)

    @torch.no_grad()
    def prompt_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pooled hidden state of the backbone over the turns that are routed on: (B, T) token ids → (B, H) float32."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        markers, routing_turn = self._config.turn_markers, self._config.routing_turn
        if self.single_pass_routing:
            rows, mask, pooled = input_ids, mask, turn_mask(input_ids, mask, markers, routing_turn)
        else:
            rows, mask = routing_rows(input_ids, mask, markers, routing_turn)
            pooled = mask
        with self._board.no_route():
            hidden = hidden_state(self.model.base_model, self._blocks(), self._tap, self.router_layer, rows, mask)
        return mean_over_tokens(hidden, pooled)

    @property
    def single_pass_routing(self) -> bool:
        """Whether a prompt is judged inside its own forward pass, without a second one.

        So it is where all routed layers lie above ``router_layer``. The turns that are routed on are then read where
        they stand, with what comes before them in view; otherwise they are read as prompts of their own.
        """
        return lies_above(self.model, self._blocks(), self.router_layer)

    @property
    def _gate_settings(self) -> GateSettings:
        config = self._config
        # In training every expert takes part: a selection of one has weight 1 whatever its score, and no gradient.
        routing_top_p = 1.0 if self.model.training and torch.is_grad_enabled() else config.routing_top_p
        return GateSettings(config.ood_alpha, routing_top_p, config.fallback == "base")

    def _fitted_router(self) -> Router:
        if not self.router.is_fitted:
            raise RouterNotFittedError(
                "the router is not fitted, so prompts cannot be routed. Fit it with model.fit_router(dataset, "
                "tokenizer) or `mediator-peft calibrate`, or say which expert to use: expert_weights='name' or "
                "model.use_experts('name')."
            )
        return self.router

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
        self._fitted_router()
        return self._judge(self.prompt_features(input_ids, attention_mask))

    def _judge(self, features: Tensor) -> RouteOutput:
        """(B, H) → what the gate decides."""
        router = self._fitted_router()
        features = features.to(router.known_novelty.device)
        with torch.no_grad():
            novelty, distance = router.novelty(features), router.distance(features)
        return gate(router.calibrated(features), novelty, distance, router.known, self._gate_settings)

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
        router = self._fitted_router()
        if isinstance(prompts, Mapping) and "input_ids" in prompts:
            ids = torch.as_tensor(prompts["input_ids"])
            mask = torch.as_tensor(prompts.get("attention_mask", torch.ones_like(ids)))
        else:
            ids, mask = _tokenised(prompts, tokenizer, use_template, max_length)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            features = self.prompt_features(ids.to(device), mask.to(device)).to(router.known_novelty.device)
            scores, novelty, distance = router.calibrated(features), router.novelty(features), router.distance(features)
        return explain_rows(scores, novelty, distance, router.known, self._gate_settings, self._config.columns)

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
        background: Sequence[str] | None = None,
        variations: bool = True,
        neighbours: bool = True,
        over_ranks: bool = False,
    ) -> CalibrationReport:
        """Fit the router on texts with known experts.

        Args:
            dataset: a ``datasets.Dataset``, ``DatasetDict`` or streaming dataset; a JSONL, CSV or Parquet file; or a
                dict expert name → texts, or any of these.
            tokenizer: the backbone's.
            text_column: column with the prompt, as it will be tokenised in use; or with a chat, a list of messages,
                which is rendered with the tokenizer's template.
            label_column: column with the expert's name.
            batch_size: texts per forward pass.
            max_length: longer texts are cut after this many tokens.
            show_progress: a bar on the error stream.
            group_column: column with what texts have in common (a template, a source). Whole groups are then held out
                together, so that the yardstick of novelty allows for unseen ones.
            max_samples: at most so many texts an expert, drawn by the configuration's seed; None takes all.
            split: which one of a ``DatasetDict``.
            cache_folder: keep features there, by content, for later fits on the same backbone.
            background: ordinary prompts that belong to no expert, as a user would write them. None takes eighty of
                ours, in English for the most part, unless the tokenizer cannot read them; an empty list takes none.
            variations: fit on altered copies of the texts as well: words left out, letters mistyped, something said
                around it. So other wordings of a known task are known. Reading takes four times as long.
            neighbours: fit on other requests about the texts' words and numbers, too ("What does … mean?"), as prompts
                of no expert. So requests near to a task are more often left to the base. Twice as many texts, short
                ones, are read besides. Only beside ordinary prompts, and not used by ``prototype``.
            over_ranks: share the reading of texts among the processes that torchrun started; each of them must call
                this with the same arguments, and ends with the same router.

        Returns:
            What held-out texts say of the fit.

        Raises:
            RoutingError: the data cannot be used.
        """
        return fit_router(
            self,  # type: ignore[arg-type]
            dataset,
            tokenizer,
            Columns(text_column, label_column, group_column),
            batch_size=batch_size,
            max_length=max_length,
            max_samples=max_samples,
            split=split,
            cache_folder=cache_folder,
            background=background,
            variations=variations,
            neighbours=neighbours,
            show_progress=show_progress,
            ranks=Ranks() if over_ranks else Ranks.alone(),
        )

    def add_expert(self, name: str, checkpoint: Any, texts: Any = None, tokenizer: Any = None, **options: Any) -> None:
        """Add one expert to the built model; see :func:`mediator_peft.tuner.editing.add_expert`."""
        add_expert(self, name, checkpoint, texts, tokenizer, **options)  # type: ignore[arg-type]

    def remove_expert(self, name: str) -> None:
        """Take one expert out of the built model; see :func:`mediator_peft.tuner.editing.remove_expert`."""
        remove_expert(self, name)  # type: ignore[arg-type]


def _tokenised(prompts: Any, tokenizer: Any, use_template: bool, max_length: int) -> tuple[Tensor, Tensor]:
    if tokenizer is None:
        raise RoutingError("give the tokenizer too: model.explain(prompt, tokenizer).")
    is_chat = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    one = isinstance(prompts, str) or (is_chat and isinstance(prompts[0], Mapping))
    has_template = getattr(tokenizer, "chat_template", None) is not None
    rows = []
    for prompt in [prompts] if one else prompts:
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
