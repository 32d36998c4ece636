"""Answers and losses in batches: equal to those of one prompt at a time."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from ending_answers import ending_answer, model_of_letters
from fake_mediator import TakesExperts
from tiny import tiny_model

from mediator_peft.errors import RoutingError
from mediator_peft.evaluation.batching import PromptSettings
from mediator_peft.evaluation.generation import (
    ROUTED,
    Memo,
    PromptedModel,
    answer_losses,
    answer_prompts,
    is_plainly_greedy,
    route_prompts,
    weight_rows,
)
from mediator_peft.evaluation.scoring import is_exact

PROMPTS = ["a", "what is 12 + 7?", "spell it", "a", "the longest of these prompts, by far"]


class FakeMediator(TakesExperts):
    """A model with two experts and a fallback, which notes what it was asked under which weights."""

    expert_names = ["math", "code", "base"]

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.generation_config = model.generation_config
        self.asked = Counter()
        self.num_calls = 0

    def route(self, input_ids, attention_mask):
        length = attention_mask.sum(dim=1)
        table = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])
        weights = table[length % 3]
        unsure, is_ood = 1 - weights.amax(dim=1), weights[:, 2] > 0
        return SimpleNamespace(expert_weights=weights, scores=weights[:, :2], uncertainty=unsure, is_ood=is_ood)

    def generate(self, input_ids, **kwargs):
        table = self.active.expand(len(input_ids), -1).tolist()
        for row, mask, weights in zip(input_ids, kwargs["attention_mask"], table, strict=True):
            self.asked[tuple(row[mask.bool()].tolist()), tuple(weights)] += 1
        self.num_calls += 1
        return self.inner.generate(input_ids, **kwargs)

    def forward(self, **kwargs):
        return self.inner(**kwargs)


@pytest.fixture
def tokenizer():
    return character_tokenizer(CHAT_TEMPLATE, adds_bos=True)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_answers_in_batches_equal_those_one_by_one(arch, tokenizer):
    model = tiny_model(arch)
    together = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [answer_prompts(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1


def test_answers_equal_plain_greedy_generation(tokenizer):
    model = tiny_model()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(10):
        following = model(ids).logits[:, -1].argmax(dim=1, keepdim=True)
        if following.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following], dim=1)
    expected = tokenizer.decode(
        ids[0, len(tokenizer(text, add_special_tokens=False)["input_ids"]) :], skip_special_tokens=True
    )
    assert answer_prompts(model, tokenizer, ["hello"], max_new_tokens=10) == [expected]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_losses_equal_those_of_whole_logits_one_by_one(arch, tokenizer):
    model = tiny_model(arch)
    answers = ["x", "19", "it", "yes, it is", "no"]
    losses = answer_losses(model, tokenizer, PROMPTS, answers, batch_size=2)
    for prompt, answer, loss in zip(PROMPTS, answers, losses, strict=True):
        start = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer(start, add_special_tokens=False)["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(after)).item(), abs=1e-5)


def test_a_prompt_is_generated_once_per_expert_weights(tokenizer):
    model, memo = FakeMediator(tiny_model()), Memo.empty()
    answer_prompts(model, tokenizer, PROMPTS, expert_weights=ROUTED, max_new_tokens=4, memo=memo)
    assert set(model.asked.values()) == {1}
    assert len(model.asked) == len(set(PROMPTS))
    answer_prompts(model, tokenizer, PROMPTS, expert_weights=ROUTED, max_new_tokens=4, memo=memo)
    assert set(model.asked.values()) == {1}
    answer_prompts(model, tokenizer, PROMPTS, expert_weights="math", max_new_tokens=4, memo=memo)
    assert set(model.asked.values()) == {1}
    answer_prompts(model, tokenizer, PROMPTS[:1], expert_weights="math", max_new_tokens=5, memo=memo)
    assert max(model.asked.values()) == 2


def test_each_prompt_runs_under_the_weights_of_its_route(tokenizer):
    model = FakeMediator(tiny_model())
    routes = route_prompts(model, tokenizer, PROMPTS, batch_size=2)
    answer_prompts(model, tokenizer, PROMPTS, expert_weights=ROUTED, max_new_tokens=2)
    asked = {tokenizer.decode(ids, skip_special_tokens=True): weights for ids, weights in model.asked}
    for prompt, route in zip(PROMPTS, routes, strict=True):
        assert asked[f"[user] {prompt}\n[assistant] "] == tuple(route.expert_weights.values())
        assert route.expert == max(route.expert_weights, key=route.expert_weights.get)
        assert route.weight == route.expert_weights[route.expert]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_groups_of_few_rows_share_a_batch_where_there_are_kernels(tokenizer, monkeypatch, has_kernels):
    monkeypatch.setattr("mediator_peft.evaluation.batching.has_native", lambda: has_kernels)
    model = FakeMediator(tiny_model())
    weights = torch.tensor([[1.0, 0, 0]] * 5 + [[0.1 * number, 0.5, 0.0] for number in range(4)])
    prompts = [f"prompt {number}" for number in range(9)]
    answers = answer_prompts(model, tokenizer, prompts, expert_weights=weights, max_new_tokens=3, batch_size=3)
    assert model.num_calls == (2 + 2 if has_kernels else 2 + 4)
    assert len(model.asked) == 9
    asked = {tokenizer.decode(ids, skip_special_tokens=True)[7:15]: row for ids, row in model.asked}
    assert all(asked[prompt] == tuple(row) for prompt, row in zip(prompts, weights.tolist(), strict=True))
    assert answers == [answer_prompts(model.inner, tokenizer, [prompt], max_new_tokens=3)[0] for prompt in prompts]


def test_weights_of_routes_are_rounded_to_hundredths(tokenizer):
    model = FakeMediator(tiny_model())
    table = torch.tensor([[0.9996, 0.0001, 0.0003], [0.333, 0.333, 0.334]])
    model.route = lambda input_ids, attention_mask: SimpleNamespace(
        expert_weights=table[: len(input_ids)], scores=table, uncertainty=torch.zeros(9), is_ood=[False] * 9
    )
    routes = route_prompts(model, tokenizer, ["aa", "bb"])
    assert weight_rows(model, ROUTED, 2, routes) == [(1.0, 0.0, 0.0), (0.33, 0.33, 0.33)]


def test_the_rest_of_a_row_that_does_not_sum_to_one_is_the_backbones(tokenizer):
    model = FakeMediator(tiny_model())
    tenth = torch.full((1, 3), 0.1)
    model.route = lambda input_ids, attention_mask: SimpleNamespace(
        expert_weights=tenth, scores=tenth, uncertainty=torch.ones(1), is_ood=[True]
    )
    route = route_prompts(model, tokenizer, ["a"])[0]
    assert route.expert == "backbone"
    assert route.weight == pytest.approx(0.7)


def test_progress_reaches_the_number_of_prompts_with_and_without_memo(tokenizer):
    model, memo = FakeMediator(tiny_model()), Memo.empty()
    for _ in range(2):
        count = Counter()
        answer_prompts(
            model,
            tokenizer,
            PROMPTS,
            expert_weights="code",
            max_new_tokens=2,
            memo=memo,
            advance=partial(count.update, "x"),
        )
        assert count["x"] == len(PROMPTS)


def test_wrong_weights_and_names_are_refused(tokenizer):
    model = FakeMediator(tiny_model())
    with pytest.raises(RoutingError, match="Did you mean 'math'"):
        weight_rows(model, "maths", 2)
    with pytest.raises(RoutingError, match="shape"):
        weight_rows(model, torch.ones(2), 2)
    with pytest.raises(RoutingError, match="takes no expert weights"):
        answer_prompts(tiny_model(), tokenizer, ["a"], expert_weights="math")


def test_tensor_weights_are_taken_for_all_rows_or_row_by_row():
    model = FakeMediator(tiny_model())
    assert weight_rows(model, torch.tensor([0.0, 1.0, 0.0]), 2) == [(0.0, 1.0, 0.0)] * 2
    assert weight_rows(model, torch.eye(3), 3) == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert weight_rows(model, None, 1) == [(0.0, 0.0, 0.0)]
    assert weight_rows(tiny_model(), None, 2) == [None, None]


@pytest.mark.parametrize("prompt", PROMPTS[1:])
def test_comparing_with_a_reference_tells_what_generation_would(prompt):
    model = model_of_letters()
    tokenizer, answer = ending_answer(model, prompt)
    assert answer_prompts(model, tokenizer, [prompt], max_new_tokens=40) == [answer]
    others = [answer[:-1], answer[:-1] + answer[0], answer + answer[0], answer[0] * 5]
    references = [answer, *(other for other in others if other != answer)]
    asked = PromptedModel(model, tokenizer, PromptSettings(batch_size=3))
    right, *wrong = asked.compared([prompt] * len(references), references)
    assert right.text == answer
    assert not any(is_exact(each.text, other) for each, other in zip(wrong, references[1:], strict=True))
    for each in (right, *wrong):
        assert answer.startswith(each.text)
        assert not each.is_open
    losses = asked.losses([prompt] * len(references), references)
    assert [each.loss for each in (right, *wrong)] == pytest.approx(losses, abs=1e-5)


def test_an_answer_that_may_still_spell_the_reference_is_open():
    model = model_of_letters()
    tokenizer, answer = ending_answer(model, "spell it")
    asked = PromptedModel(model, tokenizer)
    # The reference's tokens are other ones than the model's, yet its text begins as the model's does.
    spelt = answer + " "
    tokenizer.add_tokens([spelt[:2]])
    found = asked.compared(["spell it"], [spelt])[0]
    assert found.text == answer[0]
    assert found.is_open
    assert asked.compared(["spell it"], ["0" + spelt])[0].is_open is False


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.2}, {"min_new_tokens": 3}, {"suppress_tokens": [5]}])
def test_settings_that_change_greedy_decoding_are_seen(setting):
    model = tiny_model()
    assert is_plainly_greedy(model)
    model.generation_config.update(**setting)
    assert not is_plainly_greedy(model)
