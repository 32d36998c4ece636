"""Densities that are shared out beforehand: one threshold for the model, and budgets in bytes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator, plan_mediator
from mediator_peft.errors import ConfigError
from mediator_peft.merge.budget import budget_bytes
from mediator_peft.methods.encoding.bitmaps import count_bits
from tests.merge.helpers import EXPERTS, build, digests, experts_of, write_larger
from tests.tiny import write_tiny_checkpoints

MODEL = {"density_scope": "model", "routed_layers": "all"}
BANK = "mediator/adapter_model.safetensors"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tiny_checkpoints(tmp_path_factory.mktemp("in"), ("base", *EXPERTS))


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Matrices large enough for headers to matter little; experts that differ in how far they went."""
    scales = {name: 0.01 * (number + 1) for number, name in enumerate(EXPERTS)}
    return write_larger(tmp_path_factory.mktemp("larger"), scales, vocab_size=300)


def weights_bytes(folder):
    return (folder / "model.safetensors").stat().st_size + (folder / BANK).stat().st_size


def deltas_of(folder, column):
    model, _ = load_mediator(folder, dtype=torch.float32)
    layers = model.base_model.routed_layers()
    return {name: layer.mediator_bank["default"].get(column) for name, layer in layers.items()}


def whole_deltas(folder, paths, column):
    """Expert minus backbone, from the files."""
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expert = AutoModelForCausalLM.from_pretrained(paths[column], dtype=torch.float32).state_dict()
    return {name: expert[name] - weight for name, weight in backbone.items() if "_proj" in name}


def test_one_threshold_divides_all_matrices_and_experts(paths, tmp_path):
    # Tiny matrices are sampled whole, so the threshold is exact.
    report = build(paths, tmp_path / "out", MODEL)
    kept, dropped, total, num_kept, shares = [], [], 0, 0, []
    for column in ("base", *EXPERTS):
        whole = whole_deltas(tmp_path / "out", paths, column)
        for name, delta in deltas_of(tmp_path / "out", column).items():
            magnitudes, mask = whole[f"{name}.weight"].abs(), delta.kept
            kept.append(magnitudes[mask].min())
            dropped.append(magnitudes[~mask].max())
            total, num_kept = total + mask.numel(), num_kept + int(mask.sum())
            shares.append(float(mask.float().mean()))
    assert num_kept == pytest.approx(0.2 * total, abs=len(shares))
    # Each matrix rounds its number to a whole one, which may shift its own edge by one entry.
    assert min(kept) >= 0.99 * max(dropped)
    assert max(shares) > 1.2 * min(shares)
    assert any("one threshold" in note for note in report.notes)


def test_an_expert_that_went_further_gets_more(larger, tmp_path):
    build(larger, tmp_path / "out", {**MODEL, "fallback": "backbone"})
    shares = [sum(count_bits(delta.mask) for delta in deltas_of(tmp_path / "out", name).values()) for name in EXPERTS]
    assert shares == sorted(shares)
    assert shares[-1] > 2 * shares[0]


def test_equal_entries_at_the_threshold_are_shared_evenly(tmp_path):
    # All differences have one magnitude: whatever is kept lies at the threshold.
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    for value in (0.0, 0.25, -0.25):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "_proj" in name:
                    weight.fill_(value)
        model.save_pretrained(tmp_path / f"e{value}")
    experts = {"plus": tmp_path / "e0.25", "minus": tmp_path / "e-0.25"}
    config = MediatorConfig(**MODEL, density=0.3, merge_method="base")
    # Weights of 0 have no direction, so that no expert looks like a fine-tune of them.
    build_mediator(tmp_path / "e0.0", experts, tmp_path / "out", config, allow_distant=True)
    for column in experts:
        for delta in deltas_of(tmp_path / "out", column).values():
            assert float(delta.kept.float().mean()) == pytest.approx(0.3, abs=1 / delta.kept.numel())


