"""Baselines against the worked numbers of their papers, and against their formulas in plain torch."""

from itertools import pairwise

import pytest
import torch

from mediator_peft.methods.baselines import BASELINES
from mediator_peft.methods.baselines.delta_come import bands, rounded
from mediator_peft.methods.baselines.dynamic import sharpened, sharpness
from mediator_peft.methods.baselines.emr import rescalers, unify
from mediator_peft.methods.encoding import ENCODINGS
from mediator_peft.methods.encoding.base import Precision
from mediator_peft.methods.merging import TensorContext
from mediator_peft.methods.merging.row import LINEAR, OTHER

T = torch.tensor([[3, -1, 0.5, -4, 0, 2], [2, 2, -0.5, 4, 1, -1], [-1, 3, 1, -2, 0.5, 1]])
ROW = TensorContext("w", stored_shape=(1, 6), kind=LINEAR)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-6, rtol=1e-6)


def random_vectors(*shape, experts=3):
    return torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))


def restored(name, vectors, number, context, **parameters):
    row = BASELINES[name]
    survey = row.surveyed([(vectors, context)], **parameters)
    return row.restored(vectors, number, context, survey, **parameters)


def test_emr_gives_the_worked_numbers():
    close(unify(T), [3, 3, 1, -4, 1, 2])
    close(rescalers([(T, ROW)]), [1.05, 1.5, 0.7727272727])
    close(restored("emr", T, 0, ROW), [3.15, 0, 1.05, -4.2, 0, 2.1])


def test_emr_rescales_over_the_model_with_every_tensor_counting_the_same():
    small, large = random_vectors(2), random_vectors(30, 20)
    tensors = [(small, ROW), (large, ROW)]

    def masked(vectors, k):
        sign = torch.where(vectors.mean(0) > 0, 1.0, -1.0)
        unified = sign * torch.where(vectors * sign > 0, vectors.abs(), 0).max(0).values
        return torch.where(vectors[k] * sign > 0, unified, 0)

    for k in range(3):
        factor = sum(v[k].abs().mean() for v, _ in tensors) / sum(masked(v, k).abs().mean() for v, _ in tensors)
        found = BASELINES["emr"].restored(large, k, ROW, rescalers(tensors))
        torch.testing.assert_close(found, factor * masked(large, k))


@pytest.mark.parametrize(("weight", "masks"), [(1.0, "100101 000010 011100"), (0.4, "101101 110110 011111")])
def test_tall_masks_are_the_worked_ones(weight, masks):
    total = torch.tensor([4, 4, 1, -2, 1.5, 2])
    for number, mask in enumerate(masks.split()):
        close(restored("tall", T, number, ROW, mask_weight=weight), torch.tensor([float(bit) for bit in mask]) * total)


def test_bitdelta_takes_the_mean_magnitude_and_a_plus_for_zeros():
    for number, scale in enumerate((1.75, 1.75, 1.4166666667)):
        close(restored("bitdelta", T[:, None], number, ROW).abs(), [[scale] * 6])
    close(restored("bitdelta", T[:, None], 0, ROW).sign(), [[1, -1, 1, -1, 1, 1]])
    close(restored("bitdelta", T, 0, TensorContext("norm", stored_shape=(6,), kind=OTHER)), T[0])


def test_t_switch_keeps_signs_of_the_largest_at_the_norm():
    close(restored("t-switch", T, 0, ROW, density=0.5), [3.1754264805, 0, 0, -3.1754264805, 0, 3.1754264805])


def test_the_sign_encoding_with_rescale_norm_is_the_switch_of_a_row():
    kept = torch.tensor([[True, False, False, True, False, True]])
    parts = ENCODINGS["sign"].encode(T[:1], kept, Precision(rescale="norm"))
    found = ENCODINGS["sign"].decode(parts, kept)
    torch.testing.assert_close(found, torch.tensor([1, -1, 1]) * 3.1754264805, atol=1e-2, rtol=4e-3)


def test_t_switch_has_one_threshold_over_the_model_and_keeps_the_norm():
    small, large = 0.01 * random_vectors(40, 50), random_vectors(40, 50)
    row, tensors = BASELINES["t-switch"], [(small, ROW), (large, ROW)]
    survey = row.surveyed(tensors, density=0.3)
    for k in range(3):
        found = [row.restored(vectors, k, ROW, survey) for vectors, _ in tensors]
        assert not found[0].any()
        kept = found[1] != 0
        assert int(kept.sum()) == pytest.approx(0.3 * 4000, rel=0.02)
        assert large[k][kept].abs().min() > large[k][~kept].abs().max() * 0.99
        norm = sum(v[k].double().square().sum() for v, _ in tensors).sqrt()
        assert float(found[1].norm()) == pytest.approx(float(norm), rel=1e-5)


