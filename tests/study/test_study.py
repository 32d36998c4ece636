"""The study on tiny models: tasks, scores that come back, conflict and block sets against references."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from ending_answers import ending_answer, model_of_letters
from peft import PeftModel
from tiny import write_tiny_checkpoints
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator, reference
from mediator_peft.demo.settings import FULL
from mediator_peft.demo.tasks import Item, Task
from mediator_peft.demo.training import train_experts
from mediator_peft.errors import AdapterError, CheckpointError, ConfigError
from mediator_peft.evaluation.baselines import RestoredExperts
from mediator_peft.evaluation.generation import answer_losses
from mediator_peft.methods.baselines import BASELINES
from mediator_peft.methods.baselines.dynamic import sharpened, sharpness
from mediator_peft.methods.merging import MERGE_METHODS
from mediator_peft.study import ablation, hard, systems
from mediator_peft.study import tasks as study_tasks
from mediator_peft.study.ablation import DEFAULT, Ablation, Choice, Variant, ablate
from mediator_peft.study.compared_system import Comparison
from mediator_peft.study.comparison import (
    ORDER,
    check_system,
    compare,
    score_merges,
    score_system,
    why_unsuited,
)
from mediator_peft.study.conflict import (
    block_of,
    conflict_table,
    pairwise_cosines,
    rankings,
    routed_matrices,
)
from mediator_peft.study.dynamic import mixed_weights
from mediator_peft.study.experts import StudyFolder
from mediator_peft.study.forms import whole
from mediator_peft.study.lab import (
    Lab,
    contexts_of,
    merge_states,
    single_model_rows,
    tensors_with_contexts,
)
from mediator_peft.study.page_tables import comparison_table
from mediator_peft.study.scores import ScoreBook, Scores, Sizes, put_together, score_items
from mediator_peft.study.settings import FULL_STUDY, StudyExpert, StudyRecipe
from mediator_peft.study.systems import (
    NAMED,
    ROUTED_SYSTEM,
    Bench,
    build_default,
    make_sample,
    model_key,
    rerouted,
    score_alone,
    score_mediator,
)
from mediator_peft.study.tables import conflict_result, systems_result, with_new_routes, write_result

WORDNET = """  1 the licence
00000001 03 n 01 entity 0 000 | a root
00000002 05 n 02 dog 0 domestic_dog 0 000 | an animal
00000003 13 n 01 bread 0 000 | food
00000004 13 n 01 crane 0 000 | food with the name of an animal
00000005 05 n 01 crane 1 000 | an animal
00000006 05 n 01 Fido 0 000 | a name
"""


def test_nouns_with_one_meaning_are_read_from_wordnet(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET)
    assert study_tasks.one_meaning_nouns(tmp_path) == [("dog", "animal"), ("bread", "food")]


def test_splits_share_no_prompt_and_follow_from_the_seed(monkeypatch):
    def source(rng: Random, folder: Path):
        while True:
            number = rng.randrange(60)
            yield Item(f"What is {number}?", str(number))

    monkeypatch.setitem(study_tasks.STUDY_TASKS, "numbers", source)
    first, again, other = (study_tasks.make_study_task("numbers", 20, 10, 8, seed, Path()) for seed in (0, 0, 1))
    assert first == again != other
    splits = [first.train, first.calibration, first.test]
    assert [len(split) for split in splits] == [20, 10, 8]
    assert len({item.prompt for split in splits for item in split}) == 38
    longer = study_tasks.make_study_task("numbers", 30, 10, 8, 0, Path())
    assert (longer.test, longer.calibration, longer.train[:20]) == (first.test, first.calibration, first.train)
    taken = {item.prompt for item in first.train}
    assert not taken & {
        item.prompt for item in study_tasks.make_study_task("numbers", 20, 0, 0, 0, Path(), taken).train
    }


def test_the_demo_experts_keep_the_recipes_of_the_demo():
    for name, recipe in FULL.recipes.items():
        assert FULL_STUDY.experts[name].recipe is recipe
    assert set(FULL_STUDY.main) <= set(FULL_STUDY.experts)


@pytest.mark.slow
def test_a_lora_expert_is_saved_as_an_adapter_that_a_build_takes(bench, tmp_path):
    items = {"low": [Item(f"low {number}", str(number)) for number in range(4)]}
    recipes = {"low": StudyRecipe(2, batch_size=2, learning_rate=1e-2, lora_rank=2)}
    path = train_experts(bench.folder.base, items, recipes, tmp_path / "experts", seed=0)["low"].path
    assert (path / "adapter_model.safetensors").exists()
    assert not (path / "model.safetensors").exists()
    experts = {"low": path, "unchanged": bench.folder.base}
    build_mediator(bench.folder.base, experts, tmp_path / "out", MediatorConfig(density=1.0, encoding="float"))
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.folder.base, dtype=torch.float32), path)
    with torch.no_grad(), model.use_experts("low"):
        assert (model(ids).logits - lora(ids).logits).abs().max() < 0.05


def test_kept_scores_come_back_for_the_same_question_alone(tmp_path):
    book, scores = ScoreBook(tmp_path), Scores([True], [0.5], ["a"], 1.0)
    assert book.keep("routed", "maths", [1], scores) == book.find("routed", "maths", [1]) == scores
    assert book.find("routed", "maths", [2]) is book.find("base", "maths", [1]) is None


FEW = ("average", "task_arithmetic")
WHOLE = ("whole deltas", "whole deltas, embedding too")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A study of two tiny experts."""
    root = tmp_path_factory.mktemp("study")
    paths = write_tiny_checkpoints(root, ["base", "first", "second"], dtype=torch.bfloat16)
    for path in paths.values():
        character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(path)

    def items(prompt, count=24):
        return [Item(f"{prompt} {number}", str(number)) for number in range(count)]

    tasks = {
        name: Task(items(f"{name} a", 12), items(f"{name} b"), items(f"{name} c", 4), "exact")
        for name in ("first", "second")
    }
    unknown = {"other": Task([], [], items("other", 4), "exact")}
    experts = {name: SimpleNamespace(path=paths[name], losses=[1.0]) for name in ("first", "second")}
    said = []
    sample = make_sample(tasks, list(tasks), unknown, 3, 4)
    return Bench(replace(FULL_STUDY, answered_merges=FEW), StudyFolder(root), experts, sample, said.append)


