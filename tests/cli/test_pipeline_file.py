"""Pipeline files: strict keys, suggestions, overrides."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mediator_peft import build_mediator
from mediator_peft.cli.pipeline_file import BuildSection, CalibrateSection, EvalSection, read_pipeline
from mediator_peft.errors import ConfigError
from tests.tiny import write_tiny_checkpoints

SECTIONS = {"build": BuildSection, "calibrate": CalibrateSection, "eval": EvalSection}
GOOD = """
build:
  base: base
  experts: {math: math, code: code}
  output: out
  config: {density: 0.3, routed_layers: all}
calibrate:
  data: {math: math.jsonl}
"""


def test_a_file_says_what_is_built(tmp_path):
    write_tiny_checkpoints(tmp_path)
    (tmp_path / "all.yaml").write_text(GOOD)
    pipeline = read_pipeline(tmp_path / "all.yaml", {"build.config.density": 0.1})
    build = pipeline.build
    build_mediator(build.base, build.experts, build.output, pipeline.config, workers=build.workers)
    assert (tmp_path / "out" / "mediator").is_dir()
    assert pipeline.config.density == 0.1
    assert pipeline.config.routed_layers == "all"
    assert pipeline.calibrate.data == {"math": "math.jsonl"}
    assert pipeline.eval is None


def test_null_means_the_default(tmp_path):
    text = GOOD + "eval:\n  data: {math: math.jsonl}\n"
    for name, form in SECTIONS.items():
        nulls = [item.name for item in fields(form) if item.name not in ("base", "experts", "output", "config", "data")]
        text = text.replace(f"{name}:\n", f"{name}:\n" + "".join(f"  {key}: null\n" for key in nulls))
    (tmp_path / "all.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text(GOOD + "eval:\n  data: {math: math.jsonl}\n")
    assert read_pipeline(tmp_path / "all.yaml") == read_pipeline(tmp_path / "plain.yaml")


WRONG = {
    "no file": (None, "cannot be read"),
    "no YAML": ("a: [", "cannot be read"),
    "a list": ("- a", "sections"),
    "no build": ("calibrate: {data: {a: b}}", "section build is missing"),
    "section": (GOOD + "evl: {}", "Did you mean 'eval'"),
    "key": (GOOD.replace("base:", "bse:"), "Did you mean 'base'"),
    "config key": (GOOD.replace("density", "densty"), "Did you mean 'density'"),
    "config value": (GOOD.replace("0.3", "3"), r"density must be in \(0, 1\]"),
    "no output": (GOOD.replace("  output: out\n", ""), "build.output is missing"),
    "experts are a list": (GOOD.replace("{math: math, code: code}", "[a, b]"), "pairs"),
    "workers": (GOOD.replace("  output: out", "  output: out\n  workers: many"), "whole number"),
    "memory": (GOOD.replace("  output: out", "  output: out\n  max_memory: much"), "max_memory"),
    "data": (GOOD.replace("data:", "daat:"), "Did you mean 'data'"),
    "calibrate is a word": (GOOD.split("calibrate")[0] + "calibrate: yes please", "must be a section"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(kind, tmp_path):
    text, message = WRONG[kind]
    if text is not None:
        (tmp_path / "all.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_pipeline(tmp_path / "all.yaml")


def test_all_faults_are_listed_at_once(tmp_path):
    (tmp_path / "all.yaml").write_text(GOOD.replace("density", "densty").replace("base:", "bse:"))
    with pytest.raises(ConfigError) as caught:
        read_pipeline(tmp_path / "all.yaml")
    assert "'density'" in str(caught.value)
    assert "'base'" in str(caught.value)
