"""Eleven tiny architectures with experts, as in PEFT's own tests: a base, a configuration, a fitted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import fine_tuned
from tokenizer import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mediator_peft import MediatorConfig, get_mediator_model

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_BLOCKS = dict(
    vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(
        vocab_size=96, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "gemma3": Gemma3TextConfig(**_SIZES),
    "gpt2": GPT2Config(**_BLOCKS),
    "gptj": GPTJConfig(**_BLOCKS, rotary_dim=4),
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES),
    "olmo2": Olmo2Config(**_SIZES),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, dropout=0.0,
    ),
    "phi": PhiConfig(**{**_SIZES, "num_key_value_heads": 4}, resid_pdrop=0.0),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
}  # fmt: skip


def write_models(folder: Path, architecture: str) -> Path:
    """A base and two experts of it; returns the base's folder, named by the architecture."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    base.save_pretrained(folder / architecture)
    for number, name in enumerate(("math", "code"), start=1):
        fine_tuned(base, number).save_pretrained(folder / f"{architecture}-{name}")
    return folder / architecture


def settings_for(base: Path | str, **settings: Any) -> dict[str, Any]:
    """Settings of a configuration that leaves the base's weights as they are, as other PEFT methods do."""
    experts = {name: f"{base}-{name}" for name in ("math", "code")}
    return {
        "experts": experts, "merge_method": "base", "routed_layers": "all", "density": 0.5, "task_type": "CAUSAL_LM",
        **settings,
    }  # fmt: skip


def fit(model: Any) -> Any:
    """The model, its router fitted such that the tests' prompts of ones and twos are an expert's own."""
    ones = ["<s> <s> <s>", "<s> </s> <s>", "<s> <s>"] * 7
    texts = {"math": ones, "code": [f"w{n} w{n + 1} w{n + 2}" for n in range(60, 81)]}
    model.fit_router(texts, tiny_tokenizer(), background=[], augmented=False, hard_negatives=False)
    return model


def fitted_model(base: Path | str, **settings: Any) -> Any:
    """A base wrapped and its router fitted."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return fit(get_mediator_model(model, MediatorConfig(**settings_for(base, **settings))))
