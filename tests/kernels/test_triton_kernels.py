"""The GPU's kernels against the plain formula: on a GPU, or by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_CHILD = os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda"
"""Triton decides at its import whether to interpret: without a GPU, a process of its own runs these tests."""

needs_kernels = pytest.mark.skipif(not IS_CHILD, reason="run by test_all_by_the_interpreter in a process of its own")


@pytest.mark.slow
@pytest.mark.skipif(IS_CHILD, reason="the tests below run here themselves")
def test_all_by_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]


def deltas(shape, coding, densities, dtype=None):
    from mediator_peft.bank.sparse_delta import SparseDelta
    from mediator_peft.methods.encoding.base import Precision

    generator = torch.Generator().manual_seed(0)
    made = []
    for density in densities:
        dense = torch.randn(shape, generator=generator)
        kept = torch.rand(shape, generator=generator) < density
        made.append(SparseDelta.from_dense(dense, kept, coding, Precision(dtype)))
    return made


def on_device(some):
    from mediator_peft.kernels.triton_kernels import DeviceDelta, DeviceDeltas

    return DeviceDeltas([DeviceDelta(each.to(torch.device(DEVICE))) for each in some])


CODINGS = [("sign", None), ("float", None), ("float", torch.bfloat16), ("float", torch.float16)]
SHAPES = [(5, 32), (33, 288), (48, 64), (20, 544)]
DENSITIES = (0.2, 0.0, 0.9, 1.0)


NUM_ROWS = (1, 5, 17)
PRODUCTS = [
    (shape, *coding, num_rows)
    for i, shape in enumerate(SHAPES)
    for j, coding in enumerate(CODINGS)
    for k, num_rows in enumerate(NUM_ROWS)
    # The interpreter takes half a second each: there, all pairs of two of the three. A GPU takes all.
    if DEVICE == "cuda" or (i + j) % 3 == k
]


@needs_kernels
@pytest.mark.parametrize(("shape", "coding", "dtype", "num_rows"), PRODUCTS, ids=str)
def test_the_product_equals_the_dense_one(shape, coding, dtype, num_rows):
    some = deltas(shape, coding, DENSITIES, dtype)
    generator = torch.Generator().manual_seed(1)
    x, out = (torch.randn(num_rows, size, generator=generator) for size in reversed(shape))
    coefficients = torch.randn(len(some), num_rows, generator=generator)
    coefficients[0, 0] = 0
    expected = out.double()
    for row, delta in zip(coefficients, some, strict=True):
        expected = expected + row[:, None].double() * (x.double() @ delta.dense().double().T)
    result = out.to(DEVICE)
    on_device(some).add_product(x.to(DEVICE), coefficients.to(DEVICE), result)
    torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@needs_kernels
def test_a_row_without_part_in_a_delta_gets_nothing_from_it_not_even_of_infinite_numbers():
    some = deltas((16, 32), "sign", (0.5, 0.5))
    x = torch.full((2, 32), float("inf"), device=DEVICE)
    x[1] = 1.0
    out = torch.zeros(2, 16, device=DEVICE)
    on_device(some).add_product(x, torch.tensor([[0.0, 1.0], [0.0, 0.0]], device=DEVICE), out)
    assert torch.equal(out[0].cpu(), torch.zeros(16))
    torch.testing.assert_close(out[1].cpu(), some[0].dense().sum(dim=1))


@needs_kernels
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("coding", "dtype"), CODINGS, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "columns"])
def test_the_sum_is_rounded_once_and_leaves_all_other_entries(coding, dtype, weight_dtype, is_transposed):
    if DEVICE == "cpu" and weight_dtype == torch.bfloat16:
        pytest.skip("the interpreter does not round to bfloat16 to nearest")
    shape = (33, 288)
    some = deltas(shape, coding, (0.2, 0.05), dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(weight_dtype)
    weight[0, :5] = -0.0
    weight = (weight.T.contiguous().T if is_transposed else weight).to(DEVICE)
    coefficients = torch.tensor([0.75, -0.5])
    result = on_device(some).added(weight, coefficients.to(DEVICE)).cpu()
    delta = 0.75 * some[0].dense() + -0.5 * some[1].dense()
    expected = torch.where(delta != 0, (weight.cpu().float() + delta).to(weight_dtype), weight.cpu())
    kept = some[0].kept | some[1].kept
    assert torch.equal(result[~kept].view(torch.uint8), weight.cpu()[~kept].view(torch.uint8))
    torch.testing.assert_close(result, expected, rtol=1e-6 if weight_dtype == torch.float32 else 0.01, atol=1e-6)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    from mediator_peft.kernels.triton_kernels import DeviceDelta

    with pytest.raises(ValueError, match="words"):
        DeviceDelta(deltas((4, 40), "sign", (0.5,))[0])
    with pytest.raises(ValueError, match="one shape"):
        on_device([*deltas((4, 32), "sign", (0.5,)), *deltas((4, 64), "sign", (0.5,))])
