"""Tiny random models of many architectures, and checkpoints of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 96

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON),
    "mistral": MistralConfig(**_COMMON),
    "gemma": GemmaConfig(**_COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    ),
}  # fmt: skip


def tiny_model(arch: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with weights large enough to matter, biases and norms included."""
    torch.manual_seed(seed)
    # A copy: saving writes the dtype into a model's configuration.
    model = AutoModelForCausalLM.from_config(deepcopy(ARCHITECTURES[arch]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype).eval()


def fine_tuned(
    base: PreTrainedModel, seed: int, scale: float = 0.05, only: Sequence[nn.Module] | None = None
) -> PreTrainedModel:
    """A copy of ``base`` with random changes to its matrices and biases (or to ``only`` these names' parameters)."""
    model = deepcopy(base)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only is None or any(part in name for part in only):
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_((parameter.float() + noise).to(parameter.dtype))
    return model


def of_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``llama`` have the sizes that bitsandbytes' 4-bit kernels of a CPU take."""
    for name, size in dict(hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4).items():
        monkeypatch.setattr(ARCHITECTURES["llama"], name, size)


def write_tiny_checkpoints(
    folder: Path,
    names: Sequence[str] = ("base", "math", "code"),
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    only: Sequence[str] | None = None,
    scale: float = 0.05,
) -> dict[str, Path]:
    """Write a base (the first name) and experts fine-tuned from it; name → folder.

    Those of the same arguments are made once in a process and copied after that, with the same state of torch's
    generator behind them.
    """
    key = repr((list(names), arch, ARCHITECTURES[arch].to_dict(), dtype, seed, only, scale))
    if key not in _made:
        made = tempfile.TemporaryDirectory(prefix="tiny-checkpoints-")
        base = tiny_model(arch, seed)
        for number, name in enumerate(names):
            model = base if number == 0 else fine_tuned(base, seed + number, scale, only)
            model.to(dtype).save_pretrained(Path(made.name) / name)
            base = base.float()
        _made[key] = (made, torch.get_rng_state())
    made, state = _made[key]
    shutil.copytree(made.name, folder, copy_function=shutil.copy, dirs_exist_ok=True)
    torch.set_rng_state(state)
    return {name: Path(folder) / name for name in names}


_made: dict[str, tuple[tempfile.TemporaryDirectory[str], torch.Tensor]] = {}


def random_prompts(num_rows: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    """(B, T) token ids without special tokens."""
    return torch.randint(5, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(seed))
