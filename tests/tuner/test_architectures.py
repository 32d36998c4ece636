"""Every causal architecture of transformers that can be made tiny: built exactly, loaded, and compared with itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.errors import UnsupportedError
from tests.architectures import (
    CAUSAL,
    DOCUMENT,
    PROMPT,
    document,
    round_trip,
    table_rows,
    tiny_architecture,
    tiny_config,
)

# One of each kind: fused projections, other names on disk, hybrids, state spaces, mixtures of experts, buffers
# that checkpoints keep, towers.
REPRESENTATIVE = (
    "phi3",
    "gpt_neox",
    "falcon",
    "qwen3_5_text",
    "mamba",
    "jamba",
    "gemma4_text",
    "apertus",
    "gpt_oss",
    "deepseek_v3",
    "git",
)
SLOW = ("qwen3_5_text", "jamba", "apertus", "gemma4_text", "git", "falcon")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in REPRESENTATIVE]
)
def test_a_named_expert_is_the_expert(kind, tmp_path):
    outcome = round_trip(kind, tmp_path)
    assert outcome.status == "works", outcome


@pytest.mark.slow
@pytest.mark.skipif("ALL_ARCHITECTURES" not in os.environ, reason="ten minutes; set ALL_ARCHITECTURES=1")
@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind not in REPRESENTATIVE])
def test_every_architecture_works_or_is_refused(kind, tmp_path):
    outcome = round_trip(kind, tmp_path)
    if outcome.status == "not tried":
        pytest.skip(outcome.detail)
    assert outcome.status in ("works", "refused"), outcome


def test_the_table_names_every_architecture():
    """Written by ``python -m tests.architectures``; a new version of transformers brings new rows."""
    assert sorted(table_rows(Path(DOCUMENT).read_text(encoding="utf-8"))) == CAUSAL


def test_the_document_is_what_the_program_writes_around_these_rows():
    text = Path(DOCUMENT).read_text(encoding="utf-8")
    rows = table_rows(text)
    assert text == document(list(rows.values()))
    assert [row.split(" | ")[1] for row in rows.values()] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in rows]


def test_prompts_with_different_mixes_are_refused_where_weights_are_read_past_the_layer(tmp_path):
    assert round_trip("mamba", tmp_path).status == "works"
    model, _ = load_mediator(tmp_path / "out")
    with torch.no_grad():
        model(PROMPT, expert_weights=["math", "math"])
        with pytest.raises(UnsupportedError, match="same expert weights"):
            model(PROMPT, expert_weights=["math", "code"])


def llama(kind):
    config = tiny_config("llama")
    config.num_labels = 3
    return getattr(transformers, kind)(config)


REFUSED = {
    "an encoder-decoder": (lambda: transformers.T5ForConditionalGeneration(tiny_config("t5")), "encoder-decoder"),
    "another encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(tiny_config("bart")),
        "encoder-decoder",
    ),
    "a classifier": (lambda: llama("LlamaForSequenceClassification"), "LlamaForSequenceClassification"),
    "an embedding model": (lambda: llama("LlamaModel"), "LlamaModel"),
    "an encoder": (lambda: transformers.BertModel(tiny_config("bert")), "BertModel"),
    "integers": (lambda: tiny_architecture("deepseek_v4"), "integers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_with_its_reason(kind, tmp_path):
    make, reason = REFUSED[kind]
    for name in ("base", "math"):
        make().save_pretrained(tmp_path / name)
    with pytest.raises(UnsupportedError, match=reason):
        build_mediator(tmp_path / "base", {"math": tmp_path / "math"}, tmp_path / "out", MediatorConfig())


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaModel"])
def test_what_is_not_supported_is_refused_in_memory_too(kind, tmp_path):
    llama("LlamaForCausalLM").save_pretrained(tmp_path / "math")
    with pytest.raises(UnsupportedError, match=kind):
        get_mediator_model(llama(kind), MediatorConfig(experts={"math": str(tmp_path / "math")}))
