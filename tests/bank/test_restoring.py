"""A weight that deltas are written to comes back bit for bit, in every dtype and in little memory."""

import numpy as np
import pytest
import torch

from mediator_peft.bank.restoring import ComputedBack, KeptEntries, free_low_bits
from mediator_peft.kernels import dispatch as kernels

from ..kernels.test_kernels import random_delta

pytestmark = pytest.mark.skipif(kernels.native() is None, reason="the native kernels are not there")
SHAPES = [(3, 5), (33, 65), (64, 576), (20, 130), (17, 4100)]
FORMS = ["sign", "float32", "bfloat16"]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def awkward_weight(shape, stored, seed=3):
    """A float32 weight of a 16-bit checkpoint, with entries that no delta leaves alone."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(stored).float()
    flat = weight.view(-1)
    for place, value in enumerate([0.0, -0.0, 1e-30, float("inf"), float("nan"), -1e-7]):
        flat[place * 2] = value
    return weight


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficient", [1.0, -0.37])
def test_a_float32_weight_of_a_16_bit_checkpoint_is_computed_back(shape, form, stored, coefficient):
    delta, dense = random_delta(shape, 0.2, form)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(stored).float()
    weight[0, :2] = torch.tensor([0.0, -0.0])
    before = weight.clone()
    assert free_low_bits(weight) >= 13
    saved = ComputedBack(delta, coefficient, free_low_bits(weight))
    for _ in range(3):
        if saved.add(weight):
            torch.testing.assert_close(weight, before + coefficient * dense, rtol=0, atol=0)
        saved.restore(weight)
        assert torch.equal(bits(weight), bits(before))
    saved.add(weight)
    saved.restore(weight)
    saved.restore(weight)
    assert torch.equal(bits(weight), bits(before)), "restoring twice changes something"


def test_most_rows_are_computed_back_and_the_others_are_saved():
    delta, dense = random_delta((200, 576), 0.2)
    weight = (30 * torch.randn(200, 576, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    column = int(torch.nonzero(dense[7])[0])
    weight[7, column] = 0.0  # the delta fills it, and nothing tells that 0 stood there but the row itself
    weight[9, int(torch.nonzero(dense[9])[0])] = 1e-20
    before = weight.clone()
    saved = ComputedBack(delta, 1.0, 16)
    assert saved.add(weight)
    assert 0 < saved.num_bytes < before.nbytes / 20
    torch.testing.assert_close(weight, before + dense, rtol=0, atol=0)
    saved.restore(weight)
    assert torch.equal(bits(weight), bits(before))


def test_a_weight_without_free_bits_is_left_untouched():
    delta, _ = random_delta((64, 130), 0.2)
    weight = torch.randn(64, 130)
    before = weight.clone()
    assert free_low_bits(weight) == 0
    assert not ComputedBack.fits(weight, free_low_bits(weight))
    assert not ComputedBack(delta, 1.0, 8).add(weight)
    assert torch.equal(bits(weight), bits(before))


def test_an_addition_that_was_cut_short_is_taken_back(monkeypatch):
    delta, dense = random_delta((64, 130), 0.2)
    weight = (30 * torch.randn(64, 130)).bfloat16().float()
    weight[3, int(torch.nonzero(dense[3])[0])] = 1e-20
    before = weight.clone()
    saved = ComputedBack(delta, 1.0, 16)
    change = saved._change

    def fails(mode, weight):
        if mode == 1:
            raise KeyboardInterrupt
        change(mode, weight)

    monkeypatch.setattr(saved, "_change", fails)
    with pytest.raises(KeyboardInterrupt):
        saved.add(weight)
    assert not torch.equal(weight, before), "nothing had been written yet"
    saved.restore(weight)
    assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("with_loops", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kept_entries_come_back_and_others_are_not_touched(monkeypatch, shape, dtype, with_loops):
    if not with_loops:
        monkeypatch.setattr(kernels, "native", lambda: None)
    delta, dense = random_delta(shape, 0.2)
    weight = awkward_weight(shape, torch.bfloat16).to(dtype)
    before, mask = weight.clone(), torch.from_numpy(delta.mask)
    for offsets in (None, delta.offsets):
        saved = KeptEntries(weight, mask, offsets)
        assert saved.num_bytes == int((dense != 0).sum()) * weight.itemsize + (
            0 if offsets is not None else mask.nbytes
        )
        weight[dense != 0] = 5.0
        weight[dense == 0] = 7.0
        saved.restore(weight)
        assert torch.equal(bits(weight)[dense != 0], bits(before)[dense != 0])
        assert (weight[dense == 0] == 7).all()
        weight.copy_(before)


def test_results_do_not_depend_on_the_number_of_threads():
    delta, _ = random_delta((300, 576), 0.2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weight = torch.randn(300, 576, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        saved = ComputedBack(delta, 0.5, 16)
        saved.add(weight)
        results.append((weight.clone(), saved._marks.copy()))
    assert torch.equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
