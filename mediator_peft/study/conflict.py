"""Conflict per block with its chance level, and which blocks each ranking routes first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import sqrt

import numpy as np
import torch

from ..methods.conflict import CONFLICT_SCORES
from ..methods.conflict.statistics import task_vector_statistics
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


def conflict_table(base: State, experts: Mapping[str, State], density: float = DENSITY) -> list[dict[str, object]]:
    r"""One record a block and matrix kind, and one a block for all its matrices (``kind`` is ``all``).

    ``sign`` is the library's score: mean over pairs of opposite / both. Independent signs give 0.5: that is its chance
    level, and ``chance_sd`` is the standard deviation of the score under it,
    :math:`\frac{1}{P}\sqrt{\sum_p 1/(4 n_p)}`, with :math:`n_p` the entries that pair p shares, taken as independent.
    ``energy`` is the share of the task vectors' energy that their mean loses, 1 - 1/K for orthogonal ones; ``norm``
    the root of their summed squared norms.
    """
    sign, energies_of = CONFLICT_SCORES["sign"], CONFLICT_SCORES["energy"]
    counts: dict[tuple[int, str], np.ndarray] = {}
    energies: dict[tuple[int, str], np.ndarray] = {}
    for name in routed_matrices(base):
        vectors = task_vectors(base[name], [state[name] for state in experts.values()])
        statistics = task_vector_statistics(vectors.numpy(), density)
        pairs, energy = sign.counts(statistics), energies_of.counts(statistics)
        block = block_of(name)
        assert block is not None
        for kind in (kind_of(name), "all"):
            key = block, kind
            counts[key] = counts.get(key, np.zeros_like(pairs)) + pairs
            energies[key] = energies.get(key, np.zeros_like(energy)) + energy
    return [
        {
            "block": block,
            "kind": kind,
            "sign": sign.score(counts[block, kind]),
            "chance": 0.5,
            "chance_sd": _chance_deviation(counts[block, kind]),
            "energy": energies_of.score(energies[block, kind]),
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
        "spread": sorted(blocks, key=_bits_reversed),
    }
    for number in range(num_random):
        found[f"random {number}"] = np.random.default_rng([seed, number]).permutation(blocks).tolist()
    return found


def _bits_reversed(number: int) -> int:
    """Sorted by it, the first blocks of any number are evenly spread over the depth (van der Corput's sequence)."""
    return int(f"{number:010b}"[::-1], 2)
