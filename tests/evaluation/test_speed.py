"""The measuring works and says what it did; how fast anything is, is no matter of a test."""

import json

import pytest
import torch
from tiny import random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.cli.app import app
from mediator_peft.evaluation.speed import DENSE, SpeedSettings, measure_speed, mixed_rows, num_rounds, plain_twin

QUICK = SpeedSettings(prompt_tokens=6, context=4, batch_size=3, rounds=1, steps=1)


@pytest.fixture
def out(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    tiny_tokenizer().save_pretrained(paths["base"])
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(density=0.3))
    return tmp_path / "out"


@torch.no_grad()
def test_the_plain_twin_is_the_backbone_and_shares_its_memory(out):
    model, _ = load_mediator(out, dtype=torch.float32)
    twin = plain_twin(model.base_model)
    prompts = random_prompts(2)
    with model.disable_adapter():
        expected = model(input_ids=prompts).logits
    assert torch.equal(twin(input_ids=prompts).logits, expected)
    changed = model(input_ids=prompts, expert_weights="math").logits
    assert not torch.equal(changed, expected)
    assert not any("mediator" in name for name, _ in twin.named_modules())
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in twin.parameters()} <= ours


def test_a_report_names_what_was_measured_and_leaves_the_weights_alone(out):
    model, _ = load_mediator(out, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticks = []
    report = measure_speed(model, QUICK, lambda: ticks.append(1))
    assert len(ticks) == num_rounds(QUICK)
    assert {(pace.work, pace.batch_size) for pace in report.paces} == {("decode", 1), ("decode", 3), ("prefill", 3)}
    assert all(pace.seconds > 0 and (pace.name != DENSE or pace.ratio == 1) for pace in report.paces)
    assert report.routing_seconds is None
    assert report.experts == ("math", "code", "base")
    banks = [layer.mediator_bank["default"] for layer in model.routed_layers().values()]
    expected = sum(buffer.nbytes for bank in banks for buffer in bank.buffers())
    assert report.memory["bank"] == expected > 0
    assert report.memory["saved while folded"] > 0
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_rows_of_one_expert_stand_together():
    assert mixed_rows(["a", "b", "c"], 4) == ["a", "a", "b", "c"]
    assert mixed_rows(["a", "b"], 1) == ["a"]


@pytest.mark.slow
def test_the_command_writes_tables_json_and_a_picture(out, tmp_path):
    options = ["--prompt-tokens", "6", "--context", "4", "--batch-size", "2", "--rounds", "1"]
    picture = tmp_path / "made" / "speed.png"
    result = CliRunner().invoke(app, ["bench", str(out), *options, "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {pace["name"] for pace in content["paces"]} >= {"backbone alone", "one expert", "mixed batch"}
    assert content["settings"]["rounds"] == 1
    assert content["threads"] == torch.get_num_threads()
    assert picture.stat().st_size > 1000
    result = CliRunner().invoke(app, ["bench", str(out), *options])
    assert result.exit_code == 0
    assert "mixed batch" in result.output
    assert "memory: bank" in result.output
    wrong = CliRunner().invoke(app, ["bench", str(out), *options, "--plot", str(tmp_path / "speed.gif")])
    assert wrong.exit_code == 3
    assert ".png" in wrong.output
