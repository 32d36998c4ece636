"""Codings of kept entries against the formula, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mediator_peft.bank.layer_bank import LayerBank, check_parts, from_disk
from mediator_peft.bank.packed_arrays import to_disk
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.errors import AdapterError
from mediator_peft.merge.signed_selection import Marking, SignedSelection
from mediator_peft.merge.tiles import Workspace
from mediator_peft.methods.encoding.base import Precision
from mediator_peft.methods.encoding.scales import NUMBER_SCALES, SIGN_SCALES, RowSums
from mediator_peft.methods.sparsifying.magnitude import largest_mask
from mediator_peft.storage import as_array, to_tensor
from tests.reference import thin_out

SHAPES = [(1, 1), (7, 5), (33, 64), (40, 17)]


def deltas(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    uneven = noise * torch.logspace(-3, 1, shape[0])[:, None]
    return {"noise": noise, "uneven": uneven, "ties": (uneven * 8).round() / 8, "none": torch.zeros(shape)}


def by_the_build(delta, density, rescale):
    """As the build makes it: from tiles, by selection."""
    selection = SignedSelection(tuple(delta.shape), density, delta.numpy())
    selection.restart(selection.bracket(1.0))
    marking = Marking([selection], Workspace())
    for start in range(0, len(delta), 4):
        rows = delta[start : start + 4].contiguous().numpy()
        marking.add(start, [(rows, np.zeros_like(rows))])
    assert selection.settle()
    return selection.encode(None, rescale)[0].as_tensors()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("rescale", sorted(SIGN_SCALES))
def test_signs_are_the_formula_however_they_are_made(shape, density, rescale):
    for name, delta in deltas(shape).items():
        expected = thin_out(delta, density, "sign", rescale)
        kept = largest_mask(delta, density)
        plain = SparseDelta.from_dense(delta, kept, "sign", Precision(rescale=rescale))
        torch.testing.assert_close(plain.dense(), expected, rtol=1e-5, atol=1e-9, msg=name)
        if density < 1 and name != "none":
            torch.testing.assert_close(
                by_the_build(delta, density, rescale).dense(), expected, rtol=1e-5, atol=1e-9, msg=name
            )


def test_projection_scales_give_back_the_delta_along_itself():
    delta = deltas((33, 64))["uneven"]
    kept = largest_mask(delta, 0.2)
    packed = SparseDelta.from_dense(delta, kept, "sign", Precision(rescale="projection")).dense()
    # As near as scales in 16 bits are.
    assert float((packed * delta).sum()) == pytest.approx(float((delta * delta).sum()), rel=2e-3)


@pytest.mark.parametrize("rescale", sorted(SIGN_SCALES))
def test_rows_of_which_nothing_is_kept_get_no_scale(rescale):
    rows = RowSums(np.array([4.0, 1.0, 0.0]), np.array([2.0, 0.0, 0.0]), np.array([1, 0, 0]))
    scales = SIGN_SCALES[rescale](rows)
    assert np.isfinite(scales).all()
    assert scales[0] > 0
    assert not scales[1:].any()
    assert not SIGN_SCALES[rescale](RowSums(*(np.zeros(3), np.zeros(3), np.zeros(3, int)))).any()


@pytest.mark.parametrize(("coding", "bits", "error"), [("int8", 8, 0.01), ("nf4", 4, 0.12)])
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_quantised_values_are_near_and_as_small_as_told(coding, bits, error, density):
    pytest.importorskip("bitsandbytes")
    delta = torch.randn(33, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    kept = largest_mask(delta, density)
    packed = SparseDelta.from_dense(delta, kept, coding)
    found = packed.dense()
    assert not found[~kept].any()
    assert float((found - delta)[kept].norm()) <= error * float(delta[kept].norm())
    count = int(kept.sum())
    assert packed.parts["codes"].nbytes == -(-count * bits // 8)
    assert packed.parts["absmax"].nbytes == 4 * -(-count // 64)
    nothing = SparseDelta.from_dense(delta, torch.zeros_like(kept), coding)
    assert not nothing.dense().any()


@pytest.mark.parametrize(("coding", "tolerance"), [("float", 1e-6), ("int8", 0.02), ("nf4", 0.15)])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_numbers_too_give_back_the_delta_along_itself(coding, tolerance, density):
    if coding != "float":
        pytest.importorskip("bitsandbytes")
    delta = deltas((33, 64))["uneven"]
    kept = largest_mask(delta, density)
    packed = SparseDelta.from_dense(delta, kept, coding, Precision(rescale="projection")).dense()
    assert float((packed * delta).sum()) == pytest.approx(float((delta * delta).sum()), rel=tolerance)
    torch.testing.assert_close(packed != 0, kept & (packed != 0), rtol=0, atol=0)


@pytest.mark.parametrize("rescale", sorted(NUMBER_SCALES))
def test_numbers_at_density_one_are_kept_to_the_bit(rescale):
    for delta in deltas((40, 17)).values():
        packed = SparseDelta.from_dense(delta, delta != 0, "float", Precision(rescale=rescale))
        assert torch.equal(packed.dense(), delta)


def test_rows_of_numbers_keep_their_norm():
    delta = deltas((33, 64))["uneven"]
    kept = largest_mask(delta, 0.3)
    packed = SparseDelta.from_dense(delta, kept, "float", Precision(rescale="norm")).dense()
    some = kept.any(dim=1)
    torch.testing.assert_close(packed[some].norm(dim=1), delta[some].norm(dim=1))
    assert not packed[~some].any()


def test_numbers_as_they_are_take_the_sparsifiers_gain():
    delta = deltas((7, 5))["noise"]
    kept = delta > 0
    packed = SparseDelta.from_dense(delta, kept, "float", Precision(rescale="mean", gain=4.0)).dense()
    torch.testing.assert_close(packed, torch.where(kept, delta * 4, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_stand_for_their_product(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    delta = SparseDelta.from_factors(left, right, torch.ones(shape[0]))
    torch.testing.assert_close(delta.dense(), left @ right)
    assert delta.kept.all()
    assert delta.kept.shape == shape
    x = torch.randn(3, 4, shape[1], generator=generator)
    torch.testing.assert_close(delta.product(x), x @ (left @ right).T, rtol=1e-5, atol=1e-5)
    assert delta.num_bytes == 4 * (2 * sum(shape) + shape[0])
    again = SparseDelta.from_dense(left @ right, torch.ones(shape, dtype=torch.bool), "factors")
    torch.testing.assert_close(again.dense(), left @ right, rtol=1e-5, atol=1e-5)
    assert len(again.parts["left"]) <= 2 * shape[0]


def test_a_bank_keeps_factors_without_a_mask():
    left, right = torch.ones(6, 2), torch.arange(20.0).reshape(2, 10)
    bank = LayerBank((6, 10), "factors", False)
    bank.put("e", SparseDelta.from_factors(left.bfloat16(), right.bfloat16()))
    assert bank.num_bytes == 2 * 2 * 16
    assert bank.names == ["e"]
    torch.testing.assert_close(bank.get("e").dense(), left @ right)
    stored = {key: to_tensor(to_disk(key, as_array(buffer))) for key, buffer in bank.state_dict().items()}
    again = LayerBank((6, 10), "factors", False)
    for key, tensor in stored.items():
        again.put_part(key, from_disk(key, tensor, again.shape))
    check_parts(again, "layer", {"e": 60})
    torch.testing.assert_close(again.get("e").dense(), left @ right)
    again.put_part("e:left", torch.ones(13))
    with pytest.raises(AdapterError, match="factors of 13 and 20"):
        check_parts(again, "layer", {"e": 60})
