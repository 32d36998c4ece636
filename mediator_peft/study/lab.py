"""Weights of base and experts in memory, and one plain model that takes any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.merging import MERGE_METHODS

State = dict[str, Tensor]
"""Tensor name → tensor, in bfloat16 as it is stored."""


def read_state(folder: Path) -> State:
    """All tensors of a checkpoint of one file, tied ones once."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """τk = θk - θ0 in float32: (K, *shape)."""
    return torch.stack([expert.float() - base.float() for expert in experts])


def merge_states(base: State, experts: Sequence[State], merge: Callable[[Tensor], Tensor]) -> State:
    """base + merge(task vectors), tensor by tensor, rounded once to the storage dtype.

    Args:
        base: θ0
        experts: θk
        merge: task vectors (K, *shape), float32 → merged task vector (*shape).
    """
    merged = {}
    for name, tensor in base.items():
        vectors = task_vectors(tensor, [expert[name] for expert in experts])
        merged[name] = (tensor.float() + merge(vectors)).to(tensor.dtype)
    return merged


def scaled_sum(coefficient: float) -> Callable[[Tensor], Tensor]:
    """Task arithmetic, λ Σ τk (arXiv 2212.04089, equation in §3), with a chosen λ."""
    return lambda vectors: vectors.sum(dim=0) * coefficient


def single_model_merges() -> dict[str, Callable[[Tensor], Tensor]]:
    """Every merge method of the library that gives one model from task vectors alone, with its own defaults."""
    return {name: method for name, method in MERGE_METHODS.items() if name != "base"}


class Lab:
    """One model whose weights are changed from system to system."""

    def __init__(self, base: Path, experts: Mapping[str, Path]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.base = read_state(base)
        self.experts = {name: read_state(path) for name, path in experts.items()}

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[Any]:
        """The model with these weights; tensors that are not named keep those they have.

        Raises:
            RuntimeError: a name or shape does not fit.
        """
        found = self.model.load_state_dict(dict(state), strict=False)
        if found.unexpected_keys:
            raise RuntimeError(f"the model has no {found.unexpected_keys[:3]}")
        yield self.model
