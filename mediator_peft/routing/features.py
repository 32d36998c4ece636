"""What the router sees of a prompt: the backbone's pooled hidden state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .block_hook import BlockHook


class _Reached(Exception):
    """The last hidden state that was wanted has been seen; the layers above need not run."""


def hidden_states(
    model: nn.Module,
    blocks: nn.ModuleList,
    block_hook: BlockHook,
    layers: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor,
    stops: bool = True,
) -> list[Tensor]:
    """Hidden states of ``model`` after the first blocks; those above the last one wanted are not run.

    Args:
        model: the transformer without its language-model head.
        blocks: its repeated blocks.
        block_hook: of this model.
        layers: how many blocks, from 0 (embedding alone) to all; in rising order, each once.
        input_ids: (B, T)
        attention_mask: (B, T), 1 for real tokens, padding on either side.
        stops: False runs all blocks, for models that must not be left in the middle of a pass.

    Returns:
        One (B, T, H) for each of ``layers``.
    """
    found: list[Tensor] = []

    def listen(hidden: Tensor) -> None:
        found.append(hidden)
        if len(found) < len(layers):
            block_hook.start(blocks, layers[len(found)], listen)
        elif stops:
            raise _Reached

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    # Positions count real tokens, so that padding on the left changes nothing where positions are absolute.
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    block_hook.start(blocks, layers[0], listen)
    try:
        model(**inputs)
    except _Reached:
        return found
    finally:
        block_hook.stop()
    if len(found) < len(layers):
        raise RuntimeError("the model ran without reaching its blocks")
    return found


def mean_over_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    r"""Mean hidden state over a prompt's real tokens, :math:`z(x)`.

    Args:
        hidden: (B, T, H)
        attention_mask: (B, T), 1 for real tokens; a row without any gives zeros.

    Returns:
        (B, H) float32
    """
    mask = attention_mask.to(hidden.device).unsqueeze(-1)
    # Chosen, not multiplied: a padded position may hold anything, NaN included.
    total = torch.where(mask > 0, hidden.float(), 0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)
