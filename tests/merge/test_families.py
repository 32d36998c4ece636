"""Families at build: equal experts once, related ones as a shared delta with residuals, all others as without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator, plan_mediator, verify_mediator
from mediator_peft.errors import ConfigError
from tests.merge.helpers import digests
from tests.tiny import fine_tuned, random_prompts, tiny_model

PROMPTS = random_prompts(4)
NAMES = ("a", "b", "c", "copy")
MAP = {
    "_family 1": {"a": 1.0, "b": 1.0},
    "a": {"a": 1.0},
    "b": {"b": 1.0},
    "c": {"c": 1.0, "copy": 1.0},
}


def write(folder, arch):
    """``a``, ``b`` and ``d`` have most of their task vectors in common; ``copy`` is ``c``."""
    base = tiny_model(arch)
    base.save_pretrained(folder / "base")
    common = fine_tuned(base, 1, 0.03)
    for seed, name in enumerate("abd", start=2):
        fine_tuned(common, seed, 0.02).save_pretrained(folder / name)
    fine_tuned(base, 9, 0.03).save_pretrained(folder / "c")
    shutil.copytree(folder / "c", folder / "copy")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write(tmp_path_factory.mktemp("families"), "llama")


def build(paths, out, names=NAMES, **settings):
    config = MediatorConfig(**{"routed_layers": "all", "merge_method": "base", **settings})
    report = build_mediator(paths["base"], {name: paths[name] for name in names}, out, config)
    return out, report


def stored(out: Path, column: str) -> dict[str, torch.Tensor]:
    with safe_open(out / "mediator" / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if f".{column}:" in key}  # noqa: SIM118


@torch.no_grad()
def logits(out: Path, spec) -> torch.Tensor:
    return load_mediator(out)[0](PROMPTS, expert_weights=spec).logits


def test_relatives_share_a_delta_copies_are_stored_once_and_others_keep_their_bytes(paths, tmp_path):
    plain, _ = build(paths, tmp_path / "plain")
    out, report = build(paths, tmp_path / "out", families="auto")
    model, _ = load_mediator(out)
    assert model.base_model.active.config.column_map == MAP
    assert not stored(out, "copy")
    assert stored(out, "_family 1")
    ours, theirs = stored(out, "c"), stored(plain, "c")
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(out, "copy"), logits(plain, "c"))
    assert report.notes[-2:] == [
        "copy equals c: its delta is stored once",
        next(note for note in report.notes if note.startswith("a, b share a delta")),
    ]
    assert not verify_mediator(out).problems
    assert report.delta_errors.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_at_density_1_members_are_exact(arch, tmp_path):
    paths = write(tmp_path, arch)
    settings = {"density": 1.0, "encoding": "float"}
    out, report = build(paths, tmp_path / "out", families="auto", **settings)
    assert "_family 1" in load_mediator(out)[0].base_model.active.config.column_map
    # Of what is stored of a member, both parts together.
    assert report.delta_errors["a"]["cosine"] > 0.99999
    plain, _ = build(paths, tmp_path / "plain", **settings)
    for spec in ("a", {"a": 0.7, "b": 0.3}, ["a", "b", "c", "copy"]):
        torch.testing.assert_close(logits(out, spec), logits(plain, spec), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_neither_order_nor_workers_nor_memory_change_a_byte(paths, tmp_path):
    first, _ = build(paths, tmp_path / "first", families="auto")
    config = MediatorConfig(routed_layers="all", merge_method="base", families="auto")
    experts = {name: paths[name] for name in NAMES}
    build_mediator(paths["base"], experts, tmp_path / "second", config, workers=2)
    assert digests(first) == digests(tmp_path / "second")
    backwards, _ = build(paths, tmp_path / "backwards", NAMES[::-1], families="auto")
    for column in MAP:
        ours, theirs = stored(first, column), stored(backwards, column)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    config.experts = {name: str(path) for name, path in experts.items()}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(paths["base"]), config)
    assert model.base_model.active.config.column_map == MAP


def test_copies_of_one_expert_give_one_delta(paths, tmp_path):
    out, _ = build(paths, tmp_path / "out", ("c", "copy"), merge_method="average", fallback="backbone", families="auto")
    assert load_mediator(out)[0].base_model.active.config.column_map == {"c": {"c": 1.0, "copy": 1.0}}


def test_an_added_expert_joins_the_family_of_the_build(paths, tmp_path):
    out, _ = build(paths, tmp_path / "out", ("a", "b", "c"), families="auto")
    model, _ = load_mediator(out)
    model.add_expert("d", str(paths["d"]))
    rows = model.base_model.active.config.column_map
    assert rows["_family 1"] == {"a": 1.0, "b": 1.0, "d": 1.0}
    assert rows["d"] == {"d": 1.0}


@pytest.mark.slow
def test_strangers_form_no_family_and_have_the_bytes_of_a_build_without(paths, tmp_path):
    plain, _ = build(paths, tmp_path / "plain", ("a", "c"))
    out, report = build(paths, tmp_path / "out", ("a", "c"), families="auto")
    assert report.notes[-1].startswith("no experts are equal or near enough")
    weights = "mediator/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (plain / weights).read_bytes()
    _, near = build(paths, tmp_path / "near", ("a", "c"), families=-1)
    assert "a, c share a delta" in near.notes[-1]


def test_a_plan_says_who_would_share_and_what_that_saves(paths):
    experts = {name: paths[name] for name in NAMES}
    without, shared, alone = (
        plan_mediator(paths["base"], some, config=MediatorConfig(merge_method="base", families=families))
        for some, families in ((experts, None), (experts, "auto"), ({"a": paths["a"]}, None))
    )
    assert without.sharing[0] == "copy equals c: its delta is stored once"
    assert without.sharing[1].startswith("a, b share a delta")
    assert without.sharing == shared.sharing
    assert without.bytes_with_families == shared.bytes_with_families == shared.bytes["adapter"]
    assert shared.bytes["adapter"] < without.bytes["adapter"] == without.bytes_by_encoding["sign"]
    assert without.bytes_by_encoding["float"] > without.bytes_by_encoding["nf4"] > without.bytes_by_encoding["sign"]
    assert (alone.sharing, alone.bytes_with_families) == ([], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": "all"}, "families must be 'auto'"),
        ({"families": 1.5}, "families must be 'auto'"),
        ({"families": "auto", "encoding": "factors_sign"}, "need positions"),
        ({"families": "auto", "budget": "1.5x"}, "leave out budget"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MediatorConfig(**settings)
