"""Expert Merging: coefficients by tensor, trained on unlabelled prompts to imitate each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...progress import Progress, no_progress
from .merged_model import MergedModel
from .objective import Example, loss_of

START = 0.1


class Found(NamedTuple):
    """What a search found."""

    coefficients: dict[str, Any]
    """Entries ``experts`` and ``tensors`` or ``blocks`` of ``coefficients.json``."""

    about: dict[str, Any]
    """How the search went; plain data."""


def expert_merging(
    merged: MergedModel,
    examples: Sequence[Example],
    *,
    epochs: int = 1,
    rate: float = 0.5,
    accumulation: int = 8,
    anchor: float = 5.0,
    hidden_blocks: Sequence[int] = (),
    hidden_weight: float = 1.0,
    temperature: float = 1.0,
    num_chunks: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Found:
    r"""Train one coefficient for each expert and linear layer.

    .. math:: \theta = \theta_0 + \sum_k \sigma(z_{k,p})\, \tau_{k,p}, \qquad
        L = \operatorname{CE}(p_k, p_\theta) + w_h \operatorname{MSE}(h_k, h_\theta)
            + r \operatorname{mean} |\sigma(z) - 0.1|

    *Expert Merging*, https://arxiv.org/abs/2509.25712; defaults are those of its command line (5 prompts a task, one
    epoch, step 0.5, accumulation 8, gradient norm at most 1, r 5, no hidden states). σ(z) starts at 0.1. Embeddings,
    norms and biases stay the base's. The optimiser, Adam, is our choice. The weight's gradient is taken once, and its
    inner products with the task vectors are the gradients of the coefficients.

    Args:
        merged: base and experts.
        examples: with teachers.
        epochs: times that the examples are gone through.
        rate: step of Adam.
        accumulation: examples in a step.
        anchor: r.
        hidden_blocks: whose outputs are compared; the examples must have been made with them.
        hidden_weight: w_h.
        temperature: of the cross-entropy.
        num_chunks: chunks of output rows with a coefficient each (Expert Merging++, one number for all layers here).
        seed: of the order of the examples.
        progress: told of each example.
    """
    names, num_experts = merged.linear, len(merged.experts)
    logits = torch.full((len(names), num_experts, num_chunks), math.log(START / (1 - START)), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=rate)
    count = len(examples)
    order = [number for epoch in range(epochs) for number in Random(seed + epoch).sample(range(count), count)]
    places = {name: place for place, name in enumerate(names)}
    losses: list[float] = []
    merged.watch(names)
    with progress("expert merging", len(order)) as advance:
        for start in range(0, len(order), accumulation):
            batch = order[start : start + accumulation]
            chosen = logits.detach().sigmoid()
            merged.set(dict(zip(names, chosen, strict=True)))
            total = torch.zeros_like(logits)
            for number in batch:
                loss = loss_of(merged, examples[number], hidden_blocks, hidden_weight, temperature)
                torch.autograd.backward(loss / len(batch))
                losses.append(float(loss.detach()))
                advance()
            for name, gradient in merged.gradients():
                total[places[name]] = merged.gradient_of_coefficients(name, gradient, num_chunks)
            _step(logits, total, chosen, anchor, optimiser)
    merged.watch([])
    final = logits.detach().sigmoid()
    tensors = {name: _entry(merged.experts, final[place]) for name, place in places.items()}
    means = dict(zip(merged.experts, final.mean(dim=(0, 2)).tolist(), strict=True))
    about = {"losses": losses, "mean_coefficients": means, "steps": math.ceil(len(order) / accumulation)}
    return Found({"experts": dict.fromkeys(merged.experts, 0.0), "tensors": tensors}, about)


def _step(logits: Tensor, of_chosen: Tensor, chosen: Tensor, anchor: float, optimiser: torch.optim.Optimizer) -> None:
    """One step, from the gradient of the loss by the coefficients."""
    pull = anchor * (chosen - START).sign() / chosen.numel()
    logits.grad = (of_chosen + pull) * chosen * (1 - chosen)
    torch.nn.utils.clip_grad_norm_([logits], 1.0)
    optimiser.step()
    optimiser.zero_grad()


def _entry(experts: Sequence[str], numbers: Tensor) -> dict[str, Any]:
    rows = [row if len(row) > 1 else row[0] for row in numbers.tolist()]
    return dict(zip(experts, rows, strict=True))
