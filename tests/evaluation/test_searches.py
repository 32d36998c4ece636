"""Searches for coefficients: worked numbers, gradients against differences, and the way from a search to a merge."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorSettings, merge_models
from mediator_peft.errors import ConfigError, OutputExistsError
from mediator_peft.evaluation.searches import SEARCHES, evolutionary
from mediator_peft.evaluation.searches.frank_wolfe import candidate_scores
from mediator_peft.evaluation.searches.merged_model import MergedModel
from mediator_peft.evaluation.searches.objective import Example, loss_of
from mediator_peft.evaluation.searches.pareto import fit_surrogates, front_of
from mediator_peft.evaluation.searches.runner import search_coefficients
from tests.methods.test_merging_rows import BASE, TAU
from tests.tiny import fine_tuned, tiny_model


def written(folder, arch="llama", names=("base", "a", "b")):
    base = tiny_model(arch)
    for number, name in enumerate(names):
        (base if number == 0 else fine_tuned(base, number, scale=0.15)).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        lines = [json.dumps({"prompt": text, "answer": "w7 w8"}) for text in topic_texts(5, 90, 4, seed=number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder, {name: folder / name for name in names[1:]}


def searched(folder, experts, method, name="c.json", **options):
    data = {expert: folder / f"{expert}.jsonl" for expert in experts}
    return search_coefficients(method, folder / "base", experts, data, folder / name, **options)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_gradients_of_coefficients_are_differences_of_the_loss(tmp_path, arch, num_chunks):
    folder, experts = written(tmp_path, arch)
    merged = MergedModel(folder / "base", experts)
    name = merged.linear[1]
    start = torch.full((2, num_chunks), 0.3)
    example = Example("a", (5, 9, 30, 12, 44, 8), 1)

    def loss(coefficients):
        merged.set({name: coefficients})
        return loss_of(merged, example)

    merged.watch([name])
    loss(start).backward()
    found = merged.gradient_of_coefficients(name, dict(merged.gradients())[name], num_chunks)
    merged.watch([])
    for expert in range(2):
        for chunk in range(num_chunks):
            step = torch.zeros_like(start)
            step[expert, chunk] = 0.01
            slope = float(loss(start + step) - loss(start - step)) / 0.02
            assert float(found[expert, chunk]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_an_expert_is_its_checkpoint(tmp_path):
    folder, experts = written(tmp_path)
    merged = MergedModel(folder / "base", experts)
    merged.set_expert("b")
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        expected = fine_tuned(tiny_model(), 2, scale=0.15)(ids).logits
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_imitation_is_the_worked_number():
    student, teacher = torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([[2.0, 0.0, -1.0]])
    hidden = torch.tensor([[1.0, 3.0]])
    output = SimpleNamespace(logits=student[None], hidden_states=(None, hidden[None]))
    merged = SimpleNamespace(model=lambda *_, **__: output)
    example = Example("a", (5,), 0, teacher, (torch.zeros(1, 2),))
    assert float(loss_of(merged, example._replace(hidden=()))) == pytest.approx(0.724243, abs=1e-6)
    # The mean square of (1, 3) is 5.
    assert float(loss_of(merged, example, (0,), 0.1)) == pytest.approx(0.724243 + 0.5, abs=1e-5)


def test_candidates_of_frank_wolfe_score_as_worked_out():
    gradient = torch.tensor([[0.5, -0.2, 0.1], [-0.1, 0.3, 0.4]])
    candidates = torch.cat([torch.eye(3), torch.full((1, 3), 0.3)]).double()
    inner = candidate_scores(gradient, candidates, BASE, TAU, "inner")
    cosine = candidate_scores(gradient, candidates, BASE, TAU, "cosine")
    np.testing.assert_allclose(inner.numpy(), [1.455, 1.535, 1.185, 1.3975], atol=1e-6)
    np.testing.assert_allclose(cosine.numpy(), [0.462771, 0.525051, 0.454902, 0.484953], atol=1e-6)
    place = candidates[-1] + 0.03 * (candidates[2] - candidates[-1])
    found = torch.tensordot(place.float(), TAU, dims=1).numpy()
    np.testing.assert_allclose(found, [[0.10035, 0.1575, -0.0552], [0.08025, -0.05415, -0.1194]], atol=1e-6)


def test_surrogates_and_front_are_the_worked_ones():
    places = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.5, 0], [0, 0.5]], dtype=float)
    true = np.array([[-0.6, 0.1, 0.2, 0.9, 0.1, 0.2], [0.15, -0.5, -0.1, 0.05, 0.8, 0.25]])
    a, b = places.T
    values = np.column_stack([a**2, b**2, a * b, a, b, np.ones(7)]) @ true.T
    surrogate, errors = fit_surrogates(places, values)
    np.testing.assert_allclose(errors, 0, atol=1e-12)
    axis = np.linspace(0, 1, 5)
    grid = np.array([(x, y) for x in axis for y in axis])
    metrics = surrogate(grid)
    front = front_of(metrics)
    np.testing.assert_allclose(grid[front], [[1, 0.75], [1, 1]])
    np.testing.assert_allclose(metrics[front], [[0.78125, 0.69375], [0.9, 0.65]], atol=1e-9)


def test_a_front_has_all_points_that_none_beats():
    metrics = np.random.default_rng(0).integers(0, 6, (150, 3)).astype(float)
    beaten = [((metrics >= row).all(1) & (metrics > row).any(1)).any() for row in metrics]
    assert front_of(metrics) == [number for number, is_beaten in enumerate(beaten) if not is_beaten]


def test_evolution_finds_the_best_of_a_known_cost(monkeypatch):
    merged = SimpleNamespace(experts=("a", "b"), num_blocks=3, blocks={"e": None, "x": 0, "y": 1, "z": 2})
    seen = {}
    merged.set = seen.update
    wanted = {"x": torch.tensor([0.2, 1.0]), "z": torch.tensor([0.8, 0.4])}

    def losses(_, __):
        return {"a": float(sum((seen[name] - value).square().sum() for name, value in wanted.items()))}

    monkeypatch.setattr(evolutionary, "task_losses", losses)
    found = evolutionary.evolution(merged, [], evaluations=1500)
    assert found.about["evaluations"] <= 1500
    assert found.about["mean_loss"] < 0.01 < found.about["mean_loss_of_the_average"]
    assert found.coefficients["blocks"]["1"]["b"] == pytest.approx(0.7, abs=0.1)
    assert found.coefficients["experts"] == pytest.approx(found.coefficients["blocks"]["0"], abs=1e-6)


OPTIONS = {
    "expert_merging": {"epochs": 3, "anchor": 0.0, "accumulation": 2, "hidden_blocks": [1]},
    "map": {"grid": 5},
    "frank_wolfe": {"steps": 3},
    "evolution": {"evaluations": 12},
}


@pytest.mark.parametrize("method", SEARCHES)
def test_what_a_search_finds_is_merged_and_no_worse_than_where_it_starts(tmp_path, method):
    folder, experts = written(tmp_path)
    figure = {"figure": folder / "front.png"} if method == "map" else {}
    content = searched(folder, experts, method, **OPTIONS[method], **figure)
    assert searched(folder, dict(reversed(experts.items())), method, name="d.json", **OPTIONS[method]) == content
    assert json.loads((folder / "c.json").read_text()) == content
    about = content["about"]
    if method == "expert_merging":
        assert np.mean(about["losses"][-8:]) < 0.95 * np.mean(about["losses"][:8])
    if method == "frank_wolfe":
        assert min(about["mean_losses"]) == about["mean_losses"][about["best_step"]] <= about["mean_losses"][0]
    if method == "evolution":
        assert about["mean_loss"] <= about["mean_loss_of_the_average"]
    if method == "map":
        assert (folder / "front.png").stat().st_size > 1000
        assert about["front"]
    settings = MediatorSettings(merge_method="weighted", merge_data=str(folder / "c.json"))
    merge_models(folder / "base", experts, folder / "out", settings)
    found = load_file(folder / "out" / "model.safetensors")
    merged = MergedModel(folder / "base", experts)
    name = merged.linear[3]
    entry = content.get("tensors", {}).get(name) or content.get("blocks", {}).get("0") or content["experts"]
    merged.set({name: torch.tensor([entry[expert] for expert in merged.experts])})
    torch.testing.assert_close(found[name], merged.model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_answers_are_searched_for_by_their_likelihood(tmp_path):
    folder, experts = written(tmp_path)
    content = searched(folder, experts, "frank_wolfe", with_answers=True, steps=1)
    assert content["about"]["with_answers"]
    with pytest.raises(ConfigError, match="takes no answers"):
        searched(folder, experts, "expert_merging", name="d.json", with_answers=True)


@pytest.mark.parametrize(
    ("method", "options", "part"),
    [
        ("mapp", {}, "Did you mean 'map'"),
        ("map", {"gird": 5}, "Did you mean 'grid'"),
        ("map", {"grid": 0}, "'grid'"),
        ("map", {"num_samples": 3}, "need 6 samples"),
        ("expert_merging", {"rate": "fast"}, "'rate'"),
        ("evolution", {"figure": "x.png"}, "drawn by the search 'map'"),
        ("frank_wolfe", {"direction": "iner"}, "Did you mean 'inner'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, method, options, part):
    folder, experts = written(tmp_path)
    with pytest.raises(ConfigError, match=part):
        searched(folder, experts, method, **options)


def test_data_must_be_of_all_experts_and_the_output_free(tmp_path):
    folder, experts = written(tmp_path)
    with pytest.raises(ConfigError, match="'b' has no data"):
        search_coefficients("map", folder / "base", experts, {"a": folder / "a.jsonl"}, folder / "c.json")
    (folder / "c.json").write_text("mine")
    with pytest.raises(OutputExistsError):
        searched(folder, experts, "map")