@pytest.mark.parametrize("scope", ["matrix", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("settings", "budget"),
    [({}, "1.25x"), ({"density": 0.9}, "1.05x"), ({"encoding": "float"}, "2x"), ({"sparsifier": "svd"}, "1.3x"),
     ({"sparsifier": "dare"}, "1.2x"), ({"routed_layers": [1]}, 5_100_000)],
)  # fmt: skip
def test_the_files_meet_the_budget(scope, settings, budget, larger, tmp_path):
    settings = {"routed_layers": "all", **settings, "density_scope": scope, "budget": budget}
    plan = plan_mediator(larger["base"], experts_of(larger), config=MediatorConfig(**settings))
    assert plan.is_ok, plan.problems
    build(larger, tmp_path / "out", settings)
    wanted = budget_bytes(budget, plan.bytes["backbone"])
    assert weights_bytes(tmp_path / "out") == pytest.approx(wanted, rel=0.02)
    adapter = (tmp_path / "out" / BANK).stat().st_size
    # A rank is a whole number: budgets are met from below.
    assert plan.bytes["adapter"] == pytest.approx(adapter, rel=0.02)
    saved = json.loads((tmp_path / "out" / "mediator" / "adapter_config.json").read_text())
    assert saved["density"] == pytest.approx(plan.density)
    assert saved["budget"] == budget


@pytest.mark.parametrize(
    "settings",
    [
        MODEL,
        pytest.param({"budget": "1.48x"}, marks=pytest.mark.slow),
        pytest.param({**MODEL, "budget": "2.2x", "encoding": "float"}, marks=pytest.mark.slow),
    ],
)
def test_workers_order_and_a_plan_change_nothing(settings, paths, tmp_path):
    build(paths, tmp_path / "one", settings)
    build(paths, tmp_path / "two", settings, workers=2)
    expected = digests(tmp_path / "one")
    assert digests(tmp_path / "two") == expected
    plan = plan_mediator(paths["base"], experts_of(paths), config=MediatorConfig(**settings))
    plan.save(tmp_path / "plan.json")
    build(paths, tmp_path / "planned", settings, plan=tmp_path / "plan.json")
    assert digests(tmp_path / "planned")[BANK] == expected[BANK]
    turned = {name: paths[name] for name in ("base", *reversed(EXPERTS))}
    build(turned, tmp_path / "turned", settings)
    for column in ("base", *EXPERTS):
        one, other = deltas_of(tmp_path / "one", column), deltas_of(tmp_path / "turned", column)
        assert all(torch.equal(one[name].dense(), other[name].dense()) for name in one)


def test_a_killed_build_goes_on_with_the_same_densities(paths, tmp_path, monkeypatch):
    from mediator_peft.merge import offline

    settings = {**MODEL, "budget": "1.48x"}
    build(paths, tmp_path / "whole", settings)
    plain, calls = offline.Build._merge_one, []

    def stop_in_the_middle(self, number):
        calls.append(number)
        if len(calls) == 9:
            raise KeyboardInterrupt
        plain(self, number)

    monkeypatch.setattr(offline.Build, "_merge_one", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        build(paths, tmp_path / "out", settings)
    monkeypatch.setattr(offline.Build, "_merge_one", plain)
    build(paths, tmp_path / "out", settings)
    assert digests(tmp_path / "out")[BANK] == digests(tmp_path / "whole")[BANK]


def test_an_edited_plan_keeps_its_proportions_within_a_budget(larger, tmp_path):
    plan_mediator(larger["base"], experts_of(larger)).save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["blocks"][0]["routed"] = False
    plan["blocks"][1]["density"], plan["blocks"][2]["density"] = 0.1, 0.3
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    report = build(larger, tmp_path / "out", {"budget": "1.15x"}, plan=tmp_path / "plan.json")
    assert report.routed_blocks == [1, 2]
    shares = {1: [], 2: []}
    for name, delta in deltas_of(tmp_path / "out", "math").items():
        shares[int(name.split(".")[2])].append(float(delta.kept.float().mean()))
    assert max(shares[2]) == pytest.approx(3 * min(shares[1]), rel=0.01)
    backbone = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights_bytes(tmp_path / "out") == pytest.approx(1.15 * backbone, rel=0.02)


@pytest.mark.parametrize(("budget", "message"), [("1.0x", "too small"), (1000, "too small"), ("90x", "more than can")])
def test_a_budget_that_cannot_be_met_says_what_can(budget, message, paths, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        build(paths, tmp_path / "out", {"budget": budget})
    assert "MB (" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    plan = plan_mediator(paths["base"], experts_of(paths), config=MediatorConfig(budget=budget))
    assert message in "\n".join(plan.problems)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("1.5x", 1500), ("2 X", 2000), (77, 77), ("300", 300), ("5kB", 5000), ("2MiB", 1 << 21), ("1.5GB", 1_500_000_000)],
)
def test_budgets_are_read(budget, expected):
    assert budget_bytes(budget, 1000) == expected
    MediatorConfig(budget=budget)
