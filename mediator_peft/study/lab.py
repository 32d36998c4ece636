"""Weights of base and experts in memory, and one plain model that takes any of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.merging import MERGE_METHODS, MergeMethod, TensorContext
from ..methods.merging.row import EMBEDDING, HEAD, LINEAR, OTHER

_BLOCK = re.compile(r"\.layers\.(\d+)\.(.+)\.weight$")

State = dict[str, Tensor]
"""Tensor name → tensor, in bfloat16 as it is stored."""


def read_state(folder: Path) -> State:
    """All tensors of a checkpoint of one file, tied ones once."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """τk = θk - θ0 in float32: (K, *shape)."""
    return torch.stack([expert.float() - base.float() for expert in experts])


def task_vector_norm(base: State, expert: State) -> float:
    """Euclidean norm of a whole model's task vector."""
    return sum(float((expert[name].float() - tensor.float()).square().sum()) for name, tensor in base.items()) ** 0.5


def merge_states(base: State, experts: Mapping[str, State], method: MergeMethod, **parameters: Any) -> State:
    """base + merge(task vectors), tensor by tensor, rounded once to the storage dtype.

    Args:
        base: θ0
        experts: name → θk
        method: a row of the library that needs neither data nor a pass over the whole model.
        **parameters: of the method, where they are not its defaults.
    """
    merged = {}
    for vectors, context in tensors_with_contexts(base, experts):
        assert context.base is not None
        merged[context.name] = (context.base + method(vectors, context, **parameters)).to(base[context.name].dtype)
    return merged


def tensors_with_contexts(base: State, experts: Mapping[str, State]) -> Iterator[tuple[Tensor, TensorContext]]:
    """Task vectors (K, *shape) float32 of every tensor, the experts in the order of their names, with its context."""
    for context in contexts_of(base, experts):
        weight = base[context.name]
        vectors = task_vectors(weight, [experts[expert][context.name] for expert in context.experts])
        yield vectors, replace(context, base=weight.float())


def contexts_of(base: State, experts: Iterable[str]) -> Iterator[TensorContext]:
    """What is known of every tensor beside its values."""
    names = tuple(sorted(experts))
    num_blocks = 1 + max((block for name in base if (block := block_of(name)) is not None), default=0)
    for name, tensor in base.items():
        block = block_of(name)
        kind = _kind(name, block, tensor)
        yield TensorContext(name, names, tuple(tensor.shape), kind=kind, block=block, num_blocks=num_blocks)


def block_of(name: str) -> int | None:
    """The block a tensor belongs to; None for embeddings and the like."""
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else None


def _kind(name: str, block: int | None, tensor: Tensor) -> str:
    if block is not None and tensor.ndim == 2:
        return LINEAR
    return EMBEDDING if "embed" in name else HEAD if "lm_head" in name else OTHER


def single_model_rows() -> dict[str, MergeMethod]:
    """Every row of the library that merges a tensor by itself, without data, with its own defaults."""
    return {
        name: row
        for name, row in MERGE_METHODS.items()
        if name != "base" and not (row.needs_data or row.survey or row.prepass)
    }


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
