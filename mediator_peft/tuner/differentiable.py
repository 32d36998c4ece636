"""Deltas through which gradients reach the expert weights, without keeping a dense delta for the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bank.layer_bank import LayerBank


class _MixedDelta(torch.autograd.Function):
    """``sum_k w_k (S_k x + b_k)``; each ``S_k`` is unpacked once on the way there and once on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bank: LayerBank, columns: tuple[str, ...]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.bank, ctx.columns = bank, columns
        total = torch.zeros((), device=x.device)
        for column, name in enumerate(columns):
            delta = bank.get(name)
            if delta is None:
                continue
            part = x.float() @ delta.dense().T
            if delta.bias is not None:
                part += delta.bias
            total = total + weights[:, column, None, None] * part
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weights = ctx.saved_tensors
        gradient = gradients[0].float()
        to_weights = torch.zeros_like(weights)
        to_x = torch.zeros_like(x, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for column, name in enumerate(ctx.columns):
            delta = ctx.bank.get(name)
            if delta is None:
                continue
            back = gradient @ delta.dense()
            to_weights[:, column] = (back * x.float()).sum(dim=(1, 2))
            if delta.bias is not None:
                to_weights[:, column] += (gradient @ delta.bias).sum(dim=1)
            if to_x is not None:
                to_x += weights[:, column, None, None] * back
        return None if to_x is None else to_x.to(x.dtype), to_weights, None, None


def mixed_output(x: Tensor, weights: Tensor, bank: LayerBank, columns: tuple[str, ...]) -> Tensor:
    """What the deltas add to a layer's output; columns of weight zero are computed too, for they have a gradient.

    Args:
        x: (B, T, I)
        weights: (B, C) float32
        bank: deltas of this layer.
        columns: names of the C columns.

    Returns:
        (B, T, O) float32
    """
    return _MixedDelta.apply(x, weights.to(x.device), bank, columns)
