"""Routing inside the prompt's own forward pass, where nothing that is routed lies below the router's layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .caches import cache_weights
from .layer import MediatorLayer


def lies_above(model: nn.Module, blocks: nn.ModuleList, layer: int) -> bool:
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


def readable_mask(kwargs: dict[str, Any], input_ids: Tensor | None) -> Tensor | None:
    """The mask of a forward pass that a route can be taken from; None where the pass is not of that kind.

    It must see whole prompts from their start (no cache yet), with a plain mask, outside of autograd and compilation,
    and with positions that do not count padding.
    """
    cache = kwargs.get("past_key_values")
    if cache is not None and (cache.get_seq_length() or cache_weights(cache) is not None):
        return None
    if input_ids is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        return None
    pads_left = bool((mask[:, 0] == 0).any())
    return None if pads_left and kwargs.get("position_ids") is None else mask
