"""Prompts with answers: whoever answers right gets them."""

from types import SimpleNamespace

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from fake_mediator import TakesExperts

from mediator_peft.evaluation.batching import PromptSettings
from mediator_peft.evaluation.outcomes import judge_outcomes
from mediator_peft.evaluation.prompts import TaskItem


class Canned(TakesExperts):
    """Every column has one answer to everything; prompts with a digit are nearest to math, others to code."""

    answers = {"math": "one", "code": "two", "base": "three"}

    def __init__(self, tokenizer, names):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.tokenizer, self.expert_names = tokenizer, names
        self.num_generated = 0

    def route(self, input_ids, attention_mask):
        digits = torch.tensor(self.tokenizer("0123456789", add_special_tokens=False)["input_ids"])
        is_math = torch.isin(input_ids, digits).any(dim=1)
        scores = torch.stack([is_math.float(), 1 - is_math.float()], dim=1)
        # Nothing is trusted, and the nearest is known for all that.
        weights = torch.zeros(len(input_ids), len(self.expert_names))
        return SimpleNamespace(
            expert_weights=weights, scores=scores, uncertainty=weights.sum(dim=1), is_ood=weights.sum(dim=1) == 0
        )

    def generate(self, input_ids, **kwargs):
        self.num_generated += len(input_ids)
        weights = self.active.reshape(-1, len(self.expert_names))[0]
        name = self.expert_names[int(weights.argmax())] if weights.any() else "base"
        ids = self.tokenizer(self.answers[name], add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([ids]).expand(len(input_ids), -1)], dim=1)


ITEMS = [
    TaskItem("1 to math", "one"),
    TaskItem("1 to nobody", "four"),
    TaskItem("1 spoilt by math", "three"),
    TaskItem("1 for code, which is not the nearest", "two"),
    TaskItem("to code", "two"),
    TaskItem("spoilt by code", "three"),
    TaskItem("to nobody either", "four", "contains"),
    TaskItem("to code in other words", "two", "contains"),
]


@pytest.mark.parametrize("names", [["math", "code", "base"], ["math", "code"]])
def test_the_one_who_is_right_gets_the_prompt(names):
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    model, steps = Canned(tokenizer, names), []
    found = judge_outcomes(model, tokenizer, ITEMS, PromptSettings(batch_size=3), advance=lambda: steps.append(1))
    assert found.experts == {"math": ["1 to math"], "code": ["to code", "to code in other words"]}
    assert found.ordinary == ["1 spoilt by math", "spoilt by code"]
    assert found.num_undecided == len(ITEMS) - 5
    assert len(steps) == model.num_generated == 2 * len(ITEMS)


def test_nothing_asked_nothing_found():
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    found = judge_outcomes(Canned(tokenizer, ["math", "code", "base"]), tokenizer, [])
    assert found.experts == {"math": [], "code": []}
    assert found.ordinary == []
    assert found.num_undecided == 0
