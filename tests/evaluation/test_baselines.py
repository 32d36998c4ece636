"""Baselines by name: who answers which item, with which weights."""

from dataclasses import replace

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints
from transformers import AutoModelForCausalLM, AutoTokenizer

from mediator_peft import MediatorSettings
from mediator_peft.errors import ConfigError
from mediator_peft.evaluation.baselines import (
    PublishedSystems,
    by_choice,
    check_names,
    parse_baseline,
    random_route,
)
from mediator_peft.evaluation.batching import PromptSettings
from mediator_peft.evaluation.generation import Route
from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.evaluation.runner import EvalTask, Scoring, score_tasks

EXPERTS = ("cron", "maths")
SCORING = Scoring(PromptSettings(batch_size=4))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    found = write_tiny_checkpoints(tmp_path_factory.mktemp("baselines"), ["base", *EXPERTS], dtype=torch.bfloat16)
    for path in found.values():
        character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(path)
    return {name: str(path) for name, path in found.items()}


def load_plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def systems(paths):
    sources = {"base": paths["base"], "experts": {name: paths[name] for name in EXPERTS}}
    return PublishedSystems(MediatorSettings(provenance=sources), load_plain)


TASKS = [
    EvalTask(name, [TaskItem(f"{name} {number}", str(number)) for number in range(4)], expert, 2)
    for name, expert in (("cron", "cron"), ("maths", "maths"), ("other", None))
]


def losses(score, task):
    return [item.loss for item in score.tasks[task].items]


def alone(paths, name, task):
    model, tokenizer = load_plain(paths[name])
    return losses(score_tasks("alone", model, tokenizer, [task], SCORING), task.name)


def route(expert):
    return Route(expert, 1.0, {}, 0.0, False, expert)


def test_named_experts_are_the_experts(paths, systems):
    found = systems.score("experts", TASKS, {}, SCORING)
    assert set(found.tasks) == {"cron", "maths"}
    for number, name in enumerate(EXPERTS):
        assert losses(found, name) == pytest.approx(alone(paths, name, TASKS[number]))
    base_bytes = systems.num_bytes("emr") - systems.num_bytes("experts")
    # One unified task vector of 16 bits and two masks, beside the base: 2 + 2 + 2 / 8 bytes against 2 * 2.
    assert base_bytes == pytest.approx(systems.num_bytes("experts") / 16, rel=0.01)


def test_each_item_is_answered_by_the_expert_that_the_router_chose(paths, systems):
    task = TASKS[2]
    routes = {"other": [route("maths"), route("base"), route("cron"), route("maths")]}
    found = losses(systems.score("experts@router", [task], routes, SCORING), "other")
    by_model = {name: alone(paths, name, task) for name in ("base", *EXPERTS)}
    assert found == pytest.approx(
        [by_model["maths"][0], by_model["base"][1], by_model["cron"][2], by_model["maths"][3]]
    )
    assert len({round(value, 5) for values in by_model.values() for value in values}) == 12


def test_a_merge_method_is_one_model_for_all_tasks(systems):
    found = systems.score("task_arithmetic", TASKS, {}, SCORING)
    assert set(found.tasks) == {"cron", "maths", "other"}
    assert systems.num_bytes("task_arithmetic") is None


def test_random_routes_hang_on_prompt_and_seed_alone():
    prompts = [f"prompt {number}" for number in range(200)]
    chosen = [random_route(prompt, ("b", "a")) for prompt in prompts]
    assert chosen == [random_route(prompt, ("a", "b")) for prompt in prompts]
    assert chosen != [random_route(prompt, ("a", "b"), seed=1) for prompt in prompts]
    assert 70 < chosen.count("a") < 130
    assert by_choice(["a", None, "a"]) == {"a": [0, 2], None: [1]}


def test_names_are_checked_together():
    check_names(["emr", "experts@random", "ties"])
    with pytest.raises(ConfigError) as fault:
        check_names(["emmr", "emr@nowhere", "ties@router", "regmean"])
    for part in ("Did you mean 'emr'", "'nowhere' is no route", "'ties@router'", "regmean=FOLDER"):
        assert part in str(fault.value)
    assert parse_baseline("twin@router") == ("twin", "router")


def test_a_model_that_does_not_say_where_its_experts_are_is_refused():
    with pytest.raises(ConfigError, match="does not say"):
        PublishedSystems(MediatorSettings(), load_plain).score("emr", TASKS, {}, SCORING)
    assert replace(TASKS[0], expert=None).expert is None
