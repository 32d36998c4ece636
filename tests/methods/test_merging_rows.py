"""Every row of the table of merge methods: worked numbers, and the properties that hold for the row."""

from __future__ import annotations

import json
import math
from hashlib import blake2b

import numpy as np
import pytest
import torch

from mediator_peft.errors import ConfigError
from mediator_peft.merge import tiles
from mediator_peft.methods.merging import MERGE_METHODS, TensorContext, drawing
from mediator_peft.methods.merging.geometry import gram_matrix
from mediator_peft.methods.merging.row import EMBEDDING, OTHER
from mediator_peft.methods.merging.weighted import Coefficients, read_coefficients
from mediator_peft.methods.sparsifying.magnitude import largest_mask
from tests.methods.merging_helpers import backbone_of, merged, tensor_tiles

# The example of all worked numbers: a base and three task vectors.
BASE = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
TAU = torch.tensor(
    [
        [[0.30, -0.10, 0.00], [0.20, 0.05, -0.40]],
        [[0.10, 0.20, -0.30], [-0.20, 0.15, 0.10]],
        [[-0.05, 0.40, 0.10], [0.25, -0.35, -0.10]],
    ]
)
VECTORS = torch.tensor([[0.3, -0.1, 0.0], [0.1, 0.15, -0.3]])


def coefficients(*numbers):
    return Coefficients({"w": tuple(tuple(each) for each in numbers)})


WORKED = {
    "average": (TAU[:2], {}, [[0.2, 0.05, -0.15], [0, 0.1, -0.15]]),
    "task_arithmetic": (TAU[:2], {"scale": 1.0}, [[0.4, 0.1, -0.3], [0, 0.2, -0.3]]),
    "ties": (TAU[:2], {"density": 0.5}, [[0.3, 0.2, -0.3], [0.2, 0, -0.4]]),
    "consensus": (TAU, {"mask_weight": 0.45, "scale": 1.0}, [[0, 0.5, 0], [0.25, -0.15, 0]]),
    "consensus_ties": (
        TAU,
        {"density": 0.5, "mask_weight": 0.45, "scale": 1.0},
        [[0.3, 0.6, 0], [0.45, 0, 0]],
    ),
    "slerp": (TAU[:2], {}, [[0.325842, 0.081460, -0.244381], [0, 0.162921, -0.244381]]),
    "karcher": (TAU, {}, [[0.252405, 0.341606, -0.192277], [0.113823, -0.050503, -0.240233]]),
    "pcb": (TAU, {"density": 0.5}, [[0.3, 0.275, -0.2], [0, -0.35, -0.3]]),
    "tsv": (TAU[:2], {}, [[0.118145, 0.197606, -0.318467], [0.335795, -0.293164, -0.137027]]),
    "opcm": (TAU, {}, [[0.317079, 0.226775, -0.016105], [0.020019, -0.008504, -0.371339]]),
    "doge": (
        TAU[:2],
        # The published absolute length 0.07, in mean norms.
        {"length": 0.07 / 0.505489, "parts": 2, "density": 4 / 6},
        [[0.033649, 0.006605, -0.039584], [0.005025, 0.028783, -0.055914]],
    ),
    "widen": (TAU[:2], {}, [[0.270871, 0.05, -0.3], [0.058257, 0.1, -0.183486]]),
}
"""Row → task vectors, parameters, merged task vector to 6 digits."""


@pytest.mark.parametrize("name", WORKED)
def test_the_worked_numbers(name):
    vectors, parameters, expected = WORKED[name]
    found = merged(name, BASE, vectors, parameters=parameters)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def of_pairs(name, vectors, expected, **parameters):
    found = merged(name, BASE, vectors, parameters=parameters)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def test_other_worked_numbers_of_whole_matrices():
    of_pairs("opcm", TAU[:2], [[0.350203, 0.042398, -0.187523], [0.005653, 0.156596, -0.267133]])
    of_pairs("opcm", TAU.flip(0), [[0.135182, 0.495637, -0.046371], [0.017279, -0.150608, -0.039109]])
    of_pairs("pcb", TAU, [[0.3, 0.373822, -0.3], [0, -0.35, -0.4]], density=0.5, edge=0.0)
    # Two equal experts: their leading singular part.
    of_pairs("tsv", TAU[[0, 0]], [[0.120902, 0.002376, -0.146322], [0.277914, 0.005463, -0.336345]])


