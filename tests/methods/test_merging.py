"""Merge methods against their papers, one number at a time."""

from __future__ import annotations

import sys

import pytest
import torch

from mediator_peft.methods.merging import MERGE_METHODS
from mediator_peft.methods.sparsifying.magnitude import keep_largest, largest_mask


def vectors_of(num_experts=4, shape=(9, 13), seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_experts, *shape, generator=generator)
    return torch.where(torch.rand(vectors.shape, generator=generator) < 0.4, 0.0, vectors)


def ties_by_hand(vectors, density=0.2):
    """Algorithm 1 of TIES-Merging with lists and loops."""
    trimmed = []
    for vector in vectors.flatten(1).tolist():
        ranked = sorted(range(len(vector)), key=lambda place: (-abs(vector[place]), place))
        kept = set(ranked[: round(density * len(vector))])
        trimmed.append([value if place in kept else 0.0 for place, value in enumerate(vector)])
    merged = []
    for votes in zip(*trimmed, strict=True):
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [vote for vote in votes if vote * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).reshape(vectors.shape[1:])


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_ties_is_algorithm_1(num_experts):
    vectors = vectors_of(num_experts)
    torch.testing.assert_close(MERGE_METHODS["ties"](vectors), ties_by_hand(vectors), rtol=1e-6, atol=1e-7)


def test_ties_is_what_peft_computes():
    from peft.utils.merge_utils import ties

    # An odd number of equal weights: no vote is even.
    vectors = torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(1))
    expected = ties(list(vectors), weights=torch.ones(3), density=0.2)
    torch.testing.assert_close(MERGE_METHODS["ties"](vectors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_ties_trims_each_task_vector_once(num_experts, monkeypatch):
    trimmed = []

    def counted(vector, density):
        trimmed.append(vector.clone())
        return largest_mask(vector, density)

    vectors = vectors_of(num_experts, shape=(31, 40))
    # Many equal magnitudes: what is kept hangs on their places.
    vectors = (vectors * 4).round() / 4
    expected = ties_with_two_trims(vectors)
    monkeypatch.setattr(sys.modules[MERGE_METHODS["ties"].merge.__module__], "largest_mask", counted)
    torch.testing.assert_close(MERGE_METHODS["ties"](vectors), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(trimmed), vectors, rtol=0, atol=0)


def ties_with_two_trims(vectors):
    """The sums of ``ties`` over vectors that are trimmed anew for each."""
    is_positive = sum(keep_largest(vector, 0.2) for vector in vectors) >= 0
    again = [keep_largest(vector, 0.2) for vector in vectors]
    agreeing = [torch.where((vector > 0) == is_positive, vector, 0) for vector in again]
    count = sum((part != 0).float() for part in agreeing)
    return sum(agreeing) / count.clamp(min=1)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_task_arithmetic_is_a_scaled_sum(num_experts):
    vectors = vectors_of(num_experts)
    expected = [0.4 * sum(values) for values in zip(*vectors.flatten(1).double().tolist(), strict=True)]
    found = MERGE_METHODS["task_arithmetic"](vectors).flatten()
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-5, atol=1e-7)


# What needs a context is tried out with it in test_merging_rows.py.
ALONE = sorted(name for name, method in MERGE_METHODS.items() if not method.takes_context)


@pytest.mark.parametrize("name", ALONE)
def test_inputs_are_left_alone_and_shapes_kept(name):
    vectors = vectors_of()
    before = vectors.clone()
    merged = MERGE_METHODS[name](vectors)
    assert merged.shape == vectors.shape[1:]
    assert merged.dtype == vectors.dtype
    torch.testing.assert_close(vectors, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(name for name in ALONE if MERGE_METHODS[name].is_entrywise))
def test_an_entrywise_method_does_not_see_beyond_an_entry(name):
    vectors = vectors_of(num_experts=7, shape=(6, 37))
    whole = MERGE_METHODS[name](vectors)
    for start in range(0, 6, 2):
        rows = MERGE_METHODS[name](vectors[:, start : start + 2].contiguous())
        torch.testing.assert_close(rows, whole[start : start + 2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["average", "ties"])
def test_equal_experts_agree(name):
    vector = vectors_of(1)[0]
    merged = MERGE_METHODS[name](torch.stack([vector] * 3))
    expected = vector if name != "ties" else ties_by_hand(vector[None])
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)
