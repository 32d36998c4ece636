"""A model whose weights are the base plus a weighted sum of task vectors, with gradients of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.tensor_inventory import auto_class
from ...config import MediatorSettings
from ...merge.model_method import block_of
from ...merge.offline import named_paths, open_job, with_experts
from ...storage import FloatType

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel


def _rounded(checkpoint: Checkpoint, name: str, kind: FloatType) -> Tensor:
    """A weight rounded as a build rounds it: float32."""
    return checkpoint.tensor(name).to(kind.torch).float()


class MergedModel:
    """Base, task vectors and merged weights in memory, all float32: K + 2 times the size of the model.

    Args:
        base: folder or hub id.
        experts: name → folder or hub id.

    Raises:
        CheckpointError: a checkpoint is missing or damaged, or does not belong to the others.
    """

    def __init__(self, base: str | os.PathLike[str], experts: Mapping[str, str | os.PathLike[str]]) -> None:
        job = open_job(str(base), with_experts(MediatorSettings(), named_paths(experts)))
        self.experts = tuple(sorted(job.experts))
        self.model: PreTrainedModel = auto_class(job.base.config).from_config(job.base.config, dtype=torch.float32)
        state = {name: _rounded(job.base, name, job.dtype) for name in job.base.tensors}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        self.model.eval()
        self._weights = {name: value for name, value in self.model.named_parameters() if name in state}
        self.base = {name: value.detach().clone() for name, value in self._weights.items()}
        self.task_vectors = {
            name: torch.stack([_rounded(job.experts[expert], name, job.dtype) for expert in self.experts]) - value
            for name, value in self.base.items()
        }
        self.linear = [
            name
            for name in (f"{layer.name}.weight" for layer in job.structure.layers)
            if name in self.base and self.base[name].ndim == 2
        ]
        """Weights of the linear layers of the blocks."""
        self.blocks = {name: block_of(name, job.structure) for name in self.base}
        """Tensor → number of its block, or None."""
        self.num_blocks = job.structure.num_blocks
        transposed = {f"{layer.name}.weight" for layer in job.structure.layers if layer.is_transposed}
        self._transposed = transposed

    @property
    def names(self) -> list[str]:
        """All tensors that are merged."""
        return list(self.base)

    def set(self, coefficients: Mapping[str, Tensor] | Tensor) -> None:
        """Give the model its merged weights.

        Args:
            coefficients: (K,) for all tensors; or tensor → (K,) or (K, chunks of output rows). Tensors that are not
                named are the base's.
        """
        with torch.no_grad():
            for name, parameter in self._weights.items():
                chosen = coefficients if isinstance(coefficients, Tensor) else coefficients.get(name)
                parameter.copy_(self.base[name])
                if chosen is not None:
                    for weight, vector in zip(self._spread(name, chosen), self.task_vectors[name], strict=True):
                        parameter.add_(weight * vector)

    def set_expert(self, expert: str) -> None:
        """Give the model the weights of one expert."""
        self.set(torch.tensor([float(name == expert) for name in self.experts]))

    def watch(self, names: list[str]) -> None:
        """Have gradients of these weights alone."""
        chosen = set(names)
        for name, parameter in self._weights.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(tensor, gradient) of the watched weights after a backward pass; they are forgotten."""
        for name, parameter in self._weights.items():
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                yield name, gradient

    def gradient_of_coefficients(self, name: str, gradient: Tensor, num_chunks: int) -> Tensor:
        """Gradient of a tensor's coefficients, (K, num_chunks): inner products of gradient and task vectors."""
        products = self.task_vectors[name] * gradient
        if name in self._transposed:
            products = products.transpose(1, 2)
        by_row = products.flatten(2).sum(dim=2) if products.ndim > 2 else products
        height = math.ceil(by_row.shape[1] / num_chunks)
        parts = [part.sum(dim=1) for part in by_row.split(height, dim=1)]
        parts += [torch.zeros_like(parts[0])] * (num_chunks - len(parts))
        return torch.stack(parts, dim=1)

    def _spread(self, name: str, numbers: Tensor) -> list[Any]:
        """Coefficients of the experts, each a number or as wide as the rows that it is for."""
        if numbers.ndim == 1:
            return numbers.tolist()
        rows = self.base[name].shape[-1 if name in self._transposed else 0]
        spread = numbers.repeat_interleave(math.ceil(rows / numbers.shape[1]), dim=1)[:, :rows]
        if name in self._transposed:
            return list(spread)
        return [row.reshape(-1, *[1] * (self.base[name].ndim - 1)) for row in spread]
