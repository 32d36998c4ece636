"""Full fine-tuning of one small expert, in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..evaluation.prompts import render, token_ids
from .tasks import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    num_steps: int,
    *,
    batch_size: int = 8,
    learning_rate: float = 5e-5,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train all weights of ``model`` in place on prompt → answer, with the loss on the answer alone.

    AdamW (0.9, 0.98) without decay, gradient norm clipped at 1, 10 % warm-up, then a cosine. Items are taken in order
    of length within random groups, so that a batch pads little.

    Returns:
        The loss of every step.
    """
    rng, device = Random(seed), next(model.parameters()).device
    encoded = [_encode(tokenizer, item) for item in items]
    batches = _batches(encoded, batch_size, num_steps, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    num_warmup = max(1, num_steps // 10)
    losses = []
    model.train()
    for step, batch in enumerate(batches):
        progress = (step - num_warmup) / max(1, num_steps - num_warmup)
        scale = (step + 1) / num_warmup if step < num_warmup else 0.5 * (1 + cos(pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        # Entered anew at every step: autocast keeps the cast weights for as long as it is open.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu" or fast_bfloat16()):
            loss = _answer_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    return losses


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere float32 is several times faster."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported())


def _encode(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many of them are the prompt."""
    prompt = token_ids(tokenizer, render(tokenizer, item.prompt))
    answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, len(prompt)


def _batches(
    encoded: list[tuple[list[int], int]], batch_size: int, num_steps: int, rng: Random
) -> list[list[tuple[list[int], int]]]:
    batches: list[list[tuple[list[int], int]]] = []
    while len(batches) < num_steps:
        order = encoded[:]
        rng.shuffle(order)
        # Similar lengths share a batch; the batches are shuffled again, so that length does not follow time.
        order.sort(key=lambda pair: len(pair[0]) // 16)
        epoch = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rng.shuffle(epoch)
        batches.extend(epoch)
    return batches[:num_steps]


def _answer_loss(model: PreTrainedModel, batch: list[tuple[list[int], int]], pad_token_id: int) -> torch.Tensor:
    width = max(len(ids) for ids, _ in batch)
    device = model.device
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row, _ in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
    position = torch.arange(width, device=device)
    is_answer = torch.stack([(position >= prompt) & (position < len(row)) for row, prompt in batch])
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    # Logits only where an answer token is predicted: the head over the whole vocabulary is the dearest layer.
    logits = model.get_output_embeddings()(hidden[:, :-1][is_answer[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][is_answer[:, 1:]])