# Rows that treat input and output alike, so that transposed matrices give the transpose.
TRANSPOSES = {
    **dict.fromkeys(("average", "base", "task_arithmetic", "ties", "weighted", "consensus", "consensus_ties"), True),
    **dict.fromkeys(("slerp", "karcher", "pcb", "tsv", "opcm"), True),
    # Importance of columns; Gram matrices of inputs; steps along rows.
    **dict.fromkeys(("widen", "regmean", "doge"), False),
    # Draws and side files belong to places in the stored matrix.
    **dict.fromkeys(("dare", "dare_ties", "fisher", "ota"), False),
}


@pytest.mark.parametrize("name", [name for name, transposes in TRANSPOSES.items() if transposes])
def test_the_transpose_of_all_matrices_gives_the_transpose(name):
    base, vectors = vectors_of(number_of_experts(name))
    turned = merged(name, base.T.contiguous(), vectors.transpose(1, 2))
    torch.testing.assert_close(turned.T, merged(name, base, vectors), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_opcm_with_whole_bases(shape, share):
    """As published: R in whole bases of both sides, with its diagonal and its leading square set to zero."""
    base, vectors = vectors_of(3, shape)
    total = vectors[0].double().numpy()
    for vector in vectors[1:].double().numpy():
        left, values, right = np.linalg.svd(total, full_matrices=True)
        rank = int(np.argmax(np.cumsum(values) / values.sum() > share))
        rotated = left.T @ vector @ right.T
        np.fill_diagonal(rotated, 0)
        rotated[:rank, :rank] = 0
        total = total + left @ rotated @ right
    assert rank > 1 or share < 0.9
    expected = total * np.mean([vector.double().norm() for vector in vectors]) / np.linalg.norm(total)
    found = merged("opcm", base, vectors, parameters={"share": share})
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_inner_products_are_sums_in_float64():
    _, vectors = vectors_of(3, (400, 300))
    context = TensorContext("w")
    found = gram_matrix((vectors[:, start : start + 7], context) for start in range(0, 400, 7))
    exact = vectors.flatten(1).double().numpy()
    np.testing.assert_allclose(found, exact @ exact.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tsv", "opcm", "doge"])
def test_embeddings_and_vectors_are_not_decomposed(name):
    base, vectors = vectors_of(3)
    total = vectors.double().sum(dim=0)
    expected = total / 3
    if name == "opcm":
        norms = vectors.double().flatten(1).norm(dim=1)
        expected = total * norms.mean() / total.norm()
    found = merged(name, base, vectors, kind=EMBEDDING)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_weights_of_losses_and_chunks_of_rows():
    # Three losses 0.8, 0.5, 1.0 as weights; then sigmoids of two chunks each.
    weights = (0.294118,), (0.470588,), (0.235294,)
    found = merged("weighted", BASE, TAU, data=coefficients(*weights))
    expected = [[0.123529, 0.158824, -0.117647], [0.023529, 0.002941, -0.094118]]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)
    chunks = (0.268941, 0.622459), (0.5, 0.119203)
    expected = [[0.130682, 0.073106, -0.15], [0.100651, 0.049003, -0.237063]]
    for is_transposed in (False, True):
        found = merged("weighted", BASE, TAU[:2], data=coefficients(*chunks), is_transposed=is_transposed)
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def test_a_vector_is_widened_entry_by_entry():
    base = torch.tensor([1.0, -1.0, 0.5])
    found = merged("widen", base, VECTORS, kind=OTHER)
    torch.testing.assert_close(found, torch.tensor([0.345017, 0.028124, -0.3]).double(), rtol=0, atol=1.5e-6)


def test_the_columns_of_an_embedding_are_its_tokens():
    as_matrix = merged("widen", BASE, TAU[:2])
    as_embedding = merged("widen", BASE.T.contiguous(), TAU[:2].transpose(1, 2), kind=EMBEDDING)
    torch.testing.assert_close(as_embedding.T, as_matrix, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("dare", {}, [[0.32, 0.16, 0], [0.16, 0.16, 0.08]]),
        ("dare_ties", {}, [[0.4, 0.4, 0], [0.4, 0.2, 0.2]]),
    ],
)
def test_dare_with_given_draws(name, parameters, expected, monkeypatch):
    draws = {"a": [[1, 0, 1], [1, 1, 0]], "b": [[1, 1, 0], [0, 1, 1]]}

    def given(context, expert, shape, density):
        return torch.tensor(draws[expert], dtype=torch.bool)[context.start : context.start + shape[0]]

    monkeypatch.setattr("mediator_peft.methods.merging.dare.drawn_mask", given)
    found = merged(name, BASE, TAU[:2], parameters=parameters)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def vectors_of(num_experts=3, shape=(37, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    vectors = 0.01 * torch.randn(num_experts, *shape, generator=generator)
    return base, torch.where(torch.rand(vectors.shape, generator=generator) < 0.2, 0.0, vectors)


def number_of_experts(name, wanted=3):
    return MERGE_METHODS[name].num_experts or wanted


# Share of one task vector that K equal ones become; None where there is no such number.
EQUAL = {
    "average": 1.0,
    "base": 0.0,
    "task_arithmetic": 0.4 * 3,
    "ties": None,
    "tsv": None,
    "consensus": 0.4 * 3,
    "consensus_ties": None,
    "fisher": 1.0,
    "ota": 1.0,
    "regmean": 1.0,
    "dare": None,
    "dare_ties": None,
    "doge": None,
    "karcher": 1.0,
    "opcm": 1.0,
    "pcb": None,
    "slerp": 1.0,
    "weighted": 1.0,
    "widen": None,
}


@pytest.mark.parametrize("name", [name for name, share in EQUAL.items() if share is not None])
def test_equal_experts(name):
    base, vectors = vectors_of(1)
    found = merged(name, base, [vectors[0]] * number_of_experts(name))
    torch.testing.assert_close(found, (EQUAL[name] * vectors[0]).double(), rtol=1e-3, atol=1e-6)


def test_every_row_has_its_properties_told():
    assert EQUAL.keys() == TRANSPOSES.keys() == MERGE_METHODS.keys()


def test_equal_experts_where_they_are_not_one_multiple():
    """Trimmed once by ``ties``; one to three times the task vector by ``widen``; in mean by ``dare``."""
    base, vectors = vectors_of(1)
    three = [vectors[0]] * 3
    trimmed = torch.where(largest_mask(vectors[0], 0.2), vectors[0], 0).double()
    torch.testing.assert_close(merged("ties", base, three), trimmed, rtol=1e-3, atol=1e-6)
    found = merged("consensus_ties", base, three, parameters={"density": 0.2, "scale": 1.0})
    torch.testing.assert_close(found, (3 * trimmed), rtol=1e-3, atol=1e-6)
    ratios = (merged("widen", torch.zeros_like(base), three) / vectors[0])[vectors[0] != 0]
    assert 1 - 1e-5 <= ratios.min() <= ratios.max() <= 3 + 1e-5
    flat = torch.full((200, 300), 0.01)
    share = float(merged("dare", torch.zeros_like(flat), [flat] * 3).mean()) / 0.01
    assert share == pytest.approx(0.4 * 3, rel=0.02)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_the_order_of_experts_changes_rounding_alone(name):
    if not MERGE_METHODS[name].is_order_free:
        pytest.skip("depends on the order of names, and says so")
    number = number_of_experts(name)
    base, vectors = vectors_of(number)
    turned = list(range(number))[::-1]
    found = merged(name, base, vectors)
    # A draw belongs to the name of an expert, not to its place.
    again = merged(name, base, vectors[turned], experts=tuple("abcdefgh"[:number][place] for place in turned))
    torch.testing.assert_close(found, again, rtol=1e-4, atol=2e-6)


NOT_SCALED = {"widen", "doge", "ota", "pcb"}


@pytest.mark.parametrize("name", sorted(set(MERGE_METHODS) - NOT_SCALED))
def test_scaling_all_task_vectors_scales_the_result(name):
    base, vectors = vectors_of(number_of_experts(name))
    base = torch.zeros_like(base)
    once = merged(name, base, vectors)
    torch.testing.assert_close(merged(name, base, 4 * vectors), 4 * once, rtol=1e-5, atol=1e-9)
    assert once.any() or name == "base"


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("num_zero", [1, 2])
def test_experts_and_columns_of_zeros_give_no_nan(name, num_zero):
    number = number_of_experts(name)
    base, vectors = vectors_of(number)
    vectors[:num_zero] = 0
    base[:, 3] = 0
    base[5] = 0
    vectors[:, :, 3] = 0
    for kind, columns in (("linear", 24), (EMBEDDING, 24), (OTHER, None)):
        some = (base, vectors) if columns else (base[0], vectors[:, 0])
        assert backbone_of(name, *some, kind=kind).isfinite().all()


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("kind", ["linear", EMBEDDING, OTHER])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_tiles_of_any_height_agree_to_the_bit(name, kind, is_transposed, monkeypatch):
    base, vectors = vectors_of(number_of_experts(name))
    if kind == OTHER:
        base, vectors, is_transposed = base[:, 0].contiguous(), vectors[:, :, 0].contiguous(), False
    monkeypatch.setattr(tiles, "FUSED_TILES", 1)
    found = []
    for height in (1, 2, 37):
        columns = base[0].numel()
        monkeypatch.setattr(tiles, "TILE_ENTRIES", height * columns)
        seen = tensor_tiles(name, base, vectors, kind=kind, is_transposed=is_transposed)
        assert seen.rows_per_tile == height
        found.append(np.concatenate([tile.backbone.copy() for tile in seen]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_matrix_stored_the_other_way_is_the_same_matrix(name):
    base, vectors = vectors_of(number_of_experts(name))
    if name in ("dare", "dare_ties"):
        # The draw is addressed by the place in the stored tensor, so the numbers are others, and as many.
        shares = [float((merged(name, base, vectors, is_transposed=way) != 0).double().mean()) for way in (False, True)]
        assert abs(shares[0] - shares[1]) < 0.05
        return
    plain = merged(name, base, vectors)
    torch.testing.assert_close(merged(name, base, vectors, is_transposed=True), plain, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_bfloat16_and_a_float32_copy_differ_by_rounding(name):
    base, vectors = vectors_of(number_of_experts(name))
    base, experts = base.bfloat16().float(), (base + 4 * vectors).bfloat16().float()
    vectors = experts - base
    whole = backbone_of(name, base, vectors)
    short = backbone_of(name, base.bfloat16().float(), vectors, dtype=torch.bfloat16).float()
    torch.testing.assert_close(short, whole, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_inputs_are_left_alone(name):
    seen = tensor_tiles(name, *vectors_of(number_of_experts(name)))
    next(iter(seen))  # what is surveyed is so by now
    given, context = seen.whole_task_vectors()
    before = given.clone(), context.base.clone()
    found = seen.merge(given, context.base)
    assert found.shape == given.shape[1:]
    assert found.dtype == torch.float32
    torch.testing.assert_close((given, context.base), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_sample_is_taken_from_the_backbone(name, monkeypatch):
    base, vectors = vectors_of(number_of_experts(name), shape=(400, 8))
    seen = tensor_tiles(name, base, vectors)
    starts = [400 * number // 18 for number in range(18)]
    rows = [row for start in starts for row in range(start, start + 8)]
    np.testing.assert_array_equal(seen.sample().backbone, backbone_of(name, base, vectors)[rows].numpy())


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_infinities_and_nan_are_left_for_the_tiles_to_name(name):
    base, vectors = vectors_of(number_of_experts(name))
    for value in (math.inf, math.nan):
        vectors[0, 3, 4] = value
        energies = [tile.energies for tile in tensor_tiles(name, base, vectors)]
        assert not np.isfinite(np.concatenate(energies)).all()


def test_the_angle_of_nearly_opposite_and_of_zero_task_vectors():
    base, vectors = vectors_of(2)
    opposite = merged("slerp", base, [vectors[0], -vectors[0]])
    assert opposite.abs().max() < 1e-6
    half = merged("slerp", base, [vectors[0], 0 * vectors[0]])
    torch.testing.assert_close(half, vectors[0].double() / 2, rtol=1e-3, atol=1e-6)
    assert merged("karcher", base, [vectors[0], -vectors[0]]).abs().max() < 1e-6
    kept = merged("karcher", base, [vectors[0], 0 * vectors[0]])
    torch.testing.assert_close(kept, vectors[0].double() / 2, rtol=1e-3, atol=1e-6)


def test_slerp_and_karcher_of_two_keep_the_norm():
    base, vectors = vectors_of(2)
    norms = vectors.flatten(1).double().norm(dim=1)
    vectors = vectors * (norms[0] / norms).float()[:, None, None]
    base = torch.zeros_like(base)
    for name in ("slerp", "karcher"):
        assert float(merged(name, base, vectors).norm()) == pytest.approx(float(norms[0]), rel=1e-5)
    torch.testing.assert_close(merged("slerp", base, vectors), merged("karcher", base, vectors), rtol=1e-5, atol=1e-8)


def test_a_draw_is_what_splitmix64_gives():
    context = TensorContext("w", ("a",), (5, 7), seed=3)
    found = drawing.drawn_mask(context, "a", (5, 7), 0.3)
    state = int.from_bytes(blake2b(b"3/a/w", digest_size=8).digest(), "little")
    expected = []
    for place in range(35):
        mixed = (state + place * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
        expected.append((mixed >> 11) / 2**53 < 0.3)
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("changed", [{"seed": 4}, {"name": "v"}, {"expert": "b"}])
def test_draws_of_other_seeds_tensors_and_experts_are_independent(changed):
    def mask(seed=3, name="w", expert="a"):
        return drawing.drawn_mask(TensorContext(name, ("a",), (300, 100), seed=seed), expert, (300, 100), 0.3)

    one, other = mask(), mask(**changed)
    assert float(one.double().mean()) == pytest.approx(0.3, abs=0.015)
    assert float((one & other).double().mean()) == pytest.approx(0.09, abs=0.01)
    assert drawing.drawn_mask(TensorContext("w", ("a",), (9, 9)), "a", (9, 9), 1.0).all()


def test_the_disjoint_mean_after_a_draw_is_above_the_mean():
    # (a + b)(1 - p / 2) for two entries that agree: a = 0.3, b = 0.1, p = 0.2 gives 0.36, where the mean is 0.2.
    base = torch.zeros(400, 500)
    vectors = [torch.full_like(base, value) for value in (0.3, 0.1)]
    found = merged("dare_ties", base, vectors, parameters={"density": 0.2})
    assert float(found.mean()) == pytest.approx(0.36, abs=0.004)
    linear = merged("dare", base, vectors, parameters={"density": 0.2, "scale": 0.5})
    assert float(linear.mean()) == pytest.approx(0.2, abs=0.004)


CONTEXTS = {
    "model.layers.0.w": TensorContext("model.layers.0.w", ("a", "b"), (4, 3), block=0, num_blocks=2),
    "model.layers.1.w": TensorContext("model.layers.1.w", ("a", "b"), (4, 3), block=1, num_blocks=2),
    "model.embed": TensorContext("model.embed", ("a", "b"), (9, 3)),
}


def test_a_tensor_goes_before_its_block_and_that_before_all(tmp_path):
    content = {
        "coefficients_version": 1,
        "experts": {"a": 0.5, "b": 0.25},
        "blocks": {"1": {"a": 1, "b": 2}},
        "tensors": {"model.layers.0.w": {"a": [1, 2], "b": 3}},
        "about": {"made": "by hand"},
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    found = read_coefficients(tmp_path / "c.json", CONTEXTS).of_tensor
    assert found == {
        "model.layers.0.w": ((1.0, 2.0), (3.0,)),
        "model.layers.1.w": ((1.0,), (2.0,)),
        "model.embed": ((0.5,), (0.25,)),
    }


def test_all_faults_of_coefficients_are_listed(tmp_path):
    content = """{"coefficients_version": 2, "expert": {}, "blocks": {"7": {"a": 1, "b": 1}},
    "tensors": {"model.layers.0.v": {"a": 1, "b": 1}, "model.layers.0.w": {"a": NaN, "c": 1},
    "model.layers.1.w": {"a": [1, 2, 3, 4, 5], "b": "1"}}}"""
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_coefficients(tmp_path / "c.json", CONTEXTS)
    text = str(caught.value)
    for part in (
        "coefficients_version is 2", "unknown key 'expert'", "block '7'", "'model.layers.0.v'", "nan", "'c'",
        "no number for expert 'b'", "5 chunks", "'1'", "no coefficients, and no 'experts' for all others: model.embed",
    ):  # fmt: skip
        assert part in text, part
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        read_coefficients(tmp_path / "c.json", CONTEXTS)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_coefficients(tmp_path / "none.json", CONTEXTS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"coefficients_version": 1, "experts": {"a": 0.1, "b": 1, "a": 9}}', "'a' comes 2 times in one object"),
        ('{"coefficients_version": 1, "experts": {}, "experts": {"a": 1, "b": 1}}', "'experts' comes 2 times"),
        ('{"coefficients_version": true, "experts": {"a": 1, "b": 1}}', "coefficients_version is True"),
        (json.dumps({"coefficients_version": 1, "tensors": {f"t{n}": 0 for n in range(9000)}}), "or more"),
        (json.dumps({"coefficients_version": 1, "experts": {"a": ["x"] * 90_000, "b": 1}}), "no finite number"),
    ],
)
def test_coefficients_that_cannot_be_meant_are_refused_in_few_words(content, said, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_coefficients(tmp_path / "c.json", CONTEXTS)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_row_says_what_it_is(name):
    row = MERGE_METHODS[name]
    assert all((row.paper, row.good_for, row.data, row.cost))
    for parameter in row.parameters.values():
        assert parameter.fault(parameter.default) is None
        assert parameter.text
    assert row.survey is None or (row.is_entrywise and row.takes_context)
    assert not row.needs_data or row.open_data is not None


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("ties", {"density": 0.0}, "(0, 1]"),
        ("ties", {"density": math.nan}, "(0, 1]"),
        ("ties", {"density": True}, "(0, 1]"),
        ("ties", {"densty": 0.1}, "Did you mean 'density'"),
        ("average", {"density": 0.1}, "no parameters"),
        ("consensus", {"least_experts": 1.5}, "whole number"),
        ("slerp", {"t": 1.01}, "[0, 1]"),
    ],
)
def test_parameters_are_checked(name, given, part):
    faults = list(MERGE_METHODS[name].faults(given, name))
    assert len(faults) == 1
    assert part in faults[0]
    assert not list(MERGE_METHODS[name].faults(MERGE_METHODS[name].defaults(), name))
