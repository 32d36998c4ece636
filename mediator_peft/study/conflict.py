"""Conflict per block with its chance level, and which blocks each ranking routes first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from ..methods.conflict.sign import sign_score
from .lab import State, block_of, task_vectors

_KIND = re.compile(r"\.layers\.\d+\.(.+)\.weight$")
DENSITY = 0.2
"""Share of a task vector's largest entries that vote, the library's default."""


def kind_of(name: str) -> str:
    """The matrix's own name, e.g. ``self_attn.q_proj``."""
    found = _KIND.search(name)
    return found.group(1) if found else name


def routed_matrices(base: State) -> list[str]:
    """Names of the linear layers in blocks: what gets deltas by default."""
    return [name for name, tensor in base.items() if block_of(name) is not None and tensor.ndim == 2]


def kept_largest(vectors: Tensor, density: float) -> Tensor:
    """(K, O, I) bool: the largest entries of each task vector; ties at the threshold are all kept, zeros never."""
    flat = vectors.abs().flatten(1)
    count = max(1, round(density * flat.shape[1]))
    threshold = flat.kthvalue(flat.shape[1] - count + 1, dim=1).values
    return (vectors.abs() >= threshold.view(-1, *[1] * (vectors.ndim - 1))) & (vectors != 0)


def matrix_conflict(vectors: Tensor, density: float = DENSITY) -> np.ndarray:
    """Per pair of experts: entries that both keep, those with opposite signs, and those either keeps: (P, 3).

    Args:
        vectors: (K, O, I) task vectors of one matrix.
        density: share of entries that vote.
    """
    kept, negative = kept_largest(vectors, density), vectors < 0
    rows = []
    for i, j in combinations(range(len(vectors)), 2):
        both = kept[i] & kept[j]
        either = kept[i] | kept[j]
        rows.append([int(both.sum()), int((both & (negative[i] ^ negative[j])).sum()), int(either.sum())])
    return np.array(rows, np.float64).reshape(-1, 3)


def conflict_table(base: State, experts: Mapping[str, State], density: float = DENSITY) -> list[dict[str, object]]:
    r"""One record a block and matrix kind, and one a block for all its matrices (``kind`` is ``all``).

    ``sign`` is the library's score: mean over pairs of opposite / both. Independent signs give 0.5: that is its chance
    level, and ``chance_sd`` is the standard deviation of the score under it,
    :math:`\frac{1}{P}\sqrt{\sum_p 1/(4 n_p)}`, with :math:`n_p` the entries that pair p shares, taken as independent.
    ``energy`` is the share of the task vectors' energy that their mean loses, 1 - 1/K for orthogonal ones; ``norm``
    the root of their summed squared norms.
    """
    counts: dict[tuple[int, str], np.ndarray] = {}
    energies: dict[tuple[int, str], np.ndarray] = {}
    for name in routed_matrices(base):
        vectors = task_vectors(base[name], [state[name] for state in experts.values()])
        pairs = matrix_conflict(vectors, density)
        total = float(vectors.square().sum())
        energy = np.array([total - float(vectors.sum(dim=0).square().sum()) / len(vectors), total])
        block = block_of(name)
        assert block is not None
        for kind in (kind_of(name), "all"):
            key = block, kind
            counts[key] = counts.get(key, np.zeros_like(pairs)) + pairs
            energies[key] = energies.get(key, np.zeros(2)) + energy
    return [
        {
            "block": block,
            "kind": kind,
            "sign": sign_score(counts[block, kind]),
            "chance": 0.5,
            "chance_sd": _chance_deviation(counts[block, kind]),
            "energy": float(energies[block, kind][0] / energies[block, kind][1]),
            "energy_of_orthogonal": 1 - 1 / len(experts),
            "norm": sqrt(float(energies[block, kind][1])),
        }
        for block, kind in sorted(counts)
    ]


def _chance_deviation(counts: np.ndarray) -> float:
    shared = counts[counts[:, 0] > 0, 0]
    return float(np.sqrt((0.25 / shared).sum()) / len(shared)) if len(shared) else 0.0


def pairwise_cosines(base: State, experts: Mapping[str, State]) -> dict[str, float]:
    """``first | second`` → cosine of their task vectors over all routed matrices."""
    names = list(experts)
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for name in routed_matrices(base):
        vectors = task_vectors(base[name], [state[name] for state in experts.values()]).flatten(1)
        products += (vectors @ vectors.T).double()
    norms = products.diagonal().sqrt()
    cosines = products / norms.unsqueeze(0) / norms.unsqueeze(1)
    return {f"{names[i]} | {names[j]}": float(cosines[i, j]) for i, j in combinations(range(len(names)), 2)}


def rankings(table: Sequence[Mapping[str, object]], num_random: int = 2, seed: int = 0) -> dict[str, list[int]]:
    """Ranking → block numbers, those to be routed first in front; of equal blocks the earlier one goes first."""
    rows = {int(str(row["block"])): row for row in table if row["kind"] == "all"}
    blocks = sorted(rows)

    def by(score: str) -> list[int]:
        return sorted(blocks, key=lambda block: (-float(str(rows[block][score])), block))

    found = {
        "sign": by("sign"),
        "energy": by("energy"),
        "norm": by("norm"),
        "first": blocks,
        "last": blocks[::-1],
        "sign reversed": by("sign")[::-1],
    }
    for number in range(num_random):
        found[f"random {number}"] = np.random.default_rng([seed, number]).permutation(blocks).tolist()
    return found
