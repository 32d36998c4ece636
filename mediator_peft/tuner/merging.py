"""One fixed mix in the backbone's weights: until it is taken out (``merge_adapter``), or for good."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import convert_to_lora
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import AdapterError, RoutingError, UnsupportedError
from .active_adapter import ActiveAdapter
from .embedding import MediatorEmbedding
from .expert_weights import ExpertWeights, Mix, by_name, expert_weight_rows, make_route
from .forward import RoutedForward
from .fused_experts import is_fused
from .merged_weight import mixed_bias
from .request_board import RequestBoard
from .sharded import check_not_sharded


class AdapterMerging:
    """Writes mixes into the weights of a wrapped model.

    While one is merged, the model is a plain one: no route, no lock and no hook of ours is left in its forward pass.

    Args:
        active: the active adapter.
        board: of the same model.
        forward: what routes the model's forward passes otherwise.
    """

    def __init__(self, active: ActiveAdapter, board: RequestBoard, forward: RoutedForward) -> None:
        self._active, self._board, self._forward = active, board, forward
        board.unmerge = self.unmerge

    def mixes(self, spec: ExpertWeights, adapter_names: Sequence[str] | None, board_mix: bool) -> dict[str, Mix]:
        """Adapter name → its mix.

        Args:
            spec: as the caller gave it; one mix for all rows.
            adapter_names: None takes the active adapter.
            board_mix: without ``spec``, take the mix of the ``use_experts`` block around the call, or that merged now.

        Raises:
            RoutingError: no mix was given, or rows differ.
            UnsupportedError: there is no such adapter.
        """
        names = [self._active.name] if adapter_names is None else list(dict.fromkeys(adapter_names))
        unknown = [name for name in names if name not in self._active.configs]
        if unknown or not names:
            raise UnsupportedError(
                f"no adapter to merge named {unknown or names}; the model has {sorted(self._active.configs)}."
            )
        merged = self._board.merged
        if spec is None and board_mix and merged is not None and names == [merged[0]]:
            return {merged[0]: merged[1]}
        if spec is None and board_mix:
            request = self._board.request
            if request is not None:
                now = self._active.config.columns
                spec = by_name(request.expert_weights, request.columns, now)  # type: ignore[arg-type]
        if spec is None:
            raise RoutingError(
                "say which mix to merge: merge_adapter(expert_weights='name') or merge_and_unload(expert_weights="
                "'name'). What a prompt's route decides anew for each prompt cannot be merged."
            )
        return {name: self._mix(name, spec) for name in names}

    def _mix(self, adapter_name: str, spec: ExpertWeights) -> Mix:
        config = self._active.configs[adapter_name]
        table = expert_weight_rows(spec, config.columns, len(config.expert_names or ()))
        if len(table.unique(dim=0)) > 1:
            raise RoutingError("a merged model has one mix; the rows of expert_weights differ.")
        column_map = self._active.column_map(adapter_name)
        return make_route(table[:1].detach(), config.columns, False, None, column_map).groups[0].mix

    def merge(self, spec: ExpertWeights, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
        """See :meth:`MediatorModel.merge_adapter`."""
        if self._board.has_requests:
            raise UnsupportedError(
                "a generation or a use_experts block is under way. Merge outside of them: "
                "model.merge_adapter(expert_weights='name')."
            )
        check_not_sharded(self._active.model, "merge_adapter")
        mixes = self.mixes(spec, adapter_names, board_mix=False)
        if len(mixes) > 1:
            raise UnsupportedError("merge_adapter takes one adapter at a time; merge_and_unload takes several.")
        name, mix = next(iter(mixes.items()))
        if self._board.merged == (name, mix):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        self.unmerge()
        layers = self._active.layers
        for layer in layers.values():
            layer.check_mergeable()
        if safe_merge:
            self._check_finite(mixes)
        with self._board.merging():
            for layer in layers.values():
                layer.hold_mix(name, mix)
            self._board.merged = (name, mix)
        self._forward.remove()

    def unmerge(self) -> None:
        """Bring all weights back to the backbone's, bit for bit, and route prompts again."""
        if self._board.merged is None:
            return
        check_not_sharded(self._active.model, "unmerge_adapter")
        self._board.merged = None
        for layer in self._active.layers.values():
            layer.merged_adapters.clear()
            layer.unmerge()
        self._forward.attach()

    def merge_for_good(self, mixes: dict[str, Mix], safe_merge: bool, progressbar: bool) -> None:
        """Write mixes into the weights; nothing is kept to take them out again."""
        check_not_sharded(self._active.model, "merge_and_unload")
        layers = self._active.layers
        for layer in layers.values():
            layer.check_mergeable()
        self.unmerge()
        if safe_merge:
            self._check_finite(mixes)
        with self._board.merging():
            for layer in tqdm(layers.values(), disable=not progressbar, desc="merging"):
                layer.merge_mixes(mixes)

    def cache(self, experts: Sequence[str]) -> None:
        """See :meth:`MediatorModel.cache_merged_experts`."""
        if experts:
            check_not_sharded(self._active.model, "cache_merged_experts")
        adapter = self._active.name
        mixes = tuple(self.mixes(name, [adapter], board_mix=False)[adapter] for name in experts)
        for layer in self._active.layers.values():
            layer.cache_merged_experts(mixes)

    def as_lora(
        self, tuner: BaseTuner, rank: int | float, spec: ExpertWeights, adapter_name: str, progressbar: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """See :meth:`MediatorModel.convert_to_lora`; ``tuner`` is that model."""
        with self._converting(spec, adapter_name):
            # Names of layers count from the PeftModel around the tuner.
            outer: Any = nn.Module()
            outer.base_model, outer.peft_config = tuner, tuner.peft_config
            return convert_to_lora(outer, rank, adapter_name, progressbar)

    @contextmanager
    def _converting(self, spec: ExpertWeights, adapter_name: str) -> Iterator[None]:
        """Show PEFT's ``convert_to_lora`` all routed layers, with one mix, inside the block.

        Raises:
            RoutingError: rows of the mix differ.
            UnsupportedError: deltas of biases, embeddings or fused experts, which have no place in such a LoRA.
        """
        check_not_sharded(self._active.model, "convert_to_lora")
        mix = self.mixes(spec, [adapter_name], board_mix=True)[adapter_name]
        layers = self._active.layers
        for name, layer in layers.items():
            if is_fused(layer):
                raise UnsupportedError(f"{name!r} is a matrix of fused experts, which PEFT cannot convert to LoRA.")
            if isinstance(layer, MediatorEmbedding) or mixed_bias(layer.bank(adapter_name), mix) is not None:
                raise UnsupportedError(f"{name!r} has deltas of a bias or an embedding, which LoRA layers do not have.")
        config: Any = self._active.configs[adapter_name]
        targets, self._board.converted = config.target_modules, mix
        config.target_modules = set(layers)
        try:
            yield
        finally:
            config.target_modules, self._board.converted = targets, None

    @torch.no_grad()
    def _check_finite(self, mixes: dict[str, Mix]) -> None:
        """Refuse NaN and infinity, before anything is written.

        Raises:
            AdapterError: a merged weight or the adapter's router has some.
        """
        for name in mixes:
            tensors = [*self._active.routers[name].parameters(), *self._active.routers[name].buffers()]
            if not all(torch.isfinite(tensor).all() for tensor in tensors):
                raise _broken(name, "the router")
        for place, layer in self._active.layers.items():
            # One by one first, so that the message names the adapter.
            for part in [*({name: mix} for name, mix in mixes.items()), mixes]:
                merged = layer.merged_weight(part)
                if merged is not None and not torch.isfinite(merged).all():
                    raise _broken(", ".join(part), place)


def _broken(adapter_name: str, place: str) -> AdapterError:
    return AdapterError(
        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {place} holds NaN or "
        "infinity. Build or fit it again, or use a wider dtype."
    )