@pytest.fixture(scope="module")
def lab(bench):
    return Lab(bench.folder.base, {name: expert.path for name, expert in bench.experts.items()})


@pytest.fixture(scope="module")
def table(bench, lab):
    found = score_alone(bench, lab)
    found |= score_mediator(bench, build_default(bench))
    return found | score_merges(bench, lab)


@pytest.mark.slow
def test_a_second_run_scores_nothing_anew(bench, lab, table, monkeypatch):
    monkeypatch.setattr("mediator_peft.study.systems.score_items", None)
    again = score_alone(bench, lab) | score_mediator(bench, build_default(bench)) | score_merges(bench, lab)
    assert again == table


def test_a_model_of_other_library_code_is_another_model(bench, monkeypatch):
    key = model_key(bench, MediatorConfig())
    assert key == model_key(bench, MediatorConfig())
    monkeypatch.setattr("mediator_peft.study.systems.library_digest", lambda: "other")
    assert key != model_key(bench, MediatorConfig())


def test_every_system_is_in_the_table_and_its_file(bench, table, tmp_path):
    found = systems_result(bench, table, build_default(bench))
    assert {"experts", "base", NAMED, ROUTED_SYSTEM, *FEW} == set(found["systems"])
    assert found["systems"]["experts"]["mean_loss"] == pytest.approx(
        np.mean([table[f"expert {task}"][task].loss for task in ("first", "second")])
    )
    assert found["systems"]["base"]["bytes"] == found["bytes_of_one_model"]
    first = write_result(tmp_path, "systems", found).read_bytes()
    assert write_result(tmp_path, "systems", json.loads(first)).read_bytes() == first


def test_routes_are_taken_anew_and_nothing_else_of_the_table_changes(bench, table, tmp_path, monkeypatch):
    experts = {name: StudyExpert(name, StudyRecipe(1)) for name in bench.experts}
    bench = replace(bench, settings=replace(bench.settings, experts=experts))
    path = write_result(tmp_path, "systems", systems_result(bench, table, build_default(bench)))
    found = json.loads(path.read_text())
    # The cached shares of an earlier version are not taken.
    routes = bench.folder.models / "default-2" / "study-routes.json"
    routes.write_text(json.dumps({"first": {"flagged": 7.0}}))
    monkeypatch.setattr("mediator_peft.study.systems.library_digest", lambda: "other")
    renewed = json.loads(with_new_routes(path, rerouted(bench), bench).read_text())
    assert set(renewed.pop("about_routing")["experts"]) == {"first", "second"}
    assert renewed == found
    with pytest.raises(AdapterError, match="run the sub-command `systems` first"):
        rerouted(replace(bench, folder=StudyFolder(tmp_path)))


