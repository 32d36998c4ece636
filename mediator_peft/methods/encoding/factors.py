"""A delta of low rank as the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...deferred import torch
from .base import Encoding, Parts, Precision

if TYPE_CHECKING:
    from torch import Tensor


class FactorsEncoding(Encoding):
    """Factors ``left`` (O, r) and ``right`` (r, I), stored row by row; their product gives every entry."""

    part_names = ("left", "right")
    has_positions = False
    product_tokens = 128

    def encode(self, delta: Tensor, kept: Tensor, precision: Precision) -> Parts:
        """Factors of the kept entries, with all singular values that float32 tells from 0; r is 1 or more.

        Low-rank sparsifiers give factors at once (``SparseDelta.from_factors``); this is the way from any matrix.
        """
        left, sizes, right = torch.linalg.svd(torch.where(kept, delta, 0), full_matrices=False)
        limit = float(sizes[0]) * max(delta.shape) * torch.finfo(torch.float32).eps
        rank = max(1, int((sizes > limit).sum()))
        root = sizes[:rank].sqrt()
        dtype = precision.dtype or torch.float32
        return store_factors((left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype))

    def decode(self, parts: Parts, kept: Tensor) -> Tensor:
        """The product's entries."""
        return self.matrix(parts, (kept.shape[0], kept.shape[1]))[kept]

    def matrix(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        left, right = factor_matrices(parts, shape)
        return left @ right

    def value_bytes(self, num_kept: float, num_rows: int, number_size: int) -> float:
        # Entries of a matrix of full rank; builds predict low-rank deltas from their rank.
        return num_kept * number_size

    def fault(self, parts: Parts, shape: tuple[int, int], num_kept: int) -> str | None:
        left, right = len(parts["left"]), len(parts["right"])
        rank = left // shape[0]
        if rank and (left, right) == (rank * shape[0], rank * shape[1]):
            return None
        return f"factors of {left} and {right} numbers for a matrix {shape[0]} x {shape[1]}"

    def product(self, parts: Parts, shape: tuple[int, int], x: Tensor) -> Tensor:
        left, right = factor_matrices(parts, shape)
        return torch.nn.functional.linear(torch.nn.functional.linear(x, right), left)

    def row_reader(self, parts: Parts, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        left, right = factor_matrices(parts, shape)
        return lambda rows: left[rows] @ right


def store_factors(left: Tensor, right: Tensor) -> Parts:
    """Factors (O, r) and (r, I) as parts."""
    return {"left": left.flatten(), "right": right.flatten()}


def factor_matrices(parts: Parts, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`store_factors`, in float32: (O, r) and (r, I)."""
    return parts["left"].float().reshape(shape[0], -1), parts["right"].float().reshape(-1, shape[1])
