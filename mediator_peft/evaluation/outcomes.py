"""Labels calibration prompts by outcome: each is assigned to the expert that answers it correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import FALLBACK_EXPERT
from ..progress import Advance
from .batching import AS_USUAL, PromptSettings
from .generation import PromptedModel
from .prompts import TaskItem
from .scoring import MATCHERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Outcomes(NamedTuple):
    """What answers say of prompts."""

    experts: dict[str, list[str]]
    """Expert → prompts that it answers right and the fallback does not."""

    ordinary: list[str]
    """Prompts that the fallback answers right and the nearest expert does not."""

    num_undecided: int
    """Prompts that both of them answer right, or neither."""


def judge_outcomes(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[TaskItem],
    settings: PromptSettings = AS_USUAL,
    *,
    max_new_tokens: int = 64,
    advance: Advance = lambda: None,
) -> Outcomes:
    """Answer each prompt once by its nearest expert and once by the fallback, greedily.

    A distance cannot tell a new wording, which the expert answers correctly, from a near-OOD prompt, which it answers
    worse than the base; the answers can (our choice, measured in ``docs/routing.md``).

    Args:
        model: a Mediator model whose router is fitted; that says which expert is the nearest.
        tokenizer: of its backbone.
        items: prompts of any kind, with reference answers.
        settings: how they are put to the model.
        max_new_tokens: an answer is cut off here.
        advance: called twice for every prompt.

    Raises:
        RoutingError: the router is not fitted.
    """
    prompts, asked = [item.prompt for item in items], PromptedModel(model, tokenizer, settings)
    routes = asked.routes(prompts)
    fallback = FALLBACK_EXPERT if FALLBACK_EXPERT in model.expert_names else None

    def right(expert: str | None, places: Sequence[int]) -> list[bool]:
        answers = asked.answers([prompts[place] for place in places], expert, max_new_tokens, advance)
        return [
            MATCHERS[items[place].match](answer, items[place].answer)
            for place, answer in zip(places, answers, strict=True)
        ]

    by_fallback = right(fallback, range(len(items)))
    found = Outcomes({name: [] for name in model.expert_names if name != FALLBACK_EXPERT}, [], 0)
    for name, own in found.experts.items():
        places = [place for place, route in enumerate(routes) if route.nearest == name]
        for place, by_expert in zip(places, right(name, places), strict=True):
            if by_expert != by_fallback[place]:
                (own if by_expert else found.ordinary).append(prompts[place])
    num_decided = len(found.ordinary) + sum(len(own) for own in found.experts.values())
    return found._replace(num_undecided=len(items) - num_decided)
