"""The study's base models: names, hashes of caches, prompts without a chat template."""

import json
from dataclasses import replace

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints
from transformers import AutoModelForCausalLM

from mediator_peft.demo.finetune import finetune
from mediator_peft.demo.settings import FULL, ExpertRecipe
from mediator_peft.demo.tasks import Item, Task
from mediator_peft.demo.training import expert_folder
from mediator_peft.errors import CheckpointError
from mediator_peft.evaluation.generation import answer_losses
from mediator_peft.study.bases import GEMMA3, LINE, SMOLLM2, find_base
from mediator_peft.study.cost import add_cost, cpu_seconds
from mediator_peft.study.experts import StudyFolder, settings_for, training_items
from mediator_peft.study.settings import FULL_STUDY, StudyExpert

ITEM = Item("Correct the spelling: teh", "the")


def test_experts_of_the_demo_keep_their_names_and_those_of_another_base_get_others(tmp_path):
    found = expert_folder("spelling", [ITEM], ExpertRecipe(3), tmp_path, 0)
    assert found.name == "spelling-07eddca75560"
    gemma = expert_folder("spelling", [ITEM], ExpertRecipe(3), tmp_path, 0, GEMMA3.identity)
    other = expert_folder("spelling", [ITEM], ExpertRecipe(3), tmp_path, 0, "other")
    assert len({found, gemma, other}) == 3


def test_prompts_are_formed_for_a_base_without_a_chat_template_alone(tmp_path):
    assert SMOLLM2.formed(ITEM) is ITEM
    assert GEMMA3.formed_task(Task([ITEM], [], [ITEM], "exact")).test == [ITEM._replace(prompt=f"{ITEM.prompt}\n")]
    tasks = {"spelling": Task([ITEM] * 4, [], [], "exact")}
    expert = StudyExpert("spelling", ExpertRecipe(1, batch_size=2))
    assert training_items(expert, tasks, StudyFolder(tmp_path)) == [ITEM] * 2
    assert training_items(expert, tasks, StudyFolder(tmp_path, GEMMA3)) == [GEMMA3.formed(ITEM)] * 2


def test_every_base_has_folders_of_its_own_and_shares_data_and_results(tmp_path):
    demo, gemma = StudyFolder(tmp_path), StudyFolder(tmp_path, GEMMA3)
    assert (demo.base, demo.results, gemma.results) == (tmp_path / "base", tmp_path / "results", tmp_path / "results")
    assert demo.materials == gemma.materials
    for part in ("base", "experts", "scores", "models", "statistics"):
        assert getattr(gemma, part) == tmp_path / "gemma3" / part != getattr(demo, part)


def test_settings_of_a_base_change_nothing_else():
    assert settings_for(FULL_STUDY, SMOLLM2) == FULL_STUDY
    found = settings_for(FULL_STUDY, GEMMA3)
    assert found.experts["maths"].recipe.batch_size == 4
    assert found.experts["inflection"] == FULL_STUDY.experts["inflection"]
    own = {"experts": {}, "num_answers": 0, "num_losses": 0, "answered_merges": ()}
    assert replace(found, **own) == replace(FULL_STUDY, **own)
    assert FULL_STUDY.experts["maths"].recipe is FULL.recipes["maths"]


def test_a_folder_is_a_base_whose_identity_is_its_content(tmp_path):
    path = write_tiny_checkpoints(tmp_path, ["base"], dtype=torch.bfloat16)["base"]
    character_tokenizer(None, adds_bos=True).save_pretrained(path)
    plain = find_base(str(path))
    assert plain.prompt_form == LINE
    assert plain.make(tmp_path / "study" / "base", tmp_path).resolve() == path.resolve()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert find_base(str(path)).identity != plain.identity
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(path)
    assert find_base(str(path)).prompt_form == "{}"
    with pytest.raises(CheckpointError, match="smollm2, gemma3"):
        find_base("gemma2")


def test_costs_are_added_up_over_runs(tmp_path):
    path = StudyFolder(tmp_path, GEMMA3).cost
    for command, seconds in (("experts", 1800.0), ("measuring", 900.0), ("measuring", 900.0)):
        add_cost(path, command, seconds)
    assert json.loads(path.read_text()) == {"cpu_seconds": {"experts": 1800.0, "measuring": 1800.0}, "cpu_hours": 1.0}
    assert 0 < cpu_seconds() < 1e6


def test_fine_tuning_reads_prompts_as_scoring_does(tmp_path, monkeypatch):
    """Both begin a prompt without a template with the tokenizer's first token: the first loss is that of scoring."""
    # Some processors train in bfloat16, and the loss is rounded there.
    monkeypatch.setattr("mediator_peft.demo.finetune.fast_bfloat16", lambda: False)
    path = write_tiny_checkpoints(tmp_path, ["base"])["base"]
    tokenizer = character_tokenizer(None, adds_bos=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = answer_losses(model, tokenizer, [ITEM.prompt], [ITEM.answer])
    assert finetune(model, tokenizer, [ITEM], 1, batch_size=1) == pytest.approx(expected, abs=1e-4)
