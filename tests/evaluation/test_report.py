"""Reports: plain data, tables, a figure."""

import io
import json

import pytest
from rich.console import Console

from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.evaluation.report import (
    EvaluationReport,
    accuracy_table,
    draw_report,
    loss_table,
    routing_table,
    share,
    write_evaluation,
    write_json,
)
from mediator_peft.evaluation.runner import AnsweredItem, EvalTask, RoutingScore, SystemScore, TaskScore


def score(num_right, num_items=10, loss=0.5):
    items = [AnsweredItem("p", "r", "[bold]o", index < num_right, loss) for index in range(num_items)]
    return TaskScore(num_right, num_items, loss, 1.0, items)


@pytest.fixture
def report():
    tasks = [
        EvalTask("math", [TaskItem("p", "1", "last_number")] * 10, "math"),
        EvalTask("code", [TaskItem("p", "a")] * 10, "code"),
        EvalTask("capitals", [TaskItem("p", "a", "contains")] * 10),
    ]
    systems = [
        SystemScore("base", {"math": score(0), "code": score(2), "capitals": score(5)}),
        SystemScore("named", {"math": score(9), "code": score(10)}),
    ]
    routing = RoutingScore(
        ["math", "code", "base"],
        {
            "math": {"math": 10, "code": 0, "base": 0},
            "code": {"math": 1, "code": 9, "base": 0},
            "capitals": {"math": 0, "code": 0, "base": 10},
        },
        {"math": 1.0, "code": 0.9},
        {"math": 0.0, "code": 0.0, "capitals": 1.0},
        {"math": 0.0, "code": 0.1, "capitals": 1.0},
    )
    return EvaluationReport(tasks, systems, routing, {"extra": {"seed": 0}})


def printed(table):
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    return stream.getvalue()


def test_the_data_survive_json(report, tmp_path):
    write_json(report.to_dict(), tmp_path / "new" / "results.json")
    read = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert read == report.to_dict()
    assert read["systems"][1]["mean_accuracy"] == pytest.approx(0.95)
    assert read["systems"][0]["tasks"]["math"]["low"] == 0.0
    assert read["routing"]["overall_accuracy"] == pytest.approx(0.95)
    assert read["extra"] == {"seed": 0}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_the_mean_is_that_of_known_tasks_and_needs_all_of_them(report):
    assert report.mean_accuracy(report.systems[0]) == pytest.approx(0.1)
    report.systems[1] = SystemScore("named", {"math": score(9)})
    assert report.mean_accuracy(report.systems[1]) is None


def test_every_answer_is_kept(report):
    answers = report.answers()
    assert len(answers) == 50
    assert answers[0] == {
        "system": "base",
        "task": "math",
        "prompt": "p",
        "reference": "r",
        "output": "[bold]o",
        "is_right": False,
        "loss": 0.5,
    }


def test_tables_fit_eighty_columns_and_hold_the_figures(report):
    table = printed(accuracy_table(report, ["math", "code"], title="Tasks"))
    assert ".900 [0.60–0.98]" in table
    assert ".950" in table
    unknown = printed(accuracy_table(report, ["capitals"]))
    assert ".500" in unknown
    assert "named" not in unknown
    assert "0.500" in printed(loss_table(report, ["math", "code", "capitals"]))
    confusion = printed(routing_table(report.routing))
    assert all(text in confusion for text in ("capitals", "base", ".900"))
    assert "…" not in table + unknown + confusion


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("sizes", [None, {"full copies": 800_000_000, "router": 0}])
def test_a_figure_is_drawn(report, tmp_path, ending, sizes):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"results.{ending}"
    draw_report(report, path, sizes, title="A title")
    assert path.stat().st_size > 1000
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_figure_without_routing_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.routing = None
    draw_report(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("value", "text"), [(0.25, ".250"), (1.0, "1.00"), (0.9999, "1.00"), (0.0, ".000")])
def test_shares_are_short(value, text):
    assert share(value) == text


def test_a_report_that_is_cut_short_leaves_the_whole_old_one(report, tmp_path, monkeypatch):
    """All files take their places together, or none does."""
    write_evaluation(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"answers.json", "results.json", "results.png"}
    report.systems[0] = SystemScore("base", {"math": score(3)})

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EvaluationReport, "to_dict", fail)
        write_evaluation(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_evaluation(report, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in ("answers.json", "results.json"))
