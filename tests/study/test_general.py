"""The base's own answers to general questions, quantised systems and times, on tiny models."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from ending_answers import model_of_letters
from tiny import of_whole_blocks, write_tiny_checkpoints
from transformers import AutoModelForCausalLM

from mediator_peft.demo.tasks import Item, Task
from mediator_peft.errors import ConfigError
from mediator_peft.evaluation.generation import answer_prompts
from mediator_peft.evaluation.prompts import render, token_ids
from mediator_peft.study import general
from mediator_peft.study.bases import folder_base
from mediator_peft.study.compared_system import Comparison
from mediator_peft.study.comparison import check_system, compare
from mediator_peft.study.experts import StudyFolder
from mediator_peft.study.general import general_questions, general_task
from mediator_peft.study.lab import Lab
from mediator_peft.study.page_tables import build_table, comparison_table, decode_table, experts_forget_table
from mediator_peft.study.quantized import backbone_bytes
from mediator_peft.study.runtime import PLAIN, runtime
from mediator_peft.study.scores import CONTINUATION, GENERAL, Scores, Sizes, score_items
from mediator_peft.study.settings import FULL_STUDY
from mediator_peft.study.systems import BASE, NAMED, ROUTED_SYSTEM, Bench, make_sample, score_base, score_general
from mediator_peft.study.tables import forgets

QUESTIONS = [("small talk", "how are you"), ("trivia", "who was first")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A study of two tiny experts, with the base's answers to two questions."""
    root = tmp_path_factory.mktemp("general")
    with pytest.MonkeyPatch.context() as patch:
        of_whole_blocks(patch)
        paths = write_tiny_checkpoints(root, ["base", "first", "second"], dtype=torch.bfloat16)
        model_of_letters().bfloat16().save_pretrained(paths["base"])
    for path in paths.values():
        character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "general_questions", lambda seed: QUESTIONS)
        patch.setattr(general, "version", lambda package: "1")
        task = general_task(StudyFolder(root), 0)

    def items(name, count):
        return [Item(f"{name} {number}", "1") for number in range(count)]

    tasks = {name: Task([], items(name, 24), items(name, 2), "exact") for name in ("first", "second")}
    experts = {name: SimpleNamespace(path=paths[name], losses=[1.0]) for name in tasks}
    sample = make_sample(tasks, list(tasks), {GENERAL: task}, 2, 2)
    return Bench(FULL_STUDY, StudyFolder(root), experts, sample, lambda text: None)


@pytest.fixture(scope="module")
def lab(bench):
    return Lab(bench.folder.base, {name: expert.path for name, expert in bench.experts.items()})


def test_general_answers_are_the_base_s_own_and_come_back_from_the_file(bench, monkeypatch):
    task = bench.sample.tasks[GENERAL]
    model = AutoModelForCausalLM.from_pretrained(bench.folder.base, dtype=torch.float32)
    tokenizer = character_tokenizer(CHAT_TEMPLATE, adds_bos=True)
    questions = [text for _, text in QUESTIONS]
    assert [item.answer for item in task.test] == answer_prompts(model, tokenizer, questions, max_new_tokens=32)
    assert [item.template for item in task.test] == ["small talk", "trivia"]
    assert task.match == CONTINUATION
    assert bench.sample.sizes[GENERAL] == Sizes(0, 2)
    monkeypatch.setattr(general, "_base_answers", None)
    monkeypatch.setattr(general, "general_questions", lambda seed: QUESTIONS)
    assert general_task(bench.folder, 0) == task
    kept = json.loads((bench.folder.home / "general.json").read_text())
    assert kept["about"] == {"package": "chatterbot_corpus 1"}
    # Another base has other answers.
    with pytest.raises(TypeError):
        general_task(replace(bench.folder, model=folder_base(bench.experts["first"].path)), 0)


