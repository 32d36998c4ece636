"""The pipeline file for MergeBench's experts, dry-run on small stand-ins with the real numbers of vocabulary rows."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mediator_peft.cli.app import app

PIPELINE = Path(__file__).parents[2] / "tutorials" / "mergebench.yaml"
ROWS, PADDED_ROWS = 128256, 128320


def write_stand_in(folder, rows, seed):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # What all share is drawn first, and then what differs.
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            shape = (ROWS, 8) if len(parameter) == rows else parameter.shape
            parameter[: shape[0]] = 0.1 * torch.randn(shape, generator=generator)
        if seed:
            noise = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                if len(parameter) != rows:
                    parameter += 0.005 * torch.randn(parameter.shape, generator=noise)
    model.to(torch.bfloat16).save_pretrained(folder)
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(folder)


def dry_run(folder, *more):
    content = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    experts = {name: str(folder / name) for name in content["build"]["experts"]}
    prompts = {name: str(folder / f"{name}.jsonl") for name in content["calibrate"]["data"]}
    settings = {
        "build.base": str(folder / "base"),
        "build.experts": json.dumps(experts),
        "build.output": str(folder / "out"),
        "build.workers": 1,
        "calibrate.data": json.dumps(prompts),
        "eval.report": str(folder / "report"),
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return CliRunner().invoke(app, ["run", str(PIPELINE), "--dry-run", *arguments, *more])


@pytest.mark.slow
def test_the_pipeline_file_is_ready_for_checkpoints_of_these_shapes(tmp_path):
    content = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    assert set(content["build"]["experts"]) == set(content["calibrate"]["data"])
    write_stand_in(tmp_path / "base", ROWS, 0)
    for seed, name in enumerate(content["build"]["experts"], 1):
        write_stand_in(tmp_path / name, PADDED_ROWS, seed)
        lines = [json.dumps({"prompt": f"{name} {number}"}) + "\n" for number in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    shown = dry_run(tmp_path)
    assert shown.exit_code == 0, shown.stderr
    assert "steps: build, calibrate, eval" in shown.stderr
    (tmp_path / "math.jsonl").unlink()
    missing = dry_run(tmp_path, "--set", "eval.lm_eval=ifeval", "--set", "eval.limit=0")
    assert missing.exit_code != 0
    assert "eval.limit must be a whole number" in missing.stderr
