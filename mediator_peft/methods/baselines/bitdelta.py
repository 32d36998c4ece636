"""BitDelta: the sign of every entry and one scale a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..merging.row import TensorContext
from .row import NUMBER_BITS, Baseline, Bits, is_linear, num_entries, whole_numbers


def restore(task_vectors: Tensor, number: int, context: TensorContext, survey: None) -> Tensor:
    r""":math:`\operatorname{mean}|\Delta| \cdot \operatorname{sgn} \Delta` for linear layers, all else as it is.

    BitDelta, https://arxiv.org/abs/2402.10193, equation 2. A zero counts as +, as in the authors' code: the scale is
    added to weights that fine-tuning left alone. The paper then trains the scales on the expert's logits, which is left
    out here: no data is needed.

    Returns:
        (*shape)
    """
    delta = task_vectors[number]
    if not is_linear(context):
        return delta.clone()
    return torch.where(delta >= 0, 1.0, -1.0) * delta.abs().double().mean().float()


def bits(context: TensorContext, num_experts: int) -> Bits:
    """One an entry of linear layers and 16 for the scale; 16 an entry of all else (embeddings, norms)."""
    if is_linear(context):
        return Bits(0.0, float(num_entries(context) + NUMBER_BITS))
    return whole_numbers(context)


BITDELTA = Baseline(
    restore,
    bits,
    paper="BitDelta, arXiv 2402.10193",
    text="signs and one scale for each matrix of a block; everything else in 16 bits",
)
