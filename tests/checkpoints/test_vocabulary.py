"""Experts with added, missing or moved tokens are aligned to the base's vocabulary by token string."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mediator_peft import MediatorConfig, build_mediator, plan_mediator
from mediator_peft.errors import CheckpointMismatchError
from tests.tiny import VOCAB_SIZE, write_tiny_checkpoints

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_vocabulary(folder, tokens):
    content = {"model": {"vocab": {token: number for number, token in enumerate(tokens) if token}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def give(folder, order, tokens):
    """Rearrange an expert's rows: row i becomes what was row ``order[i]``, or something new for None."""
    tensors = load_file(folder / "model.safetensors")
    for name in {EMBEDDING, HEAD} & tensors.keys():
        rows = tensors[name]
        new = torch.full_like(rows[0], 0.5)
        tensors[name] = torch.stack([new if number is None else rows[number] for number in order])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(order)}))
    write_vocabulary(folder, tokens)


@pytest.fixture(params=["llama", "llama_tied"])
def paths(request, tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", arch=request.param)
    # The last six rows of the base stand for no token.
    tokens = [f"t{number}" for number in range(VOCAB_SIZE - 6)]
    for folder in paths.values():
        write_vocabulary(folder, tokens)
    return paths


def merged_with_one_expert(paths, tmp_path):
    config = MediatorConfig(routed_layers="all")
    report = build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", config)
    return load_file(tmp_path / "out" / "model.safetensors"), report


@pytest.mark.parametrize("kind", ["added at the end", "moved", "fewer"])
def test_rows_follow_their_tokens(kind, paths, tmp_path):
    before = {name: load_file(paths[name] / "model.safetensors") for name in ("base", "math")}
    names = [f"t{number}" for number in range(VOCAB_SIZE - 6)]
    order: list[int | None] = list(range(VOCAB_SIZE))
    expected = list(range(VOCAB_SIZE))
    if kind == "added at the end":
        order, tokens = [*order, None, None], [*names, *[None] * 6, "<a>", "<b>"]
    elif kind == "moved":
        order, tokens = [None, *reversed(order)], ["<a>", *[None] * 6, *reversed(names)]
    else:
        order, tokens = order[2:90], names[2:]
    give(paths["math"], order, tokens)
    merged, report = merged_with_one_expert(paths, tmp_path)
    for name in {EMBEDDING, HEAD} & merged.keys():
        for row in range(VOCAB_SIZE):
            named = row < VOCAB_SIZE - 6
            if kind == "fewer" and row < 2:
                source = before["base"]  # tokens that the expert has not
            elif named or kind == "added at the end":
                source = before["math"]
            else:
                continue  # padding may come from anywhere
            torch.testing.assert_close(merged[name][row], source[name][expected[row]], rtol=1e-6, atol=1e-7)
    note = next(note for note in report.notes if "aligned" in note)
    # Turned around, t48 stands where it stood.
    assert {"added at the end": "'<a>', '<b>'", "moved": "89 tokens moved", "fewer": "88 tokens moved"}[kind] in note
    plan = plan_mediator(paths["base"], {"math": paths["math"]})
    assert plan.is_ok
    assert any("aligned" in warning for warning in plan.warnings)


def test_without_tokenizers_it_is_refused(paths, tmp_path):
    give(paths["math"], [*range(VOCAB_SIZE), None], ["x"])
    (paths["math"] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointMismatchError, match="other shapes"):
        merged_with_one_expert(paths, tmp_path)
