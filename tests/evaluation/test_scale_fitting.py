"""Scales fitted to the expert's distribution: nearer on held-out prompts, nothing else touched, gradients by hand."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mediator_peft import MediatorConfig, build_mediator, load_mediator, verify_mediator
from mediator_peft.cli.app import app
from mediator_peft.errors import CheckpointError, ConfigError, UnsupportedError
from mediator_peft.evaluation.answer_batches import AnswerBatch
from mediator_peft.evaluation.scale_fitting import (
    ScaleFit,
    divergence,
    fit_factors,
    fit_scales,
    log_probabilities,
    read_pairs,
)

PROMPTS = topic_texts(5, 45, 24, seed=1)
ANSWERS = topic_texts(5, 45, 24, seed=2)
FIT = ScaleFit(num_steps=10, learning_rate=0.1)


def built(folder, arch="llama", **settings):
    """An output whose scales can be bettered: of random deltas, the projection makes thin signs too strong."""
    paths = write_tiny_checkpoints(folder / "checkpoints", arch=arch)
    tiny_tokenizer().save_pretrained(paths["base"])
    settings = {"routed_layers": "all", "density": 0.1, "merge_method": "base", **settings}
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(**settings))
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    (folder / "math.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "out", paths


def weights(out):
    return load_file(out / "mediator" / "adapter_model.safetensors")


@torch.no_grad()
def divergence_by_hand(ours, theirs, prompts, answers, **options):
    tokenizer, total, count = tiny_tokenizer(), 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        first, then = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], 2]
        ids = torch.tensor([first + then])
        p, q = (
            model(ids, **some).logits[0, len(first) - 1 : -1].double().softmax(-1)
            for model, some in ((theirs, {}), (ours, options))
        )
        total += float((p * (p / q).log()).sum())
        count += len(then)
    return total / count


@pytest.mark.parametrize("arch", [pytest.param("llama_tied", marks=pytest.mark.slow), "gpt2"])
def test_an_expert_comes_nearer_and_nothing_but_its_scales_changes(arch, tmp_path):
    out, paths = built(tmp_path, arch)
    before = weights(out)
    expert = AutoModelForCausalLM.from_pretrained(paths["math"])
    asked = {"expert_weights": "math"}
    former = divergence_by_hand(load_mediator(out)[0], expert, PROMPTS, ANSWERS, **asked)
    arguments = ["--expert", f"math={paths['math']}", "--data", f"math={tmp_path / 'math.jsonl'}", "--steps", "10"]
    done = CliRunner().invoke(app, ["fit-scales", str(out), *arguments, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["math"]
    assert report["is_kept"]
    assert report["divergence_after"] < report["divergence_before"]
    assert (report["num_fitted"], report["num_held_out"]) == (18, 6)
    after = weights(out)
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"math:scales"}
    assert before.keys() == after.keys()
    assert not verify_mediator(out).problems
    assert divergence_by_hand(load_mediator(out)[0], expert, PROMPTS, ANSWERS, **asked) < former


@pytest.mark.slow
def test_held_out_divergence_is_that_of_the_model_as_it_is_served(tmp_path):
    out, paths = built(tmp_path, encoding="factors_sign")
    fit = ScaleFit(num_steps=4, held_out=0.5)
    report = fit_scales(out, {"math": paths["math"]}, {"math": read_pairs(str(tmp_path / "math.jsonl"))}, fit)["math"]
    order = list(zip(PROMPTS, ANSWERS, strict=True))
    random.Random(0).shuffle(order)
    expert = AutoModelForCausalLM.from_pretrained(paths["math"])
    served = load_mediator(out, dtype=torch.float32)[0]
    found = divergence_by_hand(served, expert, *zip(*order[:12], strict=True), expert_weights="math")
    assert report.is_kept
    assert found == pytest.approx(report.divergence_after, rel=1e-3)


def test_factors_follow_the_slope():
    """The first step of Adam goes by the learning rate, down the slope that differences show."""
    model, expert = tiny_model().eval(), tiny_model(seed=1).eval()
    rows = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14])]
    batch = AnswerBatch.of(rows)
    with torch.no_grad():
        known = [(batch, log_probabilities(expert, batch))]
    names = [f"model.layers.{block}.mlp.{part}_proj.weight" for block in (0, 2) for part in ("up", "down")]
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    deltas = {name: 0.1 * torch.randn(parameters[name].shape, generator=generator) for name in names}
    slopes = {}
    with torch.no_grad():
        for name in names:
            ends = []
            for step in (1e-2, -2e-2):
                parameters[name].add_(step * deltas[name])
                ends.append(float(divergence(model, known)))
            parameters[name].add_(1e-2 * deltas[name])
            slopes[name] = ends[0] - ends[1]
    factors = fit_factors(model, deltas, known, ScaleFit(num_steps=1, learning_rate=0.01))
    for name in names:
        assert factors[name] == pytest.approx(0.99 if slopes[name] > 0 else 1.01, abs=2e-3)


@pytest.mark.slow
def test_what_does_not_help_is_not_saved(tmp_path):
    out, paths = built(tmp_path)
    before = (out / "mediator" / "adapter_model.safetensors").read_bytes()
    wild = ScaleFit(num_steps=2, learning_rate=4.0)
    # Answers are the expert's own where none are given.
    pairs = {"math": [(prompt, None) for prompt in PROMPTS]}
    report = fit_scales(out, {"math": paths["math"]}, pairs, wild)["math"]
    assert not report.is_kept
    assert (out / "mediator" / "adapter_model.safetensors").read_bytes() == before


def test_what_cannot_be_fitted_is_refused(tmp_path):
    out, paths = built(tmp_path)
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    with pytest.raises(ConfigError, match="Did you mean 'math'"):
        fit_scales(out, {"maths": paths["math"]}, {"maths": pairs})
    with pytest.raises(ConfigError, match="no data"):
        fit_scales(out, {"math": paths["math"]}, {"code": pairs})
    with pytest.raises(ConfigError, match="7 prompts; give 8"):
        fit_scales(out, {"math": paths["math"]}, {"math": pairs[:7]})
    other, _ = built(tmp_path / "float", encoding="float")
    with pytest.raises(UnsupportedError, match="no scales"):
        fit_scales(other, {"math": paths["math"]}, {"math": pairs})
    shutil.copytree(paths["code"], tmp_path / "copy")
    experts = {name: paths[name] for name in ("math", "code")} | {"copy": tmp_path / "copy"}
    build_mediator(paths["base"], experts, tmp_path / "shared", MediatorConfig(families="auto"))
    with pytest.raises(UnsupportedError, match="'code' shares a delta with copy"):
        fit_scales(tmp_path / "shared", {"code": paths["code"]}, {"code": pairs})
    # The others may be fitted: what comes next is looked at.
    with pytest.raises(ConfigError, match="7 prompts; give 8"):
        fit_scales(tmp_path / "shared", {"math": paths["math"]}, {"math": pairs[:7]})


@pytest.mark.parametrize("wrong", ["code", "base"])
def test_the_checkpoint_of_another_expert_is_refused(tmp_path, wrong):
    out, paths = built(tmp_path)
    with pytest.raises(CheckpointError, match="'math': its deltas were not made from this checkpoint"):
        fit_scales(out, {"math": paths[wrong]}, {"math": list(zip(PROMPTS, ANSWERS, strict=True))})
