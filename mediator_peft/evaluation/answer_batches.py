"""Prompts with their answers as one batch, and what a model says of the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import pad_right


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts with their answers, padded on the right."""

    ids: Tensor
    """(B, T)"""

    mask: Tensor
    """(B, T)"""

    starts: tuple[int, ...]
    """(B,) position before the first token of each answer."""

    answers: tuple[Tensor, ...]
    """(B,) token ids of each answer, (n,)."""

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AnswerBatch:
        """From (token ids of the prompt, of the answer)."""
        padded = pad_right([[*prompt, *answer] for prompt, answer in rows])
        starts = tuple(len(prompt) - 1 for prompt, _ in rows)
        answers = tuple(torch.tensor(list(answer)) for _, answer in rows)
        return cls(padded["input_ids"], padded["attention_mask"], starts, answers)

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


def answer_logits(model: Any, batch: AnswerBatch) -> list[Tensor]:
    """Logits before each token of an answer: (n, V) for each row, float32."""
    device = next(model.parameters()).device
    width, first = batch.ids.shape[1], min(batch.starts)
    # The head over the whole vocabulary is dear: only positions from the shortest prompt's end on are needed.
    logits = model(
        input_ids=batch.ids.to(device),
        attention_mask=batch.mask.to(device),
        use_cache=False,
        logits_to_keep=width - first,
    ).logits
    skipped = width - logits.shape[1]
    return [
        logits[row, start - skipped : start - skipped + len(answer)].float()
        for row, (start, answer) in enumerate(zip(batch.starts, batch.answers, strict=True))
    ]
