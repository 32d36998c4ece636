"""Scoring systems on tasks, and routing."""

from collections import Counter
from contextlib import contextmanager

import pytest
from character_tokenizer import character_tokenizer
from tiny import tiny_model

from mediator_peft.evaluation.generation import Memo, Route, answer_prompts
from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.evaluation.runner import EvalTask, answer_room, score_system, summarise_routes


def route(expert, *weights, is_ood=False, uncertainty=0.0):
    return Route(
        expert, max(weights), dict(zip(["math", "code", "base"], weights, strict=True)), uncertainty, is_ood, "math"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_answers_are_judged_by_their_items_way_to_match(model, tokenizer):
    prompts = ["one", "two", "three"]
    said = answer_prompts(model, tokenizer, prompts, max_new_tokens=5)
    items = [TaskItem("one", said[0]), TaskItem("two", "never said"), TaskItem("three", said[2].strip(), "exact")]
    score = score_system("s", model, tokenizer, [EvalTask("t", items, max_new_tokens=5)]).tasks["t"]
    assert [item.is_right for item in score.items] == [True, False, True]
    assert (score.num_right, score.num_items) == (2, 3)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.interval.low < 2 / 3 < score.interval.high
    assert [item.output for item in score.items] == said


def test_losses_are_measured_on_the_first_items(model, tokenizer):
    items = [TaskItem(text, "x") for text in ("one", "two", "three")]
    tasks = [EvalTask("t", items, max_new_tokens=2)]
    whole = score_system("s", model, tokenizer, tasks).tasks["t"]
    some = score_system("s", model, tokenizer, tasks, num_losses=2).tasks["t"]
    none = score_system("s", model, tokenizer, tasks, num_losses=0).tasks["t"]
    assert some.items[2].loss is None
    assert some.answer_loss == pytest.approx((whole.items[0].loss + whole.items[1].loss) / 2)
    assert whole.answer_loss == pytest.approx(sum(item.loss for item in whole.items) / 3)
    assert none.answer_loss is None


def test_progress_ends_where_it_was_announced(model, tokenizer):
    announced, advanced = {}, Counter()

    @contextmanager
    def progress(phase, total):
        announced[phase] = total
        yield lambda: advanced.update([phase])

    tasks = [EvalTask("t", [TaskItem(text, "x") for text in ("one", "two", "one")], max_new_tokens=2)]
    memo = Memo.empty()
    for name in ("first", "second"):
        score_system(name, model, tokenizer, tasks, num_losses=2, memo=memo, progress=progress)
    assert announced == {"first": 5, "second": 5} == dict(advanced)


def test_a_model_in_training_mode_is_left_in_it(tokenizer):
    model = tiny_model("gpt2").train()
    score_system("s", model, tokenizer, [EvalTask("t", [TaskItem("a", "b")], max_new_tokens=2)])
    assert model.training


def test_answers_have_room_beyond_the_longest_reference(tokenizer):
    assert answer_room(tokenizer, ["a" * 40, "b"]) == 61
    assert answer_room(tokenizer, ["a"]) == 16


def test_a_task_belongs_to_the_expert_of_its_name(tokenizer):
    items = [TaskItem("a", "b")]
    assert EvalTask.of_items("math", items, ["math", "base"], tokenizer).expert == "math"
    assert EvalTask.of_items("maths", items, ["math"], tokenizer, 7) == EvalTask("maths", items, None, 7)


def test_routing_is_counted_by_task_and_column():
    tasks = [
        EvalTask("math", [TaskItem("p", "a")] * 3, "math"),
        EvalTask("code", [TaskItem("p", "a")], "code"),
        EvalTask("else", [TaskItem("p", "a")] * 2),
    ]
    routes = {
        "math": [route("math", 1.0, 0.0, 0.0)] * 2 + [route("code", 0.4, 0.6, 0.0, uncertainty=0.9)],
        "code": [route("code", 0.0, 1.0, 0.0)],
        "else": [route("base", 0.0, 0.0, 1.0, is_ood=True), route("math", 0.7, 0.0, 0.3, is_ood=True)],
    }
    found = summarise_routes(["math", "code", "base"], tasks, routes)
    assert found.columns == ["math", "code", "base"]
    assert found.confusion["math"] == {"math": 2, "code": 1, "base": 0}
    assert found.confusion["else"] == {"math": 1, "code": 0, "base": 1}
    assert found.accuracy == {"math": pytest.approx(2 / 3), "code": 1.0}
    assert found.overall == pytest.approx(3 / 4)
    assert found.ood == {"math": 0.0, "code": 0.0, "else": 1.0}
    assert found.mean_uncertainty["math"] == pytest.approx(0.3)


def test_the_backbone_gets_a_column_where_prompts_went_there():
    tasks = [EvalTask("else", [TaskItem("p", "a")])]
    found = summarise_routes(
        ["math", "code"], tasks, {"else": [Route("backbone", 1.0, {"math": 0.0}, 1.0, True, "math")]}
    )
    assert found.columns == ["math", "code", "backbone"]
    assert found.overall is None
