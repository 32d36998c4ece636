"""The whole way by one YAML file, and the checks around it."""

import errno
import json
import os
import stat

import pytest
import torch
import yaml
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import of_whole_blocks, write_tiny_checkpoints
from typer.testing import CliRunner

from mediator_peft import load_mediator
from mediator_peft.cli.app import app

ALL = """
build:
  base: base
  experts: {math: math, code: code}
  output: out
  config: {density: 1.0, encoding: float, routed_layers: all}
calibrate:
  data: {math: math.jsonl, code: code.jsonl}
eval:
  data: {math: math.jsonl, code: code.jsonl}
  max_new_tokens: 2
  report: results
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


def filled(tmp_path):
    write_tiny_checkpoints(tmp_path, ["base", "math", "code"], dtype=torch.bfloat16, only=["q_proj", "up_proj"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(tmp_path / "base")
    for expert, start in (("math", "7 + "), ("code", "def f")):
        lines = [{"prompt": start + "x" * number, "answer": "7"} for number in range(12)]
        (tmp_path / f"{expert}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "all.yaml").write_text(ALL)
    return tmp_path


def test_one_file_builds_calibrates_and_evaluates(folder):
    done = run("run", folder / "all.yaml", "--set", "build.config.density=0.5", "--set", "calibrate.batch_size=4")
    assert done.exit_code == 0, done.stderr
    model, _ = load_mediator(folder / "out")
    assert model.peft_config["default"].density == 0.5
    assert model.router is not None
    assert (folder / "results" / "results.json").is_file()
    kept = yaml.safe_load((folder / "out" / "mediator" / "pipeline.yaml").read_text())
    assert list(kept) == ["build", "calibrate", "eval"]
    assert kept["build"]["config"]["density"] == 0.5
    assert kept["calibrate"]["batch_size"] == 4
    mode = stat.S_IMODE((folder / "out" / "mediator" / "adapter_model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((folder / "out" / "mediator" / "README.md").stat().st_mode)


def test_a_file_says_how_the_model_is_loaded_and_what_belongs_to_no_expert(tmp_path, monkeypatch):
    of_whole_blocks(monkeypatch)
    folder = filled(tmp_path)
    (folder / "other.txt").write_text("".join(f"zebra number {number}\n" for number in range(9)))
    sections = yaml.safe_load(ALL)
    sections["calibrate"] |= {"quantize": "nf4", "background": "other.txt"}
    sections["eval"] |= {"quantize": "nf4"}
    (folder / "all.yaml").write_text(yaml.safe_dump(sections))
    plain = run("run", folder / "all.yaml", "--set", "calibrate.quantize=null", "--set", "eval.quantize=null")
    assert plain.exit_code == 0, plain.stderr
    assert load_mediator(folder / "out")[0].peft_config["default"].fitted_quantization is None
    done = run("run", folder / "all.yaml")
    assert done.exit_code == 0, done.stderr
    model, _ = load_mediator(folder / "out")
    assert model.peft_config["default"].fitted_quantization == "nf4"
    report = json.loads((folder / "out" / "mediator" / "report" / "routing.json").read_text())
    assert any(name.startswith("yours") for name in report["base_weight_by_family"])


def test_a_single_step(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("run", "all.yaml", "--only", "build", "--set", "build.output=elsewhere", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["build"]["experts"] == ["math", "code"]
    assert (folder / "elsewhere").is_dir()
    assert not (folder / "out").exists()


def test_a_dry_run_writes_nothing(folder):
    before = sorted(folder.iterdir())
    assert run("run", folder / "all.yaml", "--dry-run").exit_code == 0
    experts = [f"--expert={name}={folder / name}" for name in ("math", "code")]
    shown = run("build", "--base", folder / "base", *experts, "--output", folder / "out", "--dry-run", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["problems"] == []
    (folder / "math" / "model.safetensors").unlink()
    refused = run("build", "--base", folder / "base", *experts, "--output", folder / "out", "--dry-run")
    assert refused.exit_code == 3
    assert "math" in refused.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--set", "build.config.densty=0.1"], 3, "Did you mean 'density'"),
        (["--set", "evl.data=x"], 3, "Did you mean 'eval'"),
        (["--set", "nonsense"], 2, "KEY=VALUE"),
        (["--set", "build.workers=["], 2, "YAML"),
        (["--only", "biuld"], 2, "no step"),
    ],
)
def test_wrong_options(options, code, message, folder):
    refused = run("run", folder / "all.yaml", *options)
    assert refused.exit_code == code
    assert message in " ".join(refused.stderr.split())
    assert not (folder / "out").exists()


def test_verifying_compares_weights_and_logits(folder):
    assert run("run", folder / "all.yaml", "--only", "build").exit_code == 0
    against = [f"--against={name}={folder / name}" for name in ("math", "code", "base")]
    exact = json.loads(run("verify", folder / "out", *against, "--json").stdout)
    for difference in exact["differences"].values():
        assert difference["max_difference"] == 0.0
        assert difference["max_logit_difference"] == 0.0
    sparse = ["--set", "build.config={}", "--set", f"build.output={folder / 'sparse'}"]
    assert run("run", folder / "all.yaml", "--only", "build", *sparse).exit_code == 0
    found = json.loads(run("verify", folder / "sparse", *against, "--json").stdout)
    assert all(difference["max_logit_difference"] > 1e-3 for difference in found["differences"].values())
    without = json.loads(run("verify", folder / "sparse", *against, "--no-logits", "--json").stdout)
    assert "max_logit_difference" not in without["differences"]["math"]


@pytest.mark.slow
def test_the_same_file_again_goes_on_with_the_finished_build(folder):
    assert run("run", folder / "all.yaml", "--only", "build").exit_code == 0
    weights = folder / "out" / "model.safetensors"
    before = weights.stat().st_mtime_ns, weights.read_bytes()
    again = run("run", folder / "all.yaml", "--json")
    assert again.exit_code == 0, again.stderr
    assert "holds this build already" in again.stderr
    assert (weights.stat().st_mtime_ns, weights.read_bytes()) == before
    assert json.loads(again.stdout)["routing"]["overall_accuracy"] > 0.5
    third = run("run", folder / "all.yaml", "--only", "build", "--json")
    assert json.loads(third.stdout)["build"]["experts"] == ["math", "code"]
    assert "holds this build already" in run("run", folder / "all.yaml", "--dry-run").stderr


@pytest.mark.parametrize("change", ["setting", "expert", "input", "touched input"])
def test_another_build_in_the_place_of_the_output_is_refused(change, folder):
    assert run("run", folder / "all.yaml", "--only", "build").exit_code == 0
    more = []
    weights = folder / "math" / "model.safetensors"
    if change == "setting":
        more = ["--set", "build.config.density=0.5", "--set", "build.config.encoding=sign"]
    elif change == "expert":
        more = ["--set", "build.experts={math: math}", "--set", "calibrate=null", "--set", "eval=null"]
    elif change == "input":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    later = (folder / "out" / "mediator" / "provenance.json").stat().st_mtime + 10
    if "input" in change:
        os.utime(weights, (later, later))
    found = run("run", folder / "all.yaml", *more, "--only", "build")
    if change == "touched input":  # newer, with the same bytes
        assert found.exit_code == 0, found.stderr
        return
    assert found.exit_code == 3
    assert "is not a finished build of this pipeline" in found.stderr
    assert {"setting": "build.config", "expert": "build.experts", "input": "math"}[change] in found.stderr


def test_all_faults_of_all_steps_are_listed_before_the_build(folder):
    (folder / "math.jsonl").write_text('{"prompt": "a"}\n')
    faults = [
        "--set",
        "eval.device=meta",
        "--set",
        "eval.match=nope",
        "--set",
        "calibrate.quantize=nf5",
        "--set",
        "calibrate.background=nowhere.txt",
        "--set",
        f"eval.report={folder / 'all.yaml'}",
    ]
    refused = run("run", folder / "all.yaml", *faults)
    assert refused.exit_code == 3
    for word in ("eval.device", "eval.match", "eval.report", "eval.data.math: ", "nf5", "calibrate.background"):
        assert word in refused.stderr
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_a_report_that_cannot_be_moved_into_place_leaves_the_old_one(folder, monkeypatch):
    done = run("run", folder / "all.yaml")
    assert done.exit_code == 0, done.stderr
    results = folder / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mediator_peft.evaluation.report.draw_report", fail)
    data = [f"--data={name}={folder / name}.jsonl" for name in ("math", "code")]
    failed = run("eval", folder / "out", *data, "--report", results, "--max-new-tokens", "3")
    assert failed.exit_code == 4, failed.stderr
    # What was scored is kept beside the report, for the next call to go on with.
    assert {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()} == before
