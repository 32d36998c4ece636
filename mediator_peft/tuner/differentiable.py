"""Deltas through which gradients reach the expert weights, without keeping a dense delta for the way back.

Layers add their part of the gradient to one table, and an operation on the embedding's output, which runs last on the
way back, hands the sum to the expert weights. So it does not matter whether a block's forward pass is recorded once or,
as re-entrant gradient checkpointing does, anew inside a backward pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bank.layer_bank import LayerBank
from .expert_weights import LayerRoute, WeightGradient


class _Anchor(torch.autograd.Function):
    """The hidden state as it is; on the way back, what the layers above have collected goes to the expert weights."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, gradient: WeightGradient) -> Tensor:
        ctx.gradient = gradient
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return gradients[0] if ctx.needs_input_grad[0] else None, ctx.gradient.take(), None


@torch.compiler.disable
def anchor(hidden: Tensor, route: LayerRoute) -> Tensor:
    """Embeddings (B, T, H) as they are, tied to the route's expert weights for the way back."""
    if route.gradient is None or not route.is_differentiable:
        return hidden
    route.gradient.is_anchored = True
    anchored: Tensor = _Anchor.apply(hidden, route.expert_weights, route.gradient)
    return anchored


class _MixedDelta(torch.autograd.Function):
    """``sum_k w_k (S_k x + b_k)``; each ``S_k`` is unpacked once on the way there and once on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        bank: LayerBank,
        columns: tuple[str, ...],
        gradient: WeightGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.bank, ctx.columns, ctx.gradient = bank, columns, gradient
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
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
        if ctx.gradient is not None:
            ctx.gradient.add(to_weights)
        return (
            None if to_x is None else to_x.to(x.dtype),
            to_weights if ctx.gradient is None else None,
            None,
            None,
            None,
        )


def mixed_output(x: Tensor, bank: LayerBank, route: LayerRoute) -> Tensor:
    """What the deltas add to a layer's output; columns of weight zero are computed too, for they have a gradient.

    Args:
        x: (B, T, I)
        bank: deltas of this layer.
        route: with expert weights (B, C).

    Returns:
        (B, T, O) float32
    """
    weights = route.expert_weights.to(x.device)
    # What does not depend on the embeddings is not reached from the anchor: it hands its gradient on by itself.
    is_collected = route.gradient is not None and route.gradient.is_anchored and x.requires_grad
    output: Tensor = _MixedDelta.apply(
        x, weights.detach() if is_collected else weights, bank, route.columns, route.gradient if is_collected else None
    )
    return output
