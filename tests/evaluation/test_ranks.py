"""Calibration and evaluation shared over ranks: the numbers and bytes of one process."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints

from mediator_peft import MediatorConfig, build_mediator
from mediator_peft.evaluation.batching import answered
from mediator_peft.ranks import Ranks

TEXTS = {"math": "{0} + {1} is", "code": "def f{0}(x{1}):", "other": "Who was {0} of {1}?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = write_tiny_checkpoints(folder, ["base", "math", "code"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(folder / "base")
    rng = random.Random(0)
    for name, text in TEXTS.items():
        rows = [{"prompt": text.format("1" * rng.randint(1, 9), number), "answer": "7"} for number in range(23)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts = {name: paths[name] for name in ("math", "code")}
    build_mediator(paths["base"], experts, folder / "built", MediatorConfig())
    return folder


def output(program, ranks, *arguments):
    """What the command wrote, which only the first rank does."""
    done = program.run_ranks(ranks, *arguments) if ranks > 1 else [program.run(*arguments)]
    assert [each.returncode for each in done] == [0] * ranks, done[0].stderr.decode()
    assert not any(each.stdout for each in done[1:])
    return done[0].stdout


def data(folder, *names):
    return [part for name in names for part in ("--data", f"{name}={folder / name}.jsonl")]


def without_times(report):
    if isinstance(report, dict):
        return {key: without_times(value) for key, value in report.items() if key not in ("seconds", "runtime")}
    return [without_times(item) for item in report] if isinstance(report, list) else report


@pytest.mark.slow
def test_two_ranks_calibrate_and_evaluate_as_one(folder, program):
    said, files, results = {}, {}, {}
    for ranks in (1, 2):
        out = folder / f"out{ranks}"
        shutil.copytree(folder / "built", out)
        calibrated = output(
            program, ranks, "calibrate", out, *data(folder, "math", "code"), "--batch-size", 4, "--json"
        )
        said[ranks] = json.loads(calibrated)
        adapter = out / "mediator"
        files[ranks] = {
            str(path.relative_to(adapter)): path.read_bytes() for path in adapter.rglob("*") if path.is_file()
        }
        tasks = data(folder, "math", "code", "other")
        report = folder / f"report{ranks}"
        output(program, ranks, "eval", out, *tasks, "--batch-size", 3, "--report", report, "--max-new-tokens", 4)
        results[ranks] = [
            without_times(json.loads((report / name).read_text())) for name in ("results.json", "answers.json")
        ]
    assert said[1] == said[2]
    assert files[1] == files[2]
    assert results[1] == results[2]


class TwoRanks(Ranks):
    """One of two ranks whose like is played by the test."""

    def __init__(self, number, others):
        super().__init__()
        self.count, self.number, self._dist = 2, number, self
        self._others = others

    def all_gather_object(self, into, mine):
        theirs = self._others.pop(0)
        into[:] = [mine, theirs] if self.number == 0 else [theirs, mine]


def test_results_come_back_in_the_order_of_the_items():
    first = TwoRanks(0, [None, ["b", "d"]])
    assert first.share(["A", "B", "C", "D", "E"], lambda some: [item.lower() for item in some]) == list("abcde")
    second = TwoRanks(1, [None, ["a", "c", "e"]])
    assert second.share(["A", "B", "C", "D", "E"], lambda some: [item.lower() for item in some]) == list("abcde")


def test_an_error_of_the_other_rank_is_raised_here():
    rank = TwoRanks(0, [ValueError("theirs")])
    with pytest.raises(ValueError, match="theirs"):
        rank.share([1, 2], lambda some: some)


def test_expert_weights_are_set_once_for_batches_that_follow_each_other():
    entered = []

    class Model:
        def use_experts(self, weights):
            entered.append(weights.tolist())
            return torch.no_grad()

    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    batches = [(one, [4]), (one, [3, 2]), (two, [1])]
    steps = []
    found = answered(Model(), batches, lambda batch: [10 * index for index in batch], lambda: steps.append(1), None)
    assert list(found) == [([4], [40]), ([3, 2], [30, 20]), ([1], [10])]
    assert entered == [[1.0], [2.0]]
    assert len(steps) == 4


PIPELINE = """
build:
  base: base
  experts: {math: math, code: code}
  output: run/out
  config: {density: 0.5}
calibrate:
  data: {math: math.jsonl, code: code.jsonl}
  batch_size: 4
eval:
  data: {math: math.jsonl, code: code.jsonl, other: other.jsonl}
  max_new_tokens: 4
  batch_size: 3
  report: run/results
"""


@pytest.mark.slow
def test_two_ranks_run_a_pipeline_as_one(folder, program):
    (folder / "all.yaml").write_text(PIPELINE)
    said, files, results = {}, {}, {}
    for ranks in (1, 2):
        said[ranks] = without_times(json.loads(output(program, ranks, "run", folder / "all.yaml", "--json")))
        # Files name the place they were made for, so both runs have the same.
        made = (folder / "run").rename(folder / f"run{ranks}")
        assert sorted(path.name for path in made.iterdir()) == ["out", "results"]
        files[ranks] = {
            str(path.relative_to(made)): path.read_bytes()
            for path in (made / "out").rglob("*")
            # The report says how long the build took and how much memory.
            if path.is_file() and path.name != "report.json"
        }
        written = [json.loads((made / "results" / name).read_text()) for name in ("results.json", "answers.json")]
        results[ranks] = without_times(written)
    assert "out/mediator/report/routing.json" in files[1]
    assert said[1] == said[2]
    assert files[1].keys() == files[2].keys()
    assert [name for name in files[1] if files[1][name] != files[2][name]] == []
    assert results[1] == results[2]


@pytest.mark.slow
def test_a_faulty_pipeline_ends_all_ranks(folder, program):
    text = PIPELINE.replace("run/", "faulty/").replace("code.jsonl}", "nowhere.jsonl}")
    (folder / "faulty.yaml").write_text(text)
    done = program.run_ranks(2, "run", folder / "faulty.yaml")
    assert all(each.returncode for each in done)
    assert b"nowhere.jsonl" in done[0].stderr
