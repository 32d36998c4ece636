"""What the router sees of a prompt: the backbone's pooled hidden state."""

from __future__ import annotations

import inspect
import threading

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """The hidden state that was wanted; the layers above need not run."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def hidden_state(
    model: nn.Module, blocks: nn.ModuleList, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Hidden state of ``model`` after its first ``layer`` blocks; the others are not run.

    Args:
        model: the transformer without its language-model head.
        blocks: its repeated blocks.
        layer: how many of them to run, from 0 (embedding alone) to all.
        input_ids: (B, T)
        attention_mask: (B, T), 1 for real tokens, padding on either side.

    Returns:
        (B, T, H)
    """

    # Another thread may be inside the same blocks on its own business.
    owner = threading.get_ident()

    def stop_before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if threading.get_ident() == owner:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

    def stop_after(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        if threading.get_ident() == owner:
            raise _Reached(output if isinstance(output, Tensor) else output[0])

    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(stop_before, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(stop_after)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    # Positions count real tokens, so that padding on the left changes nothing where positions are absolute.
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
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
