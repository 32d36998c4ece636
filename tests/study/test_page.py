"""The page of the study: every table and every number comes from a result file."""

import json
import sys
from pathlib import Path

import pytest

from mediator_peft.study.app import main
from mediator_peft.study.page import (
    PageError,
    draw_figures,
    fill_page,
    is_from_results,
    loose_numbers,
    read_results,
)
from mediator_peft.study.page_tables import TABLES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "evidence.md"
# What is no result: names of parts, years, numbers of papers, shares of the model's own description.
NAMES = {"135", "95", "3.0", "270"}


@pytest.mark.parametrize(
    ("page", "table"),
    [(PAGE, "systems"), (DOCS.parent / "README.md", "systems"), (DOCS / "forms.md", "forms")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_table_of_the_page_is_that_of_its_result_file(page, table):
    text = page.read_text(encoding="utf-8")
    assert f"<!-- table: {table} -->" in text
    assert fill_page(text, DOCS / "results") == text


def test_every_number_in_the_text_is_in_a_result_file():
    results = read_results(DOCS / "results")
    loose = loose_numbers(PAGE.read_text(encoding="utf-8"))
    unknown = [number for number in loose if number not in NAMES and not is_from_results(number, results)]
    assert not unknown


def test_a_number_that_is_in_no_file_is_found():
    results = {"a": {"share": 0.9412, "bytes": 12_340_000, "count": [24]}}
    for number in ("94", ".94", "0.941", "24", "12.3", "12,340,000"):
        assert is_from_results(number, results), number
    for number in ("93", ".95", "25"):
        assert not is_from_results(number, results), number


def test_numbers_are_read_from_text_and_not_from_tables_code_or_links():
    text = "kept .94 of 1,200 (see [x](a/7.md), `n = 3`)\n<!-- table: t -->\n| 5 |\n<!-- end -->\nand 6 %, gpt2, v1.5."
    assert loose_numbers(text) == [".94", "1,200", "6"]


def test_unknown_tables_and_missing_files_are_named(tmp_path):
    with pytest.raises(PageError, match="there are systems"):
        fill_page("<!-- table: nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(PageError, match="'systems'"):
        fill_page("<!-- table: systems -->\n<!-- end -->", tmp_path)


def test_a_table_of_another_base_is_that_of_its_own_file(tmp_path):
    curves = {"sign": {"1": {"mean": 0.5}}}
    for name, loss in (("ablation", 2.0), ("ablation_gemma3", 3.0)):
        found = {"num_blocks": 2, "none": {"mean": loss}, "all": {"mean": 0.1}, "curves": curves}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    text = "<!-- table: ablation gemma3 -->\n<!-- end --> and <!-- table: ablation -->\n<!-- end -->"
    filled = fill_page(text, tmp_path)
    assert filled.startswith("<!-- table: ablation gemma3 -->")
    assert [line.split(" | ")[1] for line in filled.splitlines() if line.startswith("| sign")] == ["3.000", "2.000"]
    assert fill_page(filled, tmp_path) == filled


def compared(**kept):
    """A comparison's result file: system → share kept, None where nothing was answered."""
    systems = {}
    for name, value in kept.items():
        estimate = {"value": value, "low": value, "high": value}
        found = None if value is None else {"mean": estimate, "worst": estimate, "worst_task": "t"}
        tasks = {"t": {"accuracy": value}}
        systems[name] = {"kept": found, "answered_tasks": ["t"], "tasks": tasks, "mean_loss": 1.0, "bytes": 2}
    return {"systems": systems, "bytes_of_one_model": 1}


def first_cells(table):
    return [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]


def test_compared_systems_stand_in_the_order_of_what_they_keep():
    found = {"comparison": compared(low=0.2, unanswered=None, high=0.9, middle=0.5)}
    assert first_cells(TABLES["comparison"](found, "")) == ["high", "middle", "low", "unanswered"]


def test_what_only_a_second_run_has_is_marked():
    found = {
        "comparison": compared(low=0.2, high=0.9),
        "comparison_again": compared(low=0.3, middle=0.5),
        "systems": {"systems": {}},
    }
    assert first_cells(TABLES["comparison"](found, "")) == ["high", "middle ²", "low"]
    assert first_cells(TABLES["second-comparison"](found, "")) == ["middle", "low"]
    verdict = TABLES["verdict"](found, "").splitlines()
    assert [line.split(" | ")[1] for line in verdict[2:]] == [
        ".900 (.900–.900)",
        ".500 (.500–.500) ²",
        ".200 (.200–.200)",
    ]
    both = TABLES["both-runs"](found, "").splitlines()
    assert both[2:] == ["| low | .200 (.200–.200) | .300 (.300–.300) | .200 (.200–.200) t | .300 (.300–.300) t |"]


def test_figures_are_drawn_from_results(tmp_path):
    rows = [{"block": block, "kind": "all", "sign": 0.3} for block in range(3)]
    curve = {"1": {"mean": 1.0}, "2": {"mean": 0.5}}
    ablation = {"num_blocks": 3, "none": {"mean": 2.0}, "all": {"mean": 0.1}, "curves": {"sign": curve}}
    results = {"conflict": {"sets": {"seed 0": rows}}, "ablation": ablation, "ablation_gemma3": ablation}
    for name, kind, size in (("sign 0.1", "sign", 0.07), ("sign 0.2", "sign", 0.12), ("whole", "whole", 2.0)):
        row = {"kind": kind, "new": {"bytes": size, "divergence": 0.001 / size}}
        results.setdefault("forms", {"forms": {}})["forms"][name] = row
    names = [f"evidence_{name}.png" for name in ("conflict", "ablation", "ablation_gemma3")] + ["forms_divergence.png"]
    assert [path.name for path in draw_figures(results, tmp_path)] == names
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    assert draw_figures(json.loads("{}"), tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alone", "nowhere"], "holds no trained experts of 'smollm2'"),
        (["systems", "file"], "holds no trained experts"),
        (["conflict", "empty", "--base", "gemma3"], "holds no trained experts of 'gemma3'"),
        (["hard", "empty", "--base", "nonsense"], "neither a base of the study"),
        (["experts", "file"], "'file' is a file"),
        (["experts", "file/below"], "file' is a file"),
        (["page", "nowhere", "--path", "file"], "holds no result files"),
        (["page", "results", "--path", "nowhere.md"], "no file 'nowhere.md'"),
        (["page", "damaged", "--path", "file"], "is no result file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_folder_is_refused_and_nothing_is_made_there(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in (("damaged", '{"a": '), ("results", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other.json").write_text(content)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
