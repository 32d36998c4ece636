"""Conflict scores against the formulas, one number at a time."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from mediator_peft.methods.conflict import CONFLICT_SCORES
from mediator_peft.methods.conflict.statistics import task_vector_statistics
from mediator_peft.methods.merging import MERGE_METHODS


def by_hand(name: str, task_vectors: torch.Tensor, density: float) -> float:
    """The definitions, with no tensor arithmetic."""
    vectors = [row.flatten().tolist() for row in task_vectors]
    size = len(vectors[0])
    signs = []
    for vector in vectors:
        order = sorted(range(size), key=lambda place: (-abs(vector[place]), place))[: round(density * size)]
        signs.append([0 if place not in order or not vector[place] else (1 if vector[place] > 0 else -1)
                      for place in range(size)])  # fmt: skip
    if name == "sign":
        shares = []
        for one, other in combinations(signs, 2):
            both = [a * b for a, b in zip(one, other, strict=True) if a * b]
            if any(one) or any(other):
                shares.append(sum(product < 0 for product in both) / len(both) if both else 0.5)
        return sum(shares) / len(shares) if shares else 0.0
    if name == "sign_any":
        columns = [[sign for sign in column if sign] for column in zip(*signs, strict=True)]
        shared = [column for column in columns if len(column) > 1]
        if not shared and len(vectors) > 1:
            return 0.5 if any(columns) else 0.0
        return sum(len(set(column)) > 1 for column in shared) / len(shared) if shared else 0.0
    means = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]
    lost = sum((value - mean) ** 2 for vector in vectors for value, mean in zip(vector, means, strict=True))
    total = sum(value**2 for vector in vectors for value in vector)
    return lost / total if total else 0.0


def score(name: str, task_vectors: torch.Tensor, density: float = 0.3) -> float:
    row = CONFLICT_SCORES[name]
    return row.score(row.counts(task_vector_statistics(task_vectors.numpy(), density)))


def noise(num_experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_experts, 13, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_score_is_its_formula(name, num_experts, density):
    for vectors in (noise(num_experts), noise(num_experts).round(), noise(num_experts).bfloat16().float()):
        assert score(name, vectors, density) == pytest.approx(by_hand(name, vectors, density), abs=1e-6)


@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_equal_experts_do_not_conflict(name):
    vectors = noise(1).expand(4, -1, -1)
    assert score(name, vectors) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_opposite_experts_conflict_wholly(name):
    vectors = torch.cat([noise(1), -noise(1)])
    assert score(name, vectors) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_an_expert_equal_to_the_base_and_one_alone_are_defined(name):
    assert score(name, torch.zeros(2, 5, 5)) == 0
    assert score(name, noise(1)) == pytest.approx(0, abs=1e-6)
    one_is_base = torch.cat([noise(2), torch.zeros(1, 13, 11)])
    assert 0 <= score(name, one_is_base) <= 1


@pytest.mark.parametrize("name", ["sign", "sign_any"])
def test_experts_that_changed_different_entries_count_as_chance(name):
    """An average would halve both, though no sign is opposite to another."""
    vectors = noise(2)
    vectors[0, :6], vectors[1, 6:] = 0, 0
    assert score(name, vectors) == 0.5
    assert score(name, torch.cat([noise(1), torch.zeros(1, 13, 11)])) == 0.5


@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_order_and_scale_of_experts_do_not_matter(name):
    vectors = noise(3)
    assert score(name, vectors.flip(0)) == pytest.approx(score(name, vectors), abs=1e-6)
    assert score(name, vectors * 1e-3) == pytest.approx(score(name, vectors), abs=1e-5)


def test_independent_signs_give_a_half():
    vectors = torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(3))
    assert score("sign", vectors, 0.2) == pytest.approx(0.5, abs=0.03)
    assert score("energy", vectors) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", CONFLICT_SCORES)
def test_counts_add_up_over_tensors(name):
    row = CONFLICT_SCORES[name]
    parts = [row.counts(task_vector_statistics(noise(3, seed).numpy(), 1.0)) for seed in (1, 2)]
    whole = torch.cat([noise(3, 1), noise(3, 2)], dim=1)
    np.testing.assert_allclose(parts[0] + parts[1], row.counts(task_vector_statistics(whole.numpy(), 1.0)), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in MERGE_METHODS.items() if not row.takes_context])
def test_merging_keeps_shape_and_inputs(name):
    vectors = noise(3)
    before = vectors.clone()
    merged = MERGE_METHODS[name](vectors)
    assert merged.shape == vectors.shape[1:]
    torch.testing.assert_close(vectors, before, rtol=0, atol=0)


def test_average_and_base():
    vectors = noise(4)
    torch.testing.assert_close(MERGE_METHODS["average"](vectors), sum(vectors) / 4)
    assert not MERGE_METHODS["base"](vectors).any()
