"""Deltas that every prompt gets."""

from __future__ import annotations

from math import exp

import pytest
import torch
from typer.testing import CliRunner

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator, plan_mediator
from mediator_peft.cli.app import app
from mediator_peft.errors import ConfigError
from mediator_peft.merge.always_on import alpha, omega, parse_always
from tests.tiny import fine_tuned, random_prompts, tiny_model

PROMPTS = random_prompts(3)
ONLY = ["_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("in")
    base = tiny_model()
    models = {"base": base, **{name: fine_tuned(base, seed, 0.03, ONLY) for seed, name in enumerate("abs")}}
    models["harmful"] = fine_tuned(base, 7, 0.03, ONLY)
    for name, model in models.items():
        model.save_pretrained(out / name)
    return out


def settings(folder, always, **more):
    return MediatorConfig(
        density=1.0, encoding="float", routed_layers="all", always={"safety": always.format(folder)}, **more
    )


def state(folder, name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


def expected(folder, name, weight, reference="base"):
    """Logits of an expert, or of the base, plus a part of the safety vector."""
    model = tiny_model()
    plain, minuend, subtrahend = (state(folder, other) for other in (name, "s", reference))
    changed = {key: tensor + weight * (minuend[key] - subtrahend[key]) for key, tensor in plain.items()}
    model.load_state_dict(changed)
    with torch.no_grad():
        return model(PROMPTS).logits


def experts(folder):
    return {name: str(folder / name) for name in "ab"}


@torch.no_grad()
def test_every_route_has_it(folder, tmp_path):
    build_mediator(folder / "base", experts(folder), tmp_path / "out", settings(folder, "{}/s:0.5"))
    model, _ = load_mediator(tmp_path / "out")
    close = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("a", "b", "base"):
        torch.testing.assert_close(model(PROMPTS, expert_weights=name).logits, expected(folder, name, 0.5), **close)
        with model.use_experts(name):
            torch.testing.assert_close(model(PROMPTS).logits, expected(folder, name, 0.5), **close)
    rows = model(PROMPTS, expert_weights=["a", "base", "b"]).logits
    for row, name in enumerate(("a", "base", "b")):
        torch.testing.assert_close(rows[row], expected(folder, name, 0.5)[row], **close)
    backbone = model(PROMPTS, expert_weights=[None] * 3).logits
    with model.disable_adapter():
        plain = model(PROMPTS).logits
    assert (backbone - plain).abs().max() > 1e-3
    model.remove_expert("a")
    torch.testing.assert_close(model(PROMPTS, expert_weights="b").logits, expected(folder, "b", 0.5), **close)
    merged = model.merge_and_unload(expert_weights="b")
    torch.testing.assert_close(merged(PROMPTS).logits, expected(folder, "b", 0.5), **close)


@torch.no_grad()
def test_a_reference_and_building_in_memory(folder):
    config = settings(folder, "{0}/s,{0}/harmful:0.25", experts=experts(folder))
    model = get_mediator_model(tiny_model(), config)
    found = model(PROMPTS, expert_weights="a").logits
    torch.testing.assert_close(found, expected(folder, "a", 0.25, "harmful"), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_rule_scales_by_the_experts_task_vectors(folder, tmp_path):
    config = settings(folder, "{}/s:0.1", always_rule="alpha")
    build_mediator(folder / "base", experts(folder), tmp_path / "out", config)
    model, _ = load_mediator(tmp_path / "out")
    weight = model.base_model.active.config.column_map["_always safety"]["*"]
    # All task vectors have the same size here.
    assert weight == pytest.approx(0.1, rel=0.05)
    found = model(PROMPTS, expert_weights="a").logits
    torch.testing.assert_close(found, expected(folder, "a", weight), rtol=1e-3, atol=1e-3)
    build_mediator(
        folder / "base",
        experts(folder),
        tmp_path / "less",
        settings(folder, "{}/s:0.1", always_rule="alpha-omega"),
    )


def test_worked_numbers():
    task, safety = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    scale = alpha(0.1, float(task.norm()), float(safety.norm()))
    assert scale == pytest.approx(0.184391, abs=1e-6)
    assert omega(task, scale * safety) == pytest.approx(1.0)
    along = scale * torch.diag(torch.tensor([2.0, 1.0]))
    # R = diag(.3688, 4), its mean over four entries 1.0922.
    assert omega(task, along) == pytest.approx(exp(-200 * (2 * scale + 4) / 4), rel=1e-6)


def test_what_is_wrong_is_said(folder, tmp_path):
    assert parse_always("a/b:0.1") == ("a/b", None, 0.1)
    assert parse_always("a,b:2") == ("a", "b", 2.0)
    for text in ("a", "a:", ":0.1", "a:x", "a:nan"):
        with pytest.raises(ConfigError, match="PATH:WEIGHT"):
            parse_always(text)
    for text in ("a:1e4", "a:-1e38", "a:1e300"):
        with pytest.raises(ConfigError, match="at most 1000"):
            parse_always(text)
    planned = plan_mediator(folder / "base", experts(folder), config=settings(folder, "{}/nothing:1"))
    assert any("always-on 'safety'" in problem for problem in planned.problems)
    command = ["build", "--base", str(folder / "base"), "--output", str(tmp_path / "out"), "--routed-layers", "all"]
    command += ["--expert", f"a={folder / 'a'}", "--always", f"safety={folder / 's'}:0.1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "always on: safety" in done.stdout
