"""Inner products of task vectors over a whole tensor, in the first pass of methods that work on angles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...deferred import torch
from .row import TensorContext

if TYPE_CHECKING:
    from torch import Tensor


Floats = NDArray[np.float64]


def gram_matrix(tiles: Iterable[tuple[Tensor, TensorContext]]) -> Floats:
    """Inner products of the task vectors of a tensor in float64: (K, K).

    Each row of the tensor is summed up by itself, and then the rows: the height of tiles changes nothing.
    """
    parts = []
    for task_vectors, _ in tiles:
        vectors = task_vectors.numpy().astype(np.float64)
        numbers = range(len(vectors))
        parts.append([[(vectors[i] * vectors[j]).sum(axis=1) for j in numbers[i:]] for i in numbers])
    found = np.empty((len(parts[0]),) * 2)
    for i in range(len(found)):
        for j in range(i, len(found)):
            found[i, j] = found[j, i] = np.concatenate([part[i][j - i] for part in parts]).sum()
    return found


def combined(task_vectors: Tensor, coefficients: Floats) -> Tensor:
    """Sum of the task vectors, each times its number, in the order of the experts: (*shape)."""
    merged = torch.zeros_like(task_vectors[0])
    for vector, number in zip(task_vectors, coefficients.tolist(), strict=True):
        merged += number * vector
    return merged
