"""The demo's items: splits that share nothing, and the same ones for the same seed."""

import importlib.util
from dataclasses import replace

import pytest

from mediator_peft.demo.data import is_easy_problem, make_tasks, write_data
from mediator_peft.demo.settings import FULL, QUICK, DemoSettings, ExpertRecipe
from mediator_peft.demo.tasks import EXPERT_TASKS, UNKNOWN_TASKS
from mediator_peft.evaluation.prompts import read_prompts, read_task
from mediator_peft.evaluation.scoring import MATCHERS

_MISSING = [
    name
    for name in ("reasoning_gym", "cron_descriptor", "codespell_lib", "countryinfo")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"the demo's packages are not installed: {', '.join(_MISSING)}")

SMALL = DemoSettings(
    recipes={name: ExpertRecipe(4, batch_size=5) for name in EXPERT_TASKS},
    num_test=dict.fromkeys([*EXPERT_TASKS, *UNKNOWN_TASKS], 12),
    num_elsewhere=3,
    num_calibration=8,
    num_losses=3,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return make_tasks(SMALL, tmp_path_factory.mktemp("materials"))


@pytest.mark.parametrize("name", EXPERT_TASKS)
def test_splits_share_no_prompt_and_have_their_sizes(tasks, name):
    splits = (tasks[name].train, tasks[name].calibration, tasks[name].test)
    assert [len(split) for split in splits] == [20, 8, 12]
    prompts = [" ".join(item.prompt.lower().split()) for split in splits for item in split]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", UNKNOWN_TASKS)
def test_unknown_tasks_are_only_tested(tasks, name):
    assert (tasks[name].train, tasks[name].calibration, len(tasks[name].test)) == ([], [], 12)


def test_the_same_seed_gives_the_same_items_and_another_one_others(tasks, tmp_path):
    assert make_tasks(SMALL, tmp_path) == tasks
    assert make_tasks(replace(SMALL, seed=1), tmp_path)["cron"].test != tasks["cron"].test


def test_test_items_do_not_depend_on_how_much_is_trained(tasks, tmp_path):
    longer = replace(SMALL, recipes={name: ExpertRecipe(6, batch_size=5) for name in EXPERT_TASKS}, num_calibration=9)
    others = make_tasks(longer, tmp_path)
    assert {name: task.test for name, task in others.items()} == {name: task.test for name, task in tasks.items()}


@pytest.mark.parametrize("name", [*EXPERT_TASKS, *UNKNOWN_TASKS])
def test_every_reference_answer_is_right(tasks, name):
    task = tasks[name]
    assert all(MATCHERS[task.match](item.answer, item.answer) for item in task.test)


def test_word_problems_are_easy(tasks):
    assert all(is_easy_problem(item) for item in tasks["maths"].train)


def test_the_files_are_those_that_the_commands_read(tasks, tmp_path):
    write_data(tasks, tmp_path)
    assert len(read_prompts(tmp_path / "cron.calibration.jsonl")) == 8
    items = read_task(tmp_path / "maths.test.jsonl")
    assert [(item.prompt, item.answer) for item in items] == [(i.prompt, i.answer) for i in tasks["maths"].test]
    assert items[0].match == "last_number"
    assert not (tmp_path / "capitals.calibration.jsonl").exists()


def test_quick_is_smaller_in_everything():
    for name, recipe in QUICK.recipes.items():
        assert recipe.num_steps < FULL.recipes[name].num_steps
    assert all(QUICK.num_test[name] <= count for name, count in FULL.num_test.items())
