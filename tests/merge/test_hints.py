"""What is unusual is pointed out as a hint; what is usual is not spoken of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mediator_peft import plan_mediator
from mediator_peft.cli.app import app
from mediator_peft.merge.hints import robust_scores, unusual_rows
from tests.tiny import fine_tuned, tiny_model


def written(tmp_path, base, experts):
    base.save_pretrained(tmp_path / "base")
    for name, model in experts.items():
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", {name: tmp_path / name for name in experts}


def three(base, scales=(0.01, 0.01, 0.01)):
    return {name: fine_tuned(base, seed, scale) for seed, (name, scale) in enumerate(zip("abc", scales, strict=True))}


def test_robust_scores_by_hand():
    # Median 3, distances 2 1 0 1 97, their median 1.
    assert robust_scores(np.array([1, 2, 3, 4, 100], np.float32))[-1] == pytest.approx(0.6745 * 97)
    assert not robust_scores(np.ones(5, np.float32)).any()


def test_a_planted_row_is_found_among_rows_that_moved():
    norms = np.zeros(1000, np.float32)
    norms[:500] = 0.01 + 0.001 * np.random.default_rng(0).random(500)
    assert not unusual_rows(norms)
    norms[77] = 0.06
    ((row, score),) = unusual_rows(norms)
    assert row == 77
    assert score > 30


def test_a_plan_of_honest_experts_has_no_hints(tmp_path):
    base = tiny_model()
    assert plan_mediator(*written(tmp_path, base, three(base))).hints == []


def test_a_plan_names_the_token_of_a_row_that_moved_alone(tmp_path):
    base = tiny_model()
    experts = three(base)
    with torch.no_grad():
        experts["b"].model.embed_tokens.weight[17] += 0.5
    found = plan_mediator(*written(tmp_path, base, experts))
    (hint,) = found.hints
    assert "expert 'b'" in hint
    assert "17 (z " in hint
    assert found.is_ok
    pairs = [part for name in experts for part in ("--expert", f"{name}={tmp_path / name}")]
    printed = CliRunner().invoke(app, ["plan", "--base", str(tmp_path / "base"), *pairs])
    assert printed.exit_code == 0
    assert "hint: expert 'b'" in printed.stderr


@pytest.mark.parametrize("number", [2, 3])
def test_an_expert_that_went_much_further_is_pointed_out_among_three(number, tmp_path):
    base = tiny_model()
    experts = dict(list(three(base, (0.002, 0.02, 0.002)).items())[:number])
    found = plan_mediator(*written(tmp_path, base, experts)).hints
    assert [("'b'" in hint, "times as large" in hint) for hint in found] == [(True, True)] * (number == 3)


def test_one_direction_is_pointed_out(tmp_path):
    base = tiny_model()
    experts = three(base)
    with torch.no_grad():
        for name, weight in experts["c"].named_parameters():
            if weight.ndim == 2 and "layers" in name:
                before = base.get_parameter(name)
                change = weight - before
                left = torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(1))
                spike = left @ torch.ones(1, weight.shape[1])
                weight.copy_(before + spike * change.norm() / spike.norm())
    (hint,) = plan_mediator(*written(tmp_path, base, experts)).hints
    assert "'c'" in hint
    assert "one direction" in hint


def test_one_matrix_of_another_model_is_a_warning(tmp_path):
    base = tiny_model()
    experts = three(base)
    with torch.no_grad():
        weight = experts["a"].model.layers[1].mlp.up_proj.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.15)
    found = plan_mediator(*written(tmp_path, base, experts))
    assert found.is_ok
    assert sum("model.layers.1.mlp.up_proj.weight" in warning for warning in found.warnings) == 1