ALL_KINDS = ("experts@router", "emr", "weighted", "dynamic")


def test_baselines_and_merges_are_compared_on_the_items_of_the_table(bench, lab, table, monkeypatch):
    run = Comparison(bench, lab, Sizes(2, 3))
    first = compare(run, ALL_KINDS)
    # Single-model merges of the table of systems are in this one too.
    assert set(first["systems"]) == {*ALL_KINDS, *FEW, NAMED, ROUTED_SYSTEM}
    whole = table[ROUTED_SYSTEM]["first"].first(Sizes(2, 3))
    assert first["systems"][ROUTED_SYSTEM]["tasks"]["first"]["loss"] == whole.loss
    assert first["left_out"]["tall"] == "not scored"
    assert first["num_items"]["first"] == {"answers": 2, "losses": 3}
    one = first["bytes_of_one_model"]
    sizes = {name: row["bytes"] / one for name, row in first["systems"].items()}
    assert sizes["experts@router"] == pytest.approx(2, abs=0.1)
    assert sizes["weighted"] == 1
    assert 1 < sizes["emr"] - 1 < 1.2
    # Nothing is scored again, by this run or another, and what was scored before is in the table too.
    monkeypatch.setattr("mediator_peft.study.systems.score_items", None)
    assert compare(Comparison(bench, lab, Sizes(2, 3)), ["weighted"]) == first
    with pytest.raises(ConfigError, match=r"unknown system 'emrr'.*'emr'"):
        compare(run, ["weighted", "emrr"])
    lines = comparison_table({"comparison": first}).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert sorted(names) == sorted(first["systems"])


def test_every_merge_method_and_baseline_has_its_place_in_the_comparison(bench, lab):
    # Whole experts are what others are compared with, and the base merges nothing.
    compared = {name.partition("@")[0].partition(", ")[0] for name in ORDER}
    assert compared >= {*MERGE_METHODS, *BASELINES} - {"base"}
    for name in ORDER:
        check_system(name)
    run = Comparison(replace(bench, experts={**bench.experts, "third": bench.experts["first"]}), lab)
    assert {name: why for name in ORDER if (why := why_unsuited(run, name))} == {"slerp": "slerp merges 2 experts"}


def test_a_fault_while_a_system_is_scored_is_not_taken_for_a_system_that_is_left_out(bench, lab, table, monkeypatch):
    def broken(*_):
        raise ValueError("a fault")

    monkeypatch.setattr("mediator_peft.study.comparison.merge_states", broken)
    with pytest.raises(ValueError, match="a fault"):
        compare(Comparison(bench, lab, Sizes(1, 1)), ["consensus"])


@pytest.mark.slow
def test_presets_are_built_and_fitted_and_statistics_measured(bench, lab, table):
    found = compare(Comparison(bench, lab, Sizes(2, 3)), ["twin, routed", "regmean"])
    assert {"twin, routed", "regmean"} <= set(found["systems"])
    assert (bench.folder.root / "statistics" / "gram" / "first.safetensors").exists()


def test_whole_experts_that_are_named_score_as_by_themselves(bench, lab, table, monkeypatch):
    run = Comparison(bench, lab)
    found = score_system(run, "experts")
    # A run on fewer items takes the first ones.
    monkeypatch.setattr("mediator_peft.study.systems.score_items", None)
    few = score_system(Comparison(bench, lab, Sizes(1, 2)), "experts")
    assert few == {task: scores.first(Sizes(1, 2)) for task, scores in found.items()}
    assert {task: scores.losses for task, scores in found.items()} == {
        task: table[f"expert {task}"][task].losses for task in ("first", "second")
    }


def test_restored_weights_are_the_formula_on_every_tensor(lab):
    found = RestoredExperts(
        BASELINES["tall"],
        lambda: tensors_with_contexts(lab.base, lab.experts),
        contexts_of(lab.base, lab.experts),
        sorted(lab.experts),
        torch.bfloat16,
    )
    name = "model.layers.1.mlp.up_proj.weight"
    base, first, second = (s[name].float() for s in (lab.base, lab.experts["first"], lab.experts["second"]))
    total = first + second - 2 * base
    mask = (second - base).abs() > 0.4 * (first - base).abs()
    torch.testing.assert_close(found.state("second")[name].float(), base + mask * total, atol=4e-3, rtol=1e-2)
    assert all(torch.equal(found.state(None)[key], tensor) for key, tensor in lab.base.items())


