"""The plan says beforehand what the build will find and make."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mediator_peft import MediatorConfig, build_mediator, load_mediator, plan_mediator, verify_mediator
from mediator_peft.errors import AdapterError, CheckpointError, ConfigError
from tests.merge.helpers import EXPERTS, build, digests, experts_of, write_larger
from tests.tiny import write_tiny_checkpoints


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tiny_checkpoints(tmp_path_factory.mktemp("in"), ("base", *EXPERTS), dtype=torch.bfloat16)


def plan_of(paths, config=None, **options):
    return plan_mediator(paths["base"], experts_of(paths), config=config, **options)


def test_a_plan_writes_nothing_and_finds_no_problem(paths, tmp_path):
    plan = plan_of(paths, output=tmp_path / "out")
    assert plan.is_ok
    assert plan.problems == []
    assert list(tmp_path.iterdir()) == []
    assert [entry["block"] for entry in plan.blocks] == [0, 1, 2]


@pytest.mark.parametrize(
    "settings", [{}, {"density": 0.5}, {"encoding": "float", "density": 0.1}, {"routed_layers": [1]}]
)
def test_predicted_scores_and_decisions_are_those_of_the_build(paths, tmp_path, settings):
    plan = plan_of(paths, MediatorConfig(**settings))
    report = build(paths, tmp_path / "out", settings)
    # Tiny matrices are sampled whole.
    for entry, score in zip(plan.blocks, report.conflict["sign"], strict=True):
        assert entry["score"] == pytest.approx(score, abs=1e-3)
    assert [entry["block"] for entry in plan.blocks if entry["routed"]] == report.routed_blocks


@pytest.mark.slow
def test_predicted_bytes_hold_for_matrices_of_real_size(tmp_path):
    paths = write_larger(tmp_path, {"e0": 0.05, "e1": 0.05}, vocab_size=500)
    experts = experts_of(paths)
    always = {"style": f"{tmp_path / 'e0'}:0.1"}
    for settings in ({}, {"density": 0.05}, {"encoding": "float"}, {"families": -1, "always": always}):
        out = tmp_path / f"out{len(str(settings))}"
        plan = plan_mediator(tmp_path / "base", experts, out, MediatorConfig(**settings))
        build_mediator(tmp_path / "base", experts, out, MediatorConfig(**settings))
        adapter = (out / "mediator" / "adapter_model.safetensors").stat().st_size
        total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert plan.bytes["adapter"] == pytest.approx(adapter, rel=0.02)
        assert plan.bytes["total"] == pytest.approx(total, rel=0.02)


def test_a_plan_can_be_edited_and_is_obeyed(paths, tmp_path):
    plan_of(paths).save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["blocks"][0]["routed"] = False
    plan["blocks"][2]["density"] = 0.6
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    report = build(paths, tmp_path / "out", plan=tmp_path / "plan.json")
    assert report.routed_blocks == [1, 2]
    model, _ = load_mediator(tmp_path / "out")
    for name, layer in model.base_model.routed_layers().items():
        kept = float(layer.mediator_bank["default"].get("math").kept.float().mean())
        assert kept == pytest.approx(0.6 if ".2." in name else 0.2, abs=0.01)


def test_an_unedited_plan_changes_nothing(paths, tmp_path):
    plan_of(paths).save(tmp_path / "plan.json")
    build(paths, tmp_path / "one")
    build(paths, tmp_path / "two", plan=tmp_path / "plan.json")
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    for name in ("model.safetensors", "mediator/adapter_model.safetensors", "mediator/adapter_config.json"):
        assert one[name] == two[name]


WRONG_PLANS = {
    "no JSON": ("{", "cannot be read"),
    "a list": ("[]", "no JSON object"),
    "another version": ('{"plan_version": 9, "blocks": []}', "plan_version"),
    "a block too few": ('{"plan_version": 1, "blocks": [{"block": 0, "routed": true, "density": 0.2}]}', "each of the"),
    "density 0": ('{"plan_version": 1, "blocks": [{"block": 0, "routed": true, "density": 0}]}', "density must"),
    "routed is a word": ('{"plan_version": 1, "blocks": [{"block": 0, "routed": "no", "density": 1}]}', "routed must"),
    "a typing error": ('{"plan_version": 1, "blocks": [{"block": 0, "routd": true}]}', "Did you mean 'routed'"),
}


@pytest.mark.parametrize("kind", WRONG_PLANS)
def test_a_wrong_plan_is_refused(kind, paths, tmp_path):
    text, message = WRONG_PLANS[kind]
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        build(paths, tmp_path / "out", plan=tmp_path / "plan.json")


def test_what_stands_beside_the_weights_is_compared(paths, tmp_path):
    for name in ("base", "math"):
        shutil.copytree(paths[name], tmp_path / name)
    vocabularies = {"base": {"a": 0, "b": 1}, "math": {"a": 1, "b": 0, "c": 2}}
    for name, vocabulary in vocabularies.items():
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": f"<{name}>"}))
        (tmp_path / name / "chat_template.jinja").write_text(name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {name}-only\n---\n")
    plan = plan_mediator(tmp_path / "base", {"math": tmp_path / "math"})
    warnings = "\n".join(plan.warnings)
    for part in ("other ids for 'a', 'b'", "more tokens: 'c'", "chat template", "eos_token", "licences differ"):
        assert part in warnings
    assert plan.is_ok


def test_problems_of_several_inputs_are_listed_together(paths, tmp_path):
    (tmp_path / "out").mkdir()
    plan = plan_mediator(paths["base"], {"math": "/nowhere", "code": "/nothing"}, tmp_path / "out")
    assert not plan.is_ok
    assert len(plan.problems) == 3
    with pytest.raises(ConfigError, match="problems"):
        plan.save(tmp_path / "plan.json")


def test_memory_and_time_are_predicted(paths):
    plan = plan_of(paths, workers=2)
    assert plan.seconds > 0
    assert plan.peak_memory_bytes > 10_000_000
    assert "max_memory" in "\n".join(plan_of(paths, max_memory="1MB").problems)


def test_without_a_base_the_mean_stands_in(paths, tmp_path):
    config = MediatorConfig(fallback="backbone", routed_layers="all", density=1.0, encoding="float")
    report = build_mediator(None, experts_of(paths), tmp_path / "out", config)
    assert any("no base was given" in note for note in report.notes)
    states = [load_file(path / "model.safetensors") for path in experts_of(paths).values()]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = torch.stack([state[name].float() for state in states]).mean(dim=0)
        torch.testing.assert_close(tensor.float(), expected, rtol=1e-2, atol=1e-3)
    assert max(report.conflict["energy"]) == pytest.approx(1.0, abs=0.05)


def test_verifying_an_exact_output(paths, tmp_path):
    settings = {"density": 1.0, "encoding": "float", "routed_layers": "all"}
    folder = tmp_path / "only"
    exact = write_tiny_checkpoints(folder, ("base", *EXPERTS), only=["q_proj", "up_proj"], dtype=torch.bfloat16)
    build(exact, tmp_path / "out", settings)
    found = verify_mediator(tmp_path / "out", against=experts_of(exact))
    assert found.is_ok, found.problems
    for difference in found.differences.values():
        assert difference["max_difference"] <= 1e-6
    build(exact, tmp_path / "sparse")
    sparse = verify_mediator(tmp_path / "sparse", against=experts_of(exact))
    assert sparse.is_ok
    assert all(difference["max_difference"] > 1e-3 for difference in sparse.differences.values())


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_verifying_transposed_layers_and_biases(arch, tmp_path):
    paths = write_tiny_checkpoints(tmp_path, ("base", "math", "code"), arch=arch, only=["mlp", "attn"])
    build(paths, tmp_path / "out", {"density": 1.0, "encoding": "float", "routed_layers": "all"})
    found = verify_mediator(tmp_path / "out", against={"base": paths["base"], **experts_of(paths)})
    assert found.is_ok
    for difference in found.differences.values():
        assert difference["max_difference"] <= 1e-6, difference


DAMAGE = {
    "a bit of the backbone": ("model.safetensors", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]),
    "the backbone cut short": ("model.safetensors", lambda data: data[:-3]),
    "a bit of the bank": ("mediator/adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "the bank cut short": ("mediator/adapter_model.safetensors", lambda data: data[:-9]),
    "a setting": ("config.json", lambda data: data.replace(b'"hidden_size"', b'"hidden_sizf"')),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind, paths, tmp_path):
    build(paths, tmp_path / "out")
    assert verify_mediator(tmp_path / "out").is_ok
    name, change = DAMAGE[kind]
    path = tmp_path / "out" / name
    path.write_bytes(change(path.read_bytes()))
    found = verify_mediator(tmp_path / "out")
    assert not found.is_ok
    assert path.name in "\n".join(found.problems)


def test_another_backbone_is_found(paths, tmp_path):
    build(paths, tmp_path / "out")
    shutil.copyfile(paths["base"] / "model.safetensors", tmp_path / "out" / "model.safetensors")
    problems = "\n".join(verify_mediator(tmp_path / "out").problems)
    assert "not the backbone" in problems


def test_verifying_nothing_or_a_stranger_is_refused(paths, tmp_path):
    with pytest.raises(AdapterError, match="no Mediator adapter"):
        verify_mediator(tmp_path)
    build(paths, tmp_path / "out")
    with pytest.raises(AdapterError, match="no expert"):
        verify_mediator(tmp_path / "out", against={"stranger": paths["base"]})
    with pytest.raises(CheckpointError, match="no folder"):
        verify_mediator(tmp_path / "out", against={"math": "/nowhere"})
