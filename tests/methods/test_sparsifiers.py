"""What a sparsifier keeps."""

from __future__ import annotations

import pytest
import torch

from mediator_peft.methods.sparsifying import SPARSIFIERS
from mediator_peft.methods.sparsifying.svd import low_rank, rank_of_density


def noise(shape=(64, 96), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_density_one_keeps_everything(name):
    delta = noise()
    torch.testing.assert_close(SPARSIFIERS[name](delta, 1.0, drawn()), delta, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_inputs_are_left_alone_and_the_seed_decides(name):
    delta = noise()
    before = delta.clone()
    first, second = (SPARSIFIERS[name](delta, 0.1, drawn(3)) for _ in range(2))
    assert torch.equal(delta, before)
    assert torch.equal(first, second)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_random_dropping_keeps_the_mean(density):
    delta = noise((300, 400))
    sparse = SPARSIFIERS["dare"](delta, density, drawn())
    kept = sparse != 0
    torch.testing.assert_close(sparse[kept], delta[kept] / density)
    assert float(kept.float().mean()) == pytest.approx(density, rel=0.05)
    mean = sum(SPARSIFIERS["dare"](delta[:20, :20], 0.3, drawn(seed)) for seed in range(600)) / 600
    torch.testing.assert_close(mean, delta[:20, :20], rtol=0.5, atol=0.6)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (40, 5)])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_is_as_near_as_a_matrix_of_that_rank_can_be(shape, rank):
    # Noise is the hardest case: its singular values fall slowly.
    matrix = noise(shape)
    left, right = low_rank(matrix, rank, drawn())
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    best = float(torch.linalg.svdvals(matrix)[rank:].norm())
    assert float((matrix - left @ right).norm()) <= 1.01 * best


def test_a_matrix_of_low_rank_comes_back():
    matrix = noise((80, 3)) @ noise((3, 120), seed=1)
    left, right = low_rank(matrix, 3, drawn())
    torch.testing.assert_close(left @ right, matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.norm(), right.norm(), rtol=1e-4, atol=0)


def test_the_rank_takes_the_bytes_of_signs():
    # Signs at density 0.2 take 0.7219 + 0.2 bits an entry.
    rank = rank_of_density((576, 1536), 0.2)
    assert rank * 16 * (576 + 1536) == pytest.approx(0.9219 * 576 * 1536, rel=0.02)
    ranks = [rank_of_density((576, 1536), density) for density in (0.001, 0.05, 0.2, 0.5, 0.7, 0.99)]
    assert ranks == sorted(ranks)
    assert ranks[0] >= 1
    assert rank_of_density((7, 3), 1.0) == 3