def test_scores_of_parts_come_back_in_the_order_of_the_items():
    whole = put_together(
        [([0, 3], Scores([True, False], [0.0, 3.0], ["a", "d"], 1.0)), ([1, 2], Scores([True], [1.0, 2.0], ["b"], 2.0))]
    )
    assert whole.losses == [0, 1, 2, 3]
    assert whole.answers == ["a", "b", "d"]


def test_a_block_without_conflict_is_averaged_and_one_at_chance_level_is_the_named_expert(bench, lab):
    folder = build_default(bench)
    model, _ = load_mediator(folder, dtype=torch.float32)
    run = Ablation(bench, lab)
    backbone = {name: tensor.float() for name, tensor in run.backbone(DEFAULT).items()}
    experts = {name: run.weights(DEFAULT, name, None) for name in ("first", "second")}
    beta = sharpness(torch.tensor([0.0, 0.25, 0.5]))
    weights = sharpened(torch.tensor([0.8, 0.2]), beta)
    mixed = mixed_weights(model, weights)
    name = "model.layers.{}.mlp.up_proj.weight"
    for block, shares in enumerate(((0.5, 0.5), (0.8, 0.2), (1.0, 0.0))):
        key = name.format(block)
        expected = backbone[key] + sum(
            share * (experts[expert][key] - backbone[key])
            for share, expert in zip(shares, ("first", "second"), strict=True)
        )
        torch.testing.assert_close(mixed[key], expected)


def test_prompts_of_two_tasks_and_variants_of_the_gate(bench, lab):
    model, tokenizer = load_mediator(build_default(bench), dtype=torch.float32)
    for found in (hard.two_tasks(bench, model, tokenizer), hard.later_turns(bench, model, tokenizer)):
        assert found["prompts"] == 6
        assert sum(found[kind] for kind in ("first", "second", "other expert", "base")) == pytest.approx(1)
    gates = hard.gates(bench, model, tokenizer)
    assert gates["no base"]["base, unknown"] == 0 <= gates["default"]["base, unknown"]
    assert gates["default"]["right expert"] <= gates["no base"]["right expert"] + 1e-6
    assert gates["all experts by probability"]["right expert"] <= gates["likeliest expert alone"]["right expert"] + 1e-6


@pytest.mark.slow
def test_an_extra_expert_has_its_own_calibration_and_the_test_items_of_its_task(bench, lab, monkeypatch):
    own = [Item(f"extra {number}", str(number)) for number in range(12)]
    recipe = StudyRecipe(1)
    experts = {name: StudyExpert(task, recipe) for name, task in (("first", "first"), ("spelling-other", "first"))}
    settings = replace(bench.settings, experts=experts | {"second": StudyExpert("second", recipe)})
    second = bench.experts["second"]
    monkeypatch.setattr(hard, "trained_experts", lambda *_: {"spelling-other": second})
    monkeypatch.setattr(hard, "load_tasks", lambda *_: {})
    monkeypatch.setattr(hard, "training_items", lambda *_: own)
    wide = hard.with_extra(replace(bench, settings=settings))
    assert list(wide.sample.tasks) == ["first", "second", "spelling-other", "other"]
    assert wide.sample.tasks["spelling-other"].calibration == own
    found = hard.related_experts(replace(bench, settings=settings), lab)
    assert found["names"] == ["first", "spelling-other"]
    with lab.holding(lab.experts["second"]) as model:
        items = bench.sample.tasks["first"].test
        expected = score_items(model, lab.tokenizer, items, "exact", bench.sample.sizes["first"])
    assert found["own"]["tasks"]["spelling-other"]["loss"] == pytest.approx(expected.loss, abs=1e-4)
    assert all(sum(share for name, share in row.items() if name != "flagged") == pytest.approx(1)
               for row in found["routing"].values())  # fmt: skip


