"""Scores of one system on one task, kept in a file each, so that a stopped study goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..demo.tasks import Item
from ..evaluation.batching import PromptSettings
from ..evaluation.generation import ExpertChoice, Memo, PromptedModel, is_plainly_greedy
from ..evaluation.report import write_json
from ..evaluation.runner import answer_room
from ..evaluation.scoring import MATCHERS

GENERAL = "general"
"""The task of the base's own answers to general questions."""

CONTINUATION = "continuation"
"""How answers that were cut off are judged: by the loss of their tokens, the end of text left out."""

SCORE_VERSION = 1
"""To be raised when scoring changes, so that older files are not used."""


@dataclass(frozen=True)
class Scores:
    """One system on the first items of one task."""

    right: list[bool]
    """(N,) whether each greedy answer is right; empty where only losses are measured."""

    losses: list[float]
    """(M,) mean negative log-likelihood of each reference answer's tokens, in nats."""

    answers: list[str]
    """(N,) greedy answers. With exact match, a wrong one may end with its first token that makes it wrong."""

    seconds: float
    """Wall-clock time; it says little where other processes ran."""

    def first(self, sizes: Sizes) -> Scores:
        """Those of the first items alone."""
        answers, losses = sizes.answers, sizes.losses
        return Scores(self.right[:answers], self.losses[:losses], self.answers[:answers], self.seconds)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def loss(self) -> float:
        """Mean over items."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Sizes:
    """How many items of a task are measured."""

    answers: int
    losses: int


class ScoreBook:
    """A folder of scores; each file's name holds a hash of all that its figures depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, system: str, task: str, depends: Any) -> Scores | None:
        """The scores of an earlier run; None where there are none."""
        path = self._path(system, task, depends)
        return Scores(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def keep(self, system: str, task: str, depends: Any, scores: Scores) -> Scores:
        """Write scores, and give them back."""
        write_json(asdict(scores), self._path(system, task, depends))
        return scores

    def _path(self, system: str, task: str, depends: Any) -> Path:
        text = json.dumps([SCORE_VERSION, system, task, depends], sort_keys=True)
        name = f"{system}--{task}".replace(" ", "_").replace("/", "_")
        return self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def put_together(parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """Scores of items that different weights answered, in the order of the items.

    Args:
        parts: (places of the items, ascending; their scores). Each place stands in one part.
    """

    def in_order(values: Callable[[Scores], list[Any]]) -> list[Any]:
        found = {place: value for places, scores in parts for place, value in zip(places, values(scores), strict=False)}
        return [found[place] for place in sorted(found)]

    return Scores(
        in_order(lambda scores: scores.right),
        in_order(lambda scores: scores.losses),
        in_order(lambda scores: scores.answers),
        round(sum(scores.seconds for _, scores in parts), 1),
    )


def score_items(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    match: str,
    sizes: Sizes,
    *,
    expert_weights: ExpertChoice = None,
    batch_size: int = 25,
    memo: Memo | None = None,
) -> Scores:
    """Let a system answer the first items of a task, and measure the losses of the reference answers.

    Args:
        model: a Mediator model or a plain one.
        tokenizer: of the model.
        items: of the task.
        match: how answers are judged.
        sizes: how many items.
        expert_weights: which expert answers.
        batch_size: rows at once.
        memo: of this very model.
    """
    started = time.perf_counter()
    asked = PromptedModel(model, tokenizer, PromptSettings(batch_size), memo or Memo.empty())
    room = answer_room(tokenizer, [item.answer for item in items])
    answers: list[str] = []
    if match == CONTINUATION:
        measured = items[: sizes.losses]
        texts = [item.prompt for item in measured], [item.answer for item in measured]
        losses = asked.losses(*texts, expert_weights, is_ended=False)
    elif match == "exact" and is_plainly_greedy(model):
        answers, losses = _compared(asked, items, sizes, expert_weights, room)
    else:
        prompts = [item.prompt for item in items[: sizes.answers]]
        answers = asked.answers(prompts, expert_weights, room) if prompts else []
        measured = items[: sizes.losses]
        losses = asked.losses([item.prompt for item in measured], [item.answer for item in measured], expert_weights)
    right = [MATCHERS[match](answer, item.answer) for answer, item in zip(answers, items, strict=False)]
    return Scores(right, losses, answers, round(time.perf_counter() - started, 1))


def _compared(
    asked: PromptedModel, items: Sequence[Item], sizes: Sizes, expert_weights: ExpertChoice, room: int
) -> tuple[list[str], list[float]]:
    """Answers as far as exact match needs them, and losses, from one pass; only open answers are generated."""
    chosen = items[: max(sizes.answers, sizes.losses)]
    found = asked.compared([item.prompt for item in chosen], [item.answer for item in chosen], expert_weights)
    places = [place for place, each in enumerate(found[: sizes.answers]) if each.is_open]
    answers = [each.text for each in found[: sizes.answers]]
    if places:
        whole = asked.answers([chosen[place].prompt for place in places], expert_weights, room)
        for place, answer in zip(places, whole, strict=True):
            answers[place] = answer
    return answers, [each.loss for each in found[: sizes.losses]]
