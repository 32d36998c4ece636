"""What the tests of the build share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mediator_peft import MediatorConfig, build_mediator
from mediator_peft.checkpoints.opening import Checkpoint, TensorInfo
from mediator_peft.storage import Array, as_array, float_type
from tests.tiny import fine_tuned

EXPERTS = ("math", "code", "law")


def write_larger(folder: Path, scales: Mapping[str, float], vocab_size: int) -> dict[str, Path]:
    """A base and experts, name → how far it went, of matrices large enough for headers to matter little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).float()
    base.save_pretrained(folder / "base")
    for number, (name, scale) in enumerate(scales.items()):
        fine_tuned(base, number, scale=scale).bfloat16().save_pretrained(folder / name)
    return {name: folder / name for name in ("base", *scales)}


class InMemory(Checkpoint):
    """A checkpoint of tensors at hand."""

    def __init__(self, weights: Mapping[str, torch.Tensor], label: str = "here") -> None:
        self.label = self.source = label
        self.weights = weights
        self.tensors = {
            name: TensorInfo(tuple(weight.shape), float_type(weight.dtype)) for name, weight in weights.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return as_array(self.weights[name][start:stop])

    config = None  # type: ignore[assignment]


def experts_of(paths: dict[str, Path]) -> dict[str, Path]:
    """All checkpoints but the base."""
    return {name: path for name, path in paths.items() if name != "base"}


def build(paths: dict[str, Path], output: Path, settings: dict | None = None, **options):  # type: ignore[no-untyped-def]
    """``build_mediator`` on what ``write_tiny_checkpoints`` wrote."""
    return build_mediator(paths["base"], experts_of(paths), output, MediatorConfig(**(settings or {})), **options)


def digests(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of every file that must not depend on how the work was done."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        # The report says how long it took and how much memory.
        if path.is_file() and path.name != "report.json"
    }