@pytest.mark.parametrize("is_generated", [False, True])
def test_exact_answers_are_right_where_generated_ones_are(monkeypatch, is_generated):
    model = model_of_letters()
    tokenizer, answer = ending_answer(model, "spell it")
    items = [Item("spell it", text) for text in (answer, answer[:-1], answer + " ", "0" + answer, answer[0] * 9)]
    if is_generated:
        monkeypatch.setattr("mediator_peft.study.scores.is_plainly_greedy", lambda _: False)
    found = score_items(model, tokenizer, items, "exact", Sizes(5, 2))
    assert found.right == [True, False, True, False, False]
    losses = answer_losses(model, tokenizer, ["spell it"] * 2, [item.answer for item in items[:2]])
    assert found.losses == pytest.approx(losses, abs=1e-5)


def test_second_seeds_take_the_place_of_the_first_in_models_of_their_own(bench, monkeypatch):
    other = SimpleNamespace(path=bench.folder.experts / "second-other", losses=[1.0])
    recipe = StudyRecipe(1)
    experts = {"first": StudyExpert("first", recipe), "second": StudyExpert("second", recipe)}
    seeded = replace(
        bench,
        settings=replace(bench.settings, experts=experts | {"second-seed1": StudyExpert("second", recipe, seed=1)}),
    )
    monkeypatch.setattr(systems, "trained_experts", lambda *_: {**bench.experts, "second-seed1": other})
    found = systems.with_second_seeds(seeded)
    assert found.experts == {"first": bench.experts["first"], "second": other}
    assert systems.default_name(found) != systems.default_name(bench)
    assert found.hashes != bench.hashes
    monkeypatch.setattr(systems, "trained_experts", lambda *_: dict(bench.experts))
    with pytest.raises(CheckpointError, match="second seed"):
        systems.with_second_seeds(seeded)


def test_merged_states_are_the_methods_on_each_tensor(lab):
    merged = merge_states(lab.base, lab.experts, MERGE_METHODS["average"])
    name = "model.layers.1.mlp.up_proj.weight"
    expected = sum(state[name].float() for state in lab.experts.values()) / 2
    torch.testing.assert_close(merged[name].float(), expected, atol=4e-3, rtol=1e-2)
    nothing = merge_states(lab.base, lab.experts, MERGE_METHODS["task_arithmetic"], scale=1e-9)
    assert all(torch.equal(nothing[name], tensor) for name, tensor in lab.base.items())