def test_twin_is_the_shared_model_and_a_low_rank_rest():
    context = TensorContext("w", stored_shape=(40, 60), kind=LINEAR)
    # Random matrices have a flat spectrum, whose largest directions no iteration finds soon.
    left, sizes, right = torch.linalg.svd(random_vectors(40, 60), full_matrices=False)
    vectors = left * (sizes * 0.5 ** torch.arange(40))[:, None] @ right
    shared = 0.3 * vectors.sum(0)
    exclusive = restored("twin", vectors, 1, context) - shared
    left, sizes, right = torch.linalg.svd(vectors[1] - shared, full_matrices=False)
    torch.testing.assert_close(exclusive, (left[:, :4] * sizes[:4]) @ right[:4], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(restored("twin", vectors, 1, context, rank_share=1.0), vectors[1], atol=1e-4, rtol=1e-4)
    assert BASELINES["twin"].num_bytes([context], 3) == 2 * 3 * 4 * 100


@pytest.mark.parametrize(
    ("shape", "rest", "bits"), [((4096, 4096), 968, 1.0), ((11008, 4096), 1428, 0.9942), ((64, 48), 1, 0.984)]
)
def test_delta_come_takes_about_one_bit_an_entry_as_published(shape, rest, bits):
    found = list(bands(shape))
    total = sum(count * width for count, width in found) * sum(shape) / (shape[0] * shape[1])
    assert total == pytest.approx(bits, abs=0.006)
    assert sum(count for count, width in found if width == 2) == pytest.approx(rest, abs=9)


def test_delta_come_brings_back_small_matrices_and_is_finer_with_more_bits():
    vectors, context = random_vectors(80, 100), TensorContext("w", stored_shape=(80, 100), kind=LINEAR)
    low = vectors[:, :, :1] @ vectors[:, :1]
    error = (restored("delta-come", low, 0, context) - low[0]).norm() / low[0].norm()
    assert error < 0.02
    columns = vectors[0]
    errors = [float((rounded(columns, width) - columns).norm()) for width in (1, 2, 3, 8)]
    assert all(coarse > 1.8 * fine for coarse, fine in pairwise(errors))
    assert torch.equal(rounded(torch.zeros(5, 2), 2), torch.zeros(5, 2))
    assert all(len(column.unique()) <= 4 for column in rounded(columns, 2).T)


@pytest.mark.parametrize(
    ("name", "bits"), [("experts", 16), ("emr", 16 / 3 + 1), ("tall", 16 / 3 + 1), ("t-switch", 1.35), ("bitdelta", 1)]
)
def test_bytes_are_those_of_the_papers(name, bits):
    context = TensorContext("w", stored_shape=(400, 300), kind=LINEAR)
    assert BASELINES[name].num_bytes([context], 3) == pytest.approx(3 * bits * 120_000 / 8, rel=1e-3)
    outside = TensorContext("norm", stored_shape=(300,), kind=OTHER)
    assert BASELINES["bitdelta"].num_bytes([outside], 3) == 3 * 2 * 300


@pytest.mark.parametrize("name", BASELINES)
def test_inputs_stay_and_one_expert_alone_is_found_again(name):
    vectors, context = random_vectors(64, 80, experts=1), TensorContext("w", stored_shape=(64, 80), kind=LINEAR)
    before = vectors.clone()
    found = restored(name, vectors, 0, context)
    assert torch.equal(vectors, before)
    assert found.shape == vectors[0].shape
    assert torch.cosine_similarity(found.flatten(), vectors[0].flatten(), dim=0) > 0.5
    scaled = restored(name, 4 * vectors, 0, context)
    torch.testing.assert_close(scaled, 4 * found, atol=1e-3, rtol=1e-3)


def test_blocks_mix_the_more_sharply_the_more_they_conflict():
    close(sharpness(torch.tensor([0, 0.1, 0.25, 0.4])), [0, 0.25, 1, 4])
    assert sharpness(torch.tensor([0.5, 0.6])).isinf().all()
    found = sharpened(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0, 1, 3, torch.inf]))
    torch.testing.assert_close(
        found,
        torch.tensor([[1 / 3] * 3, [0.7, 0.2, 0.1], [0.9744, 0.0227, 0.0028], [1, 0, 0]]),
        atol=5e-5,
        rtol=0,
    )
