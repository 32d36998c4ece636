"""Models that were never fine-tuned from the base are noticed, fine-tunes are not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mediator_peft import build_mediator, plan_mediator
from mediator_peft.cli.app import app
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointMismatchError
from mediator_peft.merge.distance import distances
from mediator_peft.merge.offline import open_job
from tests.tiny import fine_tuned, tiny_model, write_tiny_checkpoints

SETTINGS = MediatorSettings(density=0.2)


def unrelated(tmp_path, dtype=torch.float32):
    for seed, name in enumerate(("base", "a", "b")):
        tiny_model(seed=seed).to(dtype).save_pretrained(tmp_path / name)
    return tmp_path / "base", {name: tmp_path / name for name in "ab"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrelated_models_are_refused_unless_wanted(dtype, tmp_path):
    base, experts = unrelated(tmp_path, dtype)
    with pytest.raises(CheckpointMismatchError, match="allow_distant") as refused:
        build_mediator(base, experts, tmp_path / "out", SETTINGS)
    assert all(f"expert {name!r} lies far from base" in str(refused.value) for name in experts)
    assert not (tmp_path / "out").exists()
    assert len(plan_mediator(base, experts, config=SETTINGS).problems) == 2
    planned = plan_mediator(base, experts, config=SETTINGS, allow_distant=True)
    assert not planned.problems
    assert sum("lies far" in text for text in planned.warnings) == 2
    report = build_mediator(base, experts, tmp_path / "out", SETTINGS, allow_distant=True)
    assert sum("lies far" in note for note in report.notes) == 2


def test_the_command_line_says_so_too(tmp_path):
    base, experts = unrelated(tmp_path)
    arguments = ["build", "--base", str(base), "--output", str(tmp_path / "out")]
    arguments += [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 3
    assert "--allow-distant" in refused.stderr
    assert CliRunner().invoke(app, [*arguments, "--allow-distant"]).exit_code == 0


@pytest.mark.parametrize("scale", [0.0, 0.001, 0.05])
def test_fine_tunes_are_not_spoken_of(scale, tmp_path):
    paths = write_tiny_checkpoints(tmp_path, scale=scale)
    planned = plan_mediator(paths["base"], {"math": paths["math"]}, config=SETTINGS)
    assert not [text for text in (*planned.problems, *planned.warnings) if "lies far" in text]


def test_an_unusual_distance_is_a_warning(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, scale=0.15)
    planned = plan_mediator(paths["base"], {"math": paths["math"]}, config=SETTINGS)
    assert not planned.problems
    assert sum("lies far" in text for text in planned.warnings) == 1


def test_weights_a_hundred_times_too_large_are_refused(tmp_path):
    paths = write_tiny_checkpoints(tmp_path)
    tensors = {name: tensor * 100 for name, tensor in load_file(paths["math"] / "model.safetensors").items()}
    save_file(tensors, paths["math"] / "model.safetensors", metadata={"format": "pt"})
    assert plan_mediator(paths["base"], {"math": paths["math"]}, config=SETTINGS).problems


def test_the_sample_tells_the_distance_of_the_whole(tmp_path):
    """Against norms over all entries of all matrices of the blocks."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(base, 1, 0.03)
    tuned.save_pretrained(tmp_path / "a")
    settings = MediatorSettings(experts={"a": str(tmp_path / "a")})
    found = distances(open_job(str(tmp_path / "base"), settings))["a"]
    ours, theirs = (
        torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "proj" in name])
        for model in (base, tuned)
    )
    expected = float((theirs - ours).norm() / ours.norm())
    assert found.relative == pytest.approx(expected, rel=0.05)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(ours, theirs, dim=0)), abs=0.01)
