"""A delta of low rank: the largest singular values in place of the largest entries."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

from ...deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


# Directions beyond the rank that are followed on the way, and rounds of following them.
_MORE, _ROUNDS = 8, 4
_BITS_A_NUMBER = 16


def keep_singular(delta: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """The nearest matrix of the rank that takes as many bytes as signs at this density.

    Args:
        delta: (O, I)
        density: share of entries whose signs would take as much room, in (0, 1]; see :func:`rank_of_density`.
        generator: for where the search begins; None draws from torch's own.

    Returns:
        (O, I), a new tensor. At density 1 it is the delta itself.
    """
    if density >= 1:
        return delta.clone()
    left, right = low_rank(delta, rank_of_density((delta.shape[0], delta.shape[1]), density), generator)
    return (left @ right).to(delta.dtype)


def rank_of_density(shape: tuple[int, int], density: float) -> int:
    """Rank whose two factors in 16 bits take the bytes of signs and their positions: 1 at the least, all at density 1.

    Positions are counted by their entropy, H(density) bits an entry, and signs by a bit each.
    """
    full = min(shape)
    if density >= 1:
        return full
    share = min(density, 0.5)
    bits = density - share * log2(share) - (1 - share) * log2(1 - share)
    return max(1, min(full, round(bits * shape[0] * shape[1] / (_BITS_A_NUMBER * sum(shape)))))


def low_rank(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    r"""Factors of the nearest matrix of a rank, each with half of the singular values: :math:`U\sqrt S, \sqrt S V^T`.

    Subspace iteration from a random start, algorithms 4.4 and 5.1 of Halko, Martinsson and Tropp
    (https://arxiv.org/abs/0909.4061); an exact decomposition where that would not save much.

    Args:
        matrix: (O, I)
        rank: how many singular values are kept, as far as float32 tells them from 0; one at the least.
        generator: on the CPU.

    Returns:
        (O, r) and (r, I), float32.
    """
    matrix = matrix.float()
    followed = rank + _MORE
    if 2 * followed >= min(matrix.shape):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.randn(matrix.shape[1], followed, generator=generator).to(matrix.device)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        inner, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ inner
    limit = float(sizes[0]) * max(matrix.shape) * torch.finfo(torch.float32).eps
    rank = max(1, min(rank, int((sizes > limit).sum())))
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