@pytest.mark.parametrize("name", single_model_rows())
def test_every_row_without_data_merges_a_model(lab, name):
    block = {key: tensor for key, tensor in lab.base.items() if ".layers.1." in key}
    merged = merge_states(block, lab.experts, MERGE_METHODS[name])
    assert all(tensor.isfinite().all() and tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert any(not torch.equal(merged[key], tensor) for key, tensor in block.items())


def test_all_blocks_give_the_named_model_and_none_the_backbone(bench, lab):
    run = Ablation(bench, lab)
    model, _ = load_mediator(build_default(bench), dtype=torch.float32)
    ids = torch.arange(5, 25).view(2, 10)
    for name, weights in {"first": run.weights(DEFAULT, "first", None), None: run.backbone(DEFAULT)}.items():
        with torch.no_grad(), model.use_experts(name), lab.holding(weights) as plain:
            torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_whole_deltas_in_one_block_leave_the_others_to_the_backbone(bench, lab):
    run = Ablation(bench, lab)
    state = run.weights(Variant("whole", whole), "first", (1,))
    backbone = run.backbone(DEFAULT)
    for name in routed_matrices(lab.base):
        wanted = lab.experts["first"] if block_of(name) == 1 else backbone
        torch.testing.assert_close(state[name].float(), wanted[name].float(), atol=1e-6, rtol=0)


def test_the_ablation_has_every_ranking_at_equal_numbers_and_bytes(bench, lab, monkeypatch):
    few = [variant for variant in ablation.VARIANTS if variant.name in (DEFAULT.name, "backbone is the base", *WHOLE)]
    monkeypatch.setattr(ablation, "VARIANTS", few)
    saved = []
    found = ablate(bench, lab, lambda content: saved.append(set(content)))
    assert [len(keys) for keys in saved] == sorted(len(keys) for keys in saved)
    assert found["num_blocks"] == 3
    curves = found["curves"]
    assert {"sign", "sign of all entries", "random 2"} <= set(curves)
    assert found["none"]["mean"] != found["all"]["mean"]
    # Two rankings that choose the same blocks have the same loss.
    assert curves["first"]["2"] != curves["last"]["2"]
    assert found["against_random"]["sign"]["2"]["value"] == pytest.approx(
        curves["sign"]["2"]["mean"] - sum(curves[f"random {number}"]["2"]["mean"] for number in range(3)) / 3
    )
    thin = found["equal_bytes"]
    for curve in thin["curves"].values():
        assert all(row["bytes"] <= 1.1 * thin["all"]["bytes"] for row in curve.values())
        assert curve["2"]["density"] > thin["all"]["density"]
    assert set(found["num_experts"]) == {"2"}
    deltas, with_embedding = (found["variants"][name] for name in WHOLE)
    assert with_embedding["bytes"] > deltas["bytes"] == 2
    # A choice of rankings and shares measures these alone, and finds what was measured before.
    monkeypatch.setattr("mediator_peft.study.systems.score_items", None)
    few_blocks = ablate(bench, lab, lambda content: None, Choice(("spread", "random 1"), (0.5,), blocks_only=True))
    assert set(few_blocks) == {"num_losses", "num_blocks", "none", "all", "curves", "against_random"}
    assert few_blocks["curves"] == {name: {"2": curves[name]["2"]} for name in ("spread", "random 1")}
    assert set(few_blocks["against_random"]) == {"spread"}
    with pytest.raises(ConfigError, match=r"unknown ranking 'spred'.*'spread'"):
        ablate(bench, lab, saved.append, Choice(("spred",)))
    # What is left are averaged norms.
    own = found["variants"]["experts themselves"]
    assert abs(with_embedding["mean"] - own["mean"]) < abs(found["none"]["mean"] - own["mean"])


def test_conflict_is_that_of_the_reference(lab):
    records = {row["block"]: row for row in conflict_table(lab.base, lab.experts) if row["kind"] == "all"}
    names = [name for name in routed_matrices(lab.base) if block_of(name) == 1]
    vectors = [
        reference.task_vectors(lab.base[name], torch.stack([state[name] for state in lab.experts.values()]))
        for name in names
    ]
    assert records[1]["sign"] == pytest.approx(reference.conflict_score(vectors), abs=1e-6)
    cosines = pairwise_cosines(lab.base, lab.experts)
    flat = torch.stack(
        [
            torch.cat([(state[name].float() - lab.base[name].float()).flatten() for name in routed_matrices(lab.base)])
            for state in lab.experts.values()
        ]
    )
    assert cosines["first | second"] == pytest.approx(torch.cosine_similarity(flat[0], flat[1], dim=0).item(), abs=1e-4)


def test_independent_signs_lie_at_the_chance_level_within_its_deviation():
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{block}.mlp.up_proj.weight": torch.zeros(60, 50) for block in range(40)}
    experts = {name: {key: torch.randn(60, 50, generator=generator) for key in base} for name in ("a", "b", "c")}
    records = [row for row in conflict_table(base, experts) if row["kind"] == "all"]
    scores = np.array([row["sign"] for row in records])
    assert scores.mean() == pytest.approx(0.5, abs=0.02)
    assert scores.std() == pytest.approx(np.mean([row["chance_sd"] for row in records]), rel=0.35)
    assert records[0]["energy"] == pytest.approx(records[0]["energy_of_orthogonal"], abs=0.03)


def test_rankings_hold_every_block_once():
    table = [{"block": b, "kind": "all", "sign": s, "energy": -s, "norm": 1.0} for b, s in enumerate([0.1, 0.4, 0.2])]
    found = rankings(table)
    assert found["sign"] == [1, 2, 0] == found["sign reversed"][::-1]
    assert found["energy"] == [0, 2, 1]
    assert all(sorted(order) == [0, 1, 2] for order in found.values())
    longer = [{**table[0], "block": block} for block in range(30)]
    assert sorted(rankings(longer)["spread"][:8]) == list(range(0, 30, 4))


def test_conflict_results_hold_each_choice_of_seeds(bench, monkeypatch):
    seed1 = SimpleNamespace(path=bench.experts["second"].path, losses=[1.0])
    settings = SimpleNamespace(experts={"first-seed1": SimpleNamespace(task="first", seed=1)})
    monkeypatch.setattr("mediator_peft.study.tables.trained_experts", lambda *_: {"first-seed1": seed1})
    found = conflict_result(Bench(settings, bench.folder, bench.experts, bench.sample, print))
    assert list(found["sets"]) == ["seed 0", "seed 1 of first"]
    assert found["cosines"]["second | first-seed1"] == pytest.approx(1.0)
    assert Sizes(1, 2) != Sizes(2, 1)