def test_the_end_of_a_cut_answer_is_not_part_of_its_loss(bench, lab):
    item = bench.sample.tasks[GENERAL].test[0]
    with lab.holding(lab.base) as model:
        found = score_items(model, lab.tokenizer, [item], CONTINUATION, Sizes(0, 1))
        prompt = token_ids(lab.tokenizer, render(lab.tokenizer, item.prompt, True))
        answer = lab.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)).item()
    assert found.losses == pytest.approx([expected], abs=1e-5)
    assert found.answers == found.right == []


def test_what_is_forgotten_is_the_loss_above_the_base_s(bench, lab):
    found = score_general(bench, lab)
    assert list(found) == [BASE, "first", "second"]
    assert found[BASE] == score_base(bench, lab)[BASE][GENERAL]
    assert forgets(found[BASE], found[BASE])["value"] == 0
    rises = [ours - theirs for ours, theirs in zip(found["first"].losses, found[BASE].losses, strict=True)]
    assert forgets(found["first"], found[BASE])["value"] == pytest.approx(sum(rises) / 2)
    assert forgets(Scores([], [3.0, 1.0], [], 0), Scores([], [1.0, 1.0], [], 0))["value"] == 1


def test_questions_are_drawn_from_every_kind(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    talk = "\n".join(f"- - question number {i}\n  - an answer" for i in range(9))
    (folder / "sports.yml").write_text(f"categories:\n- sports\nconversations:\n{talk}\n- - one\n  - word\n")
    (folder / "food.yml").write_text("conversations:\n- - do you eat\n  - no\n- - do you eat\n  - never\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(general.importlib.util, "find_spec", lambda name: spec)
    found = general_questions(0)
    assert found == general_questions(0) != general_questions(1)
    assert [kind for kind, _ in found] == ["food", "sports", "sports", "sports"]
    assert len(set(found)) == 4


@pytest.mark.slow
def test_quantised_systems_are_compared_with_the_others(bench, lab):
    names = ["average", "Mediator, routed, nf4", "experts, int8"]
    run = Comparison(bench, lab)
    found = compare(run, names)
    assert set(found["systems"]) == set(names)
    assert set(found["experts_forget"]) == {"first", "second"}
    routed = found["systems"]["Mediator, routed, nf4"]
    assert "forgets" in routed
    assert "forgets" not in found["systems"]["experts, int8"]
    assert found["systems"]["experts, int8"]["bytes"] < 2 * found["bytes_of_one_model"]
    lines = comparison_table({"comparison": found}).splitlines()
    assert "forgets, nats" in lines[0]
    lines = experts_forget_table({"comparison": found, "comparison_gemma3": {"experts_forget": {}}}).splitlines()
    assert lines[0] == "| expert | SmolLM2 | Gemma 3 |"
    assert lines[2].startswith("| first | ")
    assert lines[2].endswith(" | – |")
    with pytest.raises(ConfigError, match="unknown system"):
        check_system("Mediator, routed, nf3")


def test_bytes_are_those_of_codes_scales_and_the_rest_in_16_bits():
    plain = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    assert backbone_bytes(plain) == 2 * (40 + 40)
    plain[1].weight = plain[0].weight
    assert backbone_bytes(plain) == 2 * 40
    codes = torch.nn.Linear(4, 10, bias=False)
    codes.weight = torch.nn.Parameter(torch.zeros(10, 4, dtype=torch.int8), requires_grad=False)
    assert backbone_bytes(codes) == 40 + 4 * 10


@pytest.mark.slow
def test_times_of_every_system_stand_beside_the_average_s(bench, lab, monkeypatch):
    monkeypatch.setattr("mediator_peft.study.runtime.QUANTIZED", {})
    found = runtime(Comparison(bench, lab), 2, ["ties", "emr", "slerp", "doge", "dynamic"])
    assert set(found["build"]) == {"average", "ties", "slerp", "doge", "Mediator", "emr, one expert"}
    assert found["build"]["average"]["ratio"] == 1
    assert set(found["decode"]) == {PLAIN, NAMED, ROUTED_SYSTEM}
    assert found["decode"][PLAIN]["ratio"] == 1
    assert "| Mediator |" in build_table({"runtime": found})
    assert f"| {PLAIN} |" in decode_table({"runtime": found})
    assert not (bench.folder.models / "timed").exists()
