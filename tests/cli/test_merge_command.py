"""``merge`` writes one model; ``methods`` and the documents list what the table holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mediator_peft import MediatorSettings, build_mediator
from mediator_peft.checkpoints.output_folder import partial_name
from mediator_peft.cli.app import app
from mediator_peft.errors import ConfigError
from mediator_peft.merge import offline
from mediator_peft.merge.plain_merge import merge_models
from mediator_peft.methods.merging import MERGE_METHODS
from mediator_peft.methods.merging.catalogue import catalogue, markdown
from tests.merge.helpers import EXPERTS, digests, experts_of
from tests.tiny import write_tiny_checkpoints
from tests.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    paths = write_tiny_checkpoints(tmp_path_factory.mktemp("in"), ("base", *EXPERTS), dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(paths["base"])
    return paths


@pytest.fixture
def coefficients(tmp_path):
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps({"coefficients_version": 1, "experts": {"math": 0.5, "code": 0.25, "law": 0.125}}))
    return path


def options(paths, *names):
    return ["--base", paths["base"], *(part for name in names for part in ("--expert", f"{name}={paths[name]}"))]


def settings_of(name, coefficients):
    return MediatorSettings(merge_method=name, merge_data=str(coefficients) if name == "weighted" else None)


# Those that need measurements of their own are tried out with these.
ALONE = sorted(name for name, row in MERGE_METHODS.items() if not row.needs_data or name == "weighted")


# One of each kind of work by default: fused, entrywise, with draws, with data, in two passes, on whole tensors.
QUICK = {"average", "consensus", "dare", "weighted", "widen", "ties"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALONE]
)
def test_two_workers_write_the_bytes_of_one(name, paths, coefficients, tmp_path):
    number = MERGE_METHODS[name].num_experts or 3
    experts = dict(list(experts_of(paths).items())[:number])
    config = settings_of(name, coefficients)
    for workers in (1, 2):
        turned = dict(reversed(experts.items())) if workers == 2 and MERGE_METHODS[name].is_order_free else experts
        merge_models(paths["base"], turned, tmp_path / f"{workers}", config, workers=workers)
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    # Cards and provenance list the experts as they were given.
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one.keys() == two.keys()


def test_a_merged_model_is_the_backbone_of_a_build(paths, tmp_path):
    config = MediatorSettings(merge_method="karcher", depth_scaling="auto")
    merge_models(paths["base"], experts_of(paths), tmp_path / "merged", config)
    build_mediator(paths["base"], experts_of(paths), tmp_path / "out", config)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (tmp_path / "merged" / "mediator").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_the_command_merges_and_says_how(paths, tmp_path):
    out = tmp_path / "merged"
    shown = run(
        "merge", "--method", "ties", "--merge-parameter", "density=0.5", *options(paths, *EXPERTS), "-o", out, "--json"
    )
    assert shown.exit_code == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["merge_parameters"] == {"density": 0.5, "scale": 1.0}
    assert report["experts"] == list(EXPERTS)
    known = json.loads((out / "provenance.json").read_text())
    assert known["merge"]["config"] == {"merge_method": "ties", "merge_parameters": {"density": 0.5}}
    assert len(known["inputs"]["base"]["files"]["model.safetensors"]["sha256"]) == 64
    expected = dense_ties(paths, 0.5)
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert run("verify", out).exit_code == 0
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    shown = run("verify", out)
    assert shown.exit_code == 3
    assert "config.json" in shown.stderr
    assert run("verify", out, "--accept").exit_code == 0
    assert run("verify", out).exit_code == 0


def dense_ties(paths, density):
    """The merged model with whole tensors, by the function alone."""
    weights = {name: load_file(path / "model.safetensors") for name, path in paths.items()}
    base = {name: tensor.bfloat16().float() for name, tensor in weights.pop("base").items()}
    found = {}
    for name, tensor in base.items():
        vectors = torch.stack([weights[expert][name].float() - tensor for expert in sorted(weights)])
        found[name] = (tensor + MERGE_METHODS["ties"](vectors, density=density)).bfloat16()
    return found


def test_a_killed_merge_goes_on(paths, tmp_path, monkeypatch):
    merge_models(paths["base"], experts_of(paths), tmp_path / "whole", MediatorSettings(merge_method="widen"))
    out, plain, calls = tmp_path / "out", offline.Build._merge_one, []

    def stop_in_the_middle(self, number):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(number)
        plain(self, number)

    monkeypatch.setattr(offline.Build, "_merge_one", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        merge_models(paths["base"], experts_of(paths), out, MediatorSettings(merge_method="widen"))
    assert partial_name(out).exists()
    seen = []
    monkeypatch.setattr(offline.Build, "_merge_one", lambda self, number: (seen.append(number), plain(self, number)))
    merge_models(paths["base"], experts_of(paths), out, MediatorSettings(merge_method="widen"))
    assert not set(seen) & set(calls)
    assert digests(out) == digests(tmp_path / "whole")


def test_other_coefficients_are_other_work(paths, coefficients, tmp_path, monkeypatch):
    out, plain, seen = tmp_path / "out", offline.Build._merge_one, []

    def stop(self, number):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(number)
        plain(self, number)

    monkeypatch.setattr(offline.Build, "_merge_one", stop)
    config = settings_of("weighted", coefficients)
    with pytest.raises(KeyboardInterrupt):
        merge_models(paths["base"], experts_of(paths), out, config)
    coefficients.write_text(coefficients.read_text().replace("0.125", "0.5"))
    os.utime(coefficients, (1, 1))
    monkeypatch.setattr(offline.Build, "_merge_one", plain)
    merge_models(paths["base"], experts_of(paths), out, config)
    merge_models(paths["base"], experts_of(paths), tmp_path / "fresh", config)
    assert digests(out) == digests(tmp_path / "fresh")


def test_faults_of_a_merge_are_listed_together(paths, tmp_path):
    shown = run(
        "merge", "--method", "slerp", "--merge-parameter", "t=2", "--depth-scaling", "deep", "--merge-data", "x",
        *options(paths, *EXPERTS), "-o", tmp_path / "out",
    )  # fmt: skip
    assert shown.exit_code == 3
    for part in ("[0, 1]", "depth_scaling", "reads no data"):
        assert part in shown.stderr
    shown = run("merge", "--method", "slerp", *options(paths, *EXPERTS), "-o", tmp_path / "out")
    assert "merges 2 experts, got 3" in shown.stderr
    shown = run("merge", "--method", "weighted", *options(paths, *EXPERTS), "-o", tmp_path / "out")
    assert "needs merge_data: coefficients.json" in shown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(name for name, row in MERGE_METHODS.items() if row.needs_base))
def test_methods_that_add_up_need_a_base(name, paths, tmp_path):
    experts = dict(list(experts_of(paths).items())[: MERGE_METHODS[name].num_experts])
    with pytest.raises(ConfigError, match=r"base"):
        merge_models(None, experts, tmp_path / "out", MediatorSettings(merge_method=name))
    assert not (tmp_path / "out").exists()


def test_without_a_base_the_average_is_the_average(paths, tmp_path):
    merge_models(None, experts_of(paths), tmp_path / "out")
    weights = [load_file(path / "model.safetensors") for path in experts_of(paths).values()]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = sum(each[name].float() for each in weights) / 3
        torch.testing.assert_close(tensor.float(), expected, rtol=2**-7, atol=1e-6)


def test_methods_are_listed(capsys):
    shown = run("methods", "--json")
    assert shown.exit_code == 0
    entries = json.loads(shown.stdout)
    assert [entry["method"] for entry in entries] == sorted(MERGE_METHODS)
    assert entries == json.loads(json.dumps(catalogue()))
    shown = run("methods")
    assert shown.exit_code == 0
    assert "karcher" in shown.stdout


def test_the_document_holds_the_table_of_the_code():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text.endswith(f"-->\n{markdown()}"), (
        "docs/methods.md is out of date: put mediator_peft.methods.merging.catalogue.markdown() at its end"
    )
