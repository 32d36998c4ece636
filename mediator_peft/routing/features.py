"""What the router sees of a prompt: the backbone's pooled hidden state."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .block_hook import BlockTap


class _Reached(Exception):
    """The hidden state that was wanted; the layers above need not run."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def hidden_state(
    model: nn.Module, blocks: nn.ModuleList, tap: BlockTap, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Hidden state of ``model`` after its first ``layer`` blocks; the others are not run.

    Args:
        model: the transformer without its language-model head.
        blocks: its repeated blocks.
        tap: of this model.
        layer: how many of them to run, from 0 (embedding alone) to all.
        input_ids: (B, T)
        attention_mask: (B, T), 1 for real tokens, padding on either side.

    Returns:
        (B, T, H)
    """

    def stop(hidden: Tensor) -> None:
        raise _Reached(hidden)

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    # Positions count real tokens, so that padding on the left changes nothing where positions are absolute.
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    tap.start(blocks, layer, stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        tap.stop()
    raise RuntimeError("the model ran without reaching its blocks")


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
