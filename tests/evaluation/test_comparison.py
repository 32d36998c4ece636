"""Shares kept, paired tests and MergeBench's views, from hand-made scores; stopped evaluations go on."""

import json

import pytest

from mediator_peft.evaluation.comparison import compare, kept_table, markdown_report, runtime_of
from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.evaluation.report import EvaluationReport
from mediator_peft.evaluation.runner import AnsweredItem, EvalTask, SystemScore, TaskScore
from mediator_peft.evaluation.score_store import ScoreStore, checkpoint_identity


def score(num_right, num_items=20, loss=1.0):
    items = [AnsweredItem("p", "r", "o", place < num_right, loss + place / 100) for place in range(num_items)]
    return TaskScore(num_right, num_items, loss, 1.0, items)


def system(name, **tasks):
    return SystemScore(name, {task: score(*values) for task, values in tasks.items()})


@pytest.fixture
def report():
    items = [TaskItem("p", "r")] * 20
    tasks = [EvalTask("maths", items, "maths"), EvalTask("cron", items, "cron"), EvalTask("capitals", items)]
    systems = [
        system("base", maths=(0, 20, 2.0), cron=(0, 20, 2.0), capitals=(10,)),
        system("maths", maths=(10,), cron=(1,), capitals=(5,)),
        system("expert named", maths=(8,), cron=(16,)),
        system("routed", maths=(8,), cron=(12,), capitals=(9,)),
    ]
    return EvaluationReport(tasks, systems)


def test_shares_are_taken_of_the_given_expert_or_else_of_the_named_one(report):
    found = compare(report, ["base", "maths"])
    assert found["reference"] == {"maths": "maths", "cron": "expert named"}
    routed = found["kept"]["routed"]
    assert routed["by_task"]["maths"]["value"] == pytest.approx(8 / 10)
    assert routed["by_task"]["cron"]["value"] == pytest.approx(12 / 16)
    assert routed["mean"]["value"] == pytest.approx(20 / 26)
    assert routed["worst_task"] == "cron"
    assert found["kept"]["base"]["mean"]["value"] == 0


def test_whole_experts_as_a_baseline_are_the_reference(report):
    report.systems.insert(0, system("experts", maths=(10,), cron=(18,)))
    assert compare(report, ["base"])["reference"] == {"maths": "experts", "cron": "experts"}
    assert compare(report, ["maths"])["reference"] == {"maths": "maths", "cron": "experts"}
    assert compare(report, ["experts"])["reference"] == {"maths": "expert named", "cron": "expert named"}


def test_forgetting_is_the_share_of_the_base_on_tasks_without_an_expert(report):
    assert compare(report, ["base"])["forgetting"] == {
        "capitals": {"base": 1.0, "maths": 0.5, "routed": pytest.approx(0.9)}
    }


def test_no_ratio_is_made_with_an_expert_that_has_nothing_right(report):
    report.systems[2] = system("expert named", maths=(0,), cron=(16,))
    assert set(compare(report)["kept"].values()) == {None}
    assert kept_table(compare(report)) is None


def test_systems_are_tested_in_pairs_against_the_last(report):
    tests = compare(report)["tests"]
    assert set(tests) == {"base", "maths", "expert named"}
    assert tests["expert named"]["maths"] == {"sign_test_p": 1.0, "loss_difference": 0.0, "permutation_p": 1.0}
    assert tests["expert named"]["cron"]["sign_test_p"] == pytest.approx(2 * 0.5**4)
    assert tests["base"]["maths"]["loss_difference"] == pytest.approx(-1.0)
    assert tests["base"]["maths"]["permutation_p"] < 0.001


def test_the_markdown_report_has_every_system_and_view(report):
    report.extra["comparison"] = compare(report, ["base", "maths"], {"build seconds": 12.0})
    text = markdown_report(report)
    for part in ("| routed |", "normalised", "forgetting", "| build seconds | 12.0 |", "worst task", "p-values"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:6]}) == 1


def test_runtime_is_read_from_the_report_of_the_build(tmp_path):
    assert runtime_of(tmp_path) == {}
    (tmp_path / "mediator" / "report").mkdir(parents=True)
    (tmp_path / "mediator" / "adapter_config.json").write_text("{}")
    (tmp_path / "mediator" / "report" / "report.json").write_text(json.dumps({"seconds": 3.5, "peak_memory_bytes": 7}))
    assert runtime_of(tmp_path) == {"build seconds": 3.5, "build peak memory bytes": 7.0}


def test_kept_scores_come_back_for_the_same_question_alone(tmp_path):
    store = ScoreStore(tmp_path / "scores", ["items"])
    scores = system("routed", maths=(3,))
    assert store.find("routed") is None
    store.keep(scores)
    assert store.find("routed") == scores
    assert store.find("routed", "another checkpoint") is None
    assert ScoreStore(tmp_path / "scores", ["other items"]).find("routed") is None
    next((tmp_path / "scores").iterdir()).write_text("{")
    assert store.find("routed") is None
    store.clear()
    assert not (tmp_path / "scores").exists()


def test_a_checkpoint_that_changes_is_another_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = checkpoint_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert checkpoint_identity(tmp_path) != before
