"""Products, additions and expansion straight from packed deltas, against dense matrices built entry by entry."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mediator_peft.kernels import dispatch as kernels
from mediator_peft.kernels import native_kernels
from mediator_peft.kernels.dispatch import GroupedProduct, PackedDelta, add_to, expand, row_offsets, sparse_product

needs_native = pytest.mark.skipif(kernels.native() is None, reason="the native kernels are not there")
SHAPES = [(1, 1), (3, 5), (16, 8), (17, 64), (5, 63), (33, 65), (20, 130), (64, 576), (50, 200)]
FORMS = ["sign", "float32", "float16", "bfloat16"]


@pytest.fixture(params=["native", "numpy"])
def implementation(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "native", lambda: None)
    elif kernels.native() is None:
        pytest.skip("the native kernels are not there")
    return request.param


def as_array(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def random_delta(shape, density, form="sign", seed=0):
    """A packed delta and the dense matrix it stands for, written entry by entry."""
    mask, parts, dense = entry_by_entry(shape, density, form, seed)
    return PackedDelta(mask.copy(), shape[1], **{name: part.copy() for name, part in parts.items()}), dense.clone()


@cache
def entry_by_entry(shape, density, form, seed):
    """Bitmap, parts and dense matrix of a delta: made once for all tests, which get copies."""
    random = np.random.default_rng(seed)
    num_rows, num_columns = shape
    mask = np.zeros((num_rows, -(-num_columns // 8)), np.uint8)
    dense = np.zeros(shape, np.float32)
    scales = torch.from_numpy(random.uniform(0.5, 2, num_rows)).bfloat16()
    negative, values = [], []
    for row in range(num_rows):
        for column in range(num_columns):
            if random.random() >= density:
                continue
            mask[row, column // 8] |= 1 << (column % 8)
            if form == "sign":
                negative.append(int(random.integers(2)))
                dense[row, column] = scales[row].item() * (-1) ** negative[-1]
            else:
                values.append(random.normal())
    if form == "sign":
        signs = np.zeros(-(-len(negative) // 8), np.uint8)
        for number, bit in enumerate(negative):
            signs[number // 8] |= bit << (number % 8)
        return mask, {"signs": signs, "scales": as_array(scales)}, torch.from_numpy(dense)
    rounded = torch.tensor(values).to(getattr(torch, form))
    places = iter(rounded.float().tolist())
    for row in range(num_rows):
        for column in range(num_columns):
            if mask[row, column // 8] >> (column % 8) & 1:
                dense[row, column] = next(places)
    return mask, {"values": as_array(rounded)}, torch.from_numpy(dense)


def as_tensors(delta):
    """The same delta, held as tensors."""
    parts = {name: getattr(delta, name) for name in ("signs", "scales", "values")}
    tensors = {name: torch.from_numpy(array) for name, array in parts.items() if array is not None}
    return PackedDelta(torch.from_numpy(delta.mask), delta.shape[1], **tensors)


def random_batch(size, shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, shape[1], generator=generator)
    return x, torch.rand(size, generator=generator), torch.randn(size, shape[0], generator=generator)


def assert_product_is_right(delta, dense, batch_size):
    x, coefficients, out = random_batch(batch_size, delta.shape)
    expected = out.double() + coefficients[:, None].double() * (x.double() @ dense.T.double())
    sparse_product(x.numpy(), delta, coefficients.numpy(), out.numpy())
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_count_the_kept_entries_before_each_chunk(shape):
    delta, dense = random_delta(shape, 0.4)
    expected = [int((dense[:row] != 0).sum()) for row in range(0, shape[0], 16)]
    assert row_offsets(delta.mask).tolist() == expected


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_expanded_delta_is_the_dense_matrix(implementation, form, shape, density):
    delta, dense = random_delta(shape, density, form)
    torch.testing.assert_close(torch.from_numpy(expand(delta)), dense, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_equals_the_dense_product(implementation, shape, batch_size):
    assert_product_is_right(*random_delta(shape, 0.2), batch_size)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_product_holds_for_every_density_and_form(implementation, form, shape, density):
    assert_product_is_right(*random_delta(shape, density, form), 2)


def test_empty_rows_and_matrices_add_nothing(implementation):
    delta, dense = random_delta((40, 70), 0.3)
    rows = np.r_[0:18, 39]
    bits = np.unpackbits(delta.mask, axis=1, count=70, bitorder="little").astype(bool)
    negative = (dense.numpy() < 0) & bits
    bits[rows] = False
    signs = np.packbits(negative[bits], bitorder="little")
    thinned = PackedDelta(np.packbits(bits, axis=1, bitorder="little"), 70, signs=signs, scales=delta.scales)
    dense[rows] = 0
    assert_product_is_right(thinned, dense, 2)
    nothing = np.zeros((0, 9), np.uint8)
    no_rows = PackedDelta(nothing, 70, signs=nothing[:, 0], scales=np.zeros(0, np.uint16))
    assert expand(no_rows).shape == (0, 70)
    assert_product_is_right(no_rows, torch.zeros(0, 70), 2)


@pytest.mark.parametrize("shape", [(20, 130), (64, 576)])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_product_is_the_sum_over_experts_of_their_rows(implementation, form, shape):
    pairs = [random_delta(shape, 0.2, form, seed) for seed in range(3)]
    x, _, out = random_batch(7, shape)
    rows = [np.array([5, 0]), np.array([], np.int64), np.array([0, 2, 6, 1, 3])]
    coefficients = [np.array([0.25, 1.0]), np.array([]), np.array([0.75, 1.0, 0.5, 0.3, -2.0])]
    expected = out.clone()
    for (_, dense), group, factors in zip(pairs, rows, coefficients, strict=True):
        for row, factor in zip(group.tolist(), factors.tolist(), strict=True):
            expected[row] += factor * (dense @ x[row])
    untouched = out[4].clone()
    GroupedProduct([delta for delta, _ in pairs], rows, coefficients)(x.numpy(), out.numpy())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[4], untouched, rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_native_product_equals_numpy(monkeypatch, form):
    delta, _ = random_delta((50, 200), 0.2, form)
    x, coefficients, out = random_batch(5, delta.shape)
    slow = out.clone()
    sparse_product(x.numpy(), delta, coefficients.numpy(), out.numpy())
    monkeypatch.setattr(kernels, "native", lambda: None)
    sparse_product(x.numpy(), delta, coefficients.numpy(), slow.numpy())
    torch.testing.assert_close(out, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 5), (33, 65), (64, 576)])
def test_addition_rounds_once_as_torch_does(implementation, shape, form, weight_dtype):
    delta, dense = random_delta(shape, 0.2, form)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(weight_dtype)
    expected = (weight.float() + 0.37 * dense).to(weight_dtype)
    if implementation == "native":
        torch.testing.assert_close(kernels.added(weight, delta, 0.37), expected, rtol=0, atol=0)
    add_to(as_array(weight), delta, 0.37)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_addition_keeps_every_bit_where_nothing_is_kept(implementation, weight_dtype):
    delta, dense = random_delta((20, 130), 0.2)
    weight = torch.tensor([-0.0, float("nan"), float("inf"), 1e-30]).to(weight_dtype).repeat(20 * 130 // 4)
    weight = weight.reshape(20, 130)
    before = weight.clone()
    add_to(as_array(weight), delta, 0.5)
    bits = torch.int32 if weight_dtype == torch.float32 else torch.int16
    apart = dense == 0
    torch.testing.assert_close(weight.view(bits)[apart], before.view(bits)[apart], rtol=0, atol=0)
    expected = (before.float() + 0.5 * dense).to(weight_dtype)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lower_half", [0, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_bfloat16_ties_go_to_even(implementation, lower_half):
    """All exponents, both signs, odd and even last digits; overflow to infinity included."""
    bits = (torch.arange(0, 1 << 16, 2, dtype=torch.int64) << 16) + lower_half
    bits = torch.cat([bits, bits + (1 << 16)]).to(torch.uint32).view(torch.float32)
    values = bits[torch.isfinite(bits)].reshape(1, -1).contiguous()
    mask = np.packbits(np.ones(values.shape, bool), axis=1, bitorder="little")
    delta = PackedDelta(mask, values.shape[1], values=values.flatten().numpy())
    weight = torch.zeros(values.shape, dtype=torch.bfloat16)
    add_to(as_array(weight), delta, 1.0)
    torch.testing.assert_close(weight, values.to(torch.bfloat16), rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (66, 64), (130, 576)])
def test_dense_and_grouped_products_in_one_pass(shape, dtype, with_bias):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(4)) if with_bias else None
    delta, dense = random_delta(shape, 0.2)
    for size in (1, 2, 3, 4, 5, 8, 9):
        x, coefficients, out = random_batch(size, shape)
        rows = np.arange(0, size, 2)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for product in (GroupedProduct([], [], []), GroupedProduct([delta], [rows], [coefficients[::2].numpy()])):
            product.multiply(x, out, weight, bias)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
            expected[::2] += coefficients[::2, None].double() * (x[::2].double() @ dense.T.double())
        for threads in (1, 3):
            alone = torch.empty(1, shape[0])
            GroupedProduct([], [], []).multiply(x[-1:], alone, weight, bias, threads)
            together = torch.empty(size, shape[0])
            GroupedProduct([], [], []).multiply(x, together, weight, bias)
            assert torch.equal(alone[0], together[-1]), "a row depends on the others"


@needs_native
@pytest.mark.parametrize("shape", [(70, 576), (300, 130)])
def test_results_do_not_depend_on_the_number_of_threads(shape):
    delta, _ = random_delta(shape, 0.2)
    x, coefficients, out = random_batch(6, shape)
    results, weights = [], []
    for num_threads in (1, 2, 3, 7):
        total, weight = out.clone(), torch.ones(shape)
        sparse_product(x.numpy(), delta, coefficients.numpy(), total.numpy(), num_threads)
        add_to(weight.numpy(), delta, 0.1, num_threads)
        results.append(total)
        weights.append(weight)
    for total, weight in zip(results, weights, strict=True):
        torch.testing.assert_close(total, results[0], rtol=0, atol=0)
        torch.testing.assert_close(weight, weights[0], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_a_batch_gives_the_same_alone(form):
    delta, _ = random_delta((40, 200), 0.2, form)
    x, coefficients, out = random_batch(7, delta.shape)
    together = out.clone()
    sparse_product(x.numpy(), delta, coefficients.numpy(), together.numpy())
    for row in range(7):
        alone = out[row : row + 1].clone()
        sparse_product(x[row : row + 1].numpy(), delta, coefficients[row : row + 1].numpy(), alone.numpy())
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("own_threads", [False, True], ids=["torch team", "helper threads"])
def test_calls_from_several_python_threads_do_not_mix(own_threads):
    native_kernels.use_own_threads(own_threads)
    pairs = [random_delta((200, 200), 0.2, seed=seed) for seed in range(4)]

    def work(number):
        delta, dense = pairs[number % 4]
        x, coefficients, out = random_batch(3, delta.shape, seed=number)
        expected = out + coefficients[:, None] * (x @ dense.T)
        for _ in range(20):
            result = out.clone()
            sparse_product(x.numpy(), delta, coefficients.numpy(), result.numpy(), 2)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(8)))
    finally:
        native_kernels.use_own_threads(False)


@needs_native
def test_not_kept_inputs_do_not_matter():
    delta, dense = random_delta((4, 64), 0.2)
    x, coefficients, out = random_batch(1, delta.shape)
    free = torch.nonzero((dense == 0).all(dim=0)).flatten()
    assert len(free)
    x[0, free[0]] = float("inf")
    sparse_product(x.numpy(), delta, coefficients.numpy(), out.numpy())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_copies_work_after_the_original_is_gone(implementation, duplicate):
    delta, dense = random_delta((20, 130), 0.2)
    product = GroupedProduct([delta], [np.array([0])], [np.array([1.0])])
    x, _, out = random_batch(1, delta.shape)
    product(x.numpy(), out.clone().numpy())
    product = duplicate(product)
    assert product.deltas[0].mask is not delta.mask
    delta.mask[:] = 0
    expected = out + x @ dense.T
    product(x.numpy(), out.numpy())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_arrays_that_do_not_fit_are_refused(implementation):
    delta, _ = random_delta((20, 130), 0.2)
    with pytest.raises(ValueError, match="signs"):
        PackedDelta(delta.mask, 130, signs=delta.signs[:-1], scales=delta.scales)
    with pytest.raises(ValueError, match="mask"):
        PackedDelta(delta.mask, 140, signs=delta.signs, scales=delta.scales)
    with pytest.raises(ValueError, match="beyond column 129"):
        PackedDelta(np.full_like(delta.mask, 0xFF), 129, signs=delta.signs, scales=delta.scales)
    with pytest.raises(ValueError, match="either signs and scales, or values"):
        PackedDelta(delta.mask, 130, signs=delta.signs)
    with pytest.raises(ValueError, match="row 5 is asked for"):
        GroupedProduct([delta], [np.array([5])], [np.ones(1)])(
            np.ones((2, 130), np.float32), np.ones((2, 20), np.float32)
        )
    with pytest.raises(ValueError, match="must differ"):
        GroupedProduct([delta], [np.array([1, 1])], [np.ones(2)])
    with pytest.raises(ValueError, match="weight"):
        add_to(np.zeros((20, 131), np.float32), delta, 1.0)
    with pytest.raises(ValueError, match="x must be"):
        sparse_product(np.ones((2, 130)), delta, np.ones(2, np.float32), np.ones((2, 20), np.float32))
    frozen = np.zeros((20, 130), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        add_to(frozen, delta, 1.0)


@pytest.mark.parametrize("form", ["sign", "float32"])
def test_memory_that_moves_is_followed(implementation, form):
    """As when a model is handed to another process: its tensors move into shared memory, the old is freed."""
    delta, dense = random_delta((200, 576), 0.2, form)
    held = as_tensors(delta)
    product = GroupedProduct([held], [np.array([0])], [np.array([1.0])])
    x, _, out = random_batch(1, delta.shape)
    expected = out + x @ dense.T
    for _ in range(2):
        result = out.clone()
        product(x.numpy(), result.numpy())
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(expand(held), dense.numpy())
        for name in ("_mask", "_signs", "_scales", "_values"):
            tensor = getattr(held, name)
            if tensor is not None:
                before = tensor.data_ptr()
                tensor.share_memory_()
                assert tensor.data_ptr() != before or tensor.is_shared()
        spoilt = [torch.full((size,), 0x7F, dtype=torch.uint8) for size in (1600, 3200, 14400) for _ in range(200)]
        del spoilt


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    delta, _ = random_delta((200, 576), 0.2)
    x, coefficients, out = random_batch(3, delta.shape)
    expected = out.clone()
    sparse_product(x.numpy(), delta, coefficients.numpy(), expected.numpy(), 2)
    child = os.fork()
    if child == 0:
        try:
            sparse_product(x.numpy(), delta, coefficients.numpy(), out.numpy(), 2)
            os._exit(0 if torch.equal(out, expected) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@needs_native
def test_sums_do_not_go_beyond_what_a_wrong_mask_says():
    """A mask that changed after the delta was made asks for more entries than there are: they count as zeros."""
    delta, _ = random_delta((40, 200), 0.2, "float32")
    delta.mask[:] = 0xFF
    out = np.zeros((1, 40), np.float32)
    sparse_product(np.ones((1, 200), np.float32), delta, np.ones(1), out)
    assert np.isfinite(out).all()


ALL_WARNINGS = "import warnings; warnings.simplefilter('always')\n"


ONE_DELTA = (
    ALL_WARNINGS + "import numpy as np\n"
    "from mediator_peft.kernels import dispatch, native_kernels\n"
    "delta = dispatch.PackedDelta(np.array([[5]], np.uint8), 3, values=np.array([1, 2], np.float32))\n"
)


@pytest.mark.parametrize("fault", ["missing", "other sources", "no such instruction set"])
def test_numpy_steps_in_with_one_warning(fault, program):
    cause = {
        "missing": "native_kernels._LIBRARY_NAMES = ('nowhere.so',)\n",
        "other sources": "native_kernels.source_digest = lambda: 'other'\n",
        "no such instruction set": "import os; os.environ['MEDIATOR_PEFT_ISA'] = 'abacus'\n",
    }[fault]
    done = program.run_code(
        ONE_DELTA + cause + "for _ in range(2): assert dispatch.expand(delta).tolist() == [[1, 0, 2]]\n"
        "assert not dispatch.has_native()\n",
        environment={"MEDIATOR_PEFT_KERNELS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"The native kernels cannot be used") == 1
    assert b"MEDIATOR_PEFT_KERNELS=numpy to silence" in done.stderr


def test_an_implementation_can_be_forced(program):
    check = ONE_DELTA + "assert dispatch.expand(delta).tolist() == [[1, 0, 2]]\nprint(dispatch.has_native())\n"
    done = program.run_code(check, environment={"MEDIATOR_PEFT_KERNELS": "numpy"})
    assert (done.stdout.strip(), done.stderr) == (b"False", b"")
    missing = ONE_DELTA + "native_kernels._LIBRARY_NAMES = ('nowhere.so',)\ndispatch.native()\n"
    done = program.run_code(missing, environment={"MEDIATOR_PEFT_KERNELS": "native"})
    assert b"UnsupportedError" in done.stderr
    done = program.run_code(check, environment={"MEDIATOR_PEFT_KERNELS": "fast"})
    assert b"ConfigError" in done.stderr


def supported(isa):
    """Whether the library here has an instruction set."""
    return kernels.native() is not None and native_kernels.library().mediator_use_isa(isa.encode()) is not None


@needs_native
@pytest.mark.release
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_every_instruction_set_gives_the_same(isa):
    """All tests of kernels, builds' loops and merged weights again, under each that this processor has."""
    try:
        if not supported(isa):
            pytest.skip(f"this processor has no {isa}")
    finally:
        native_kernels.instruction_set()
    tests = [__file__, str(Path(__file__).with_name("test_build_loops.py"))]
    tests.append(str(Path(__file__).parents[1] / "bank" / "test_restoring.py"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not release",
        *tests,
    ]
    environment = {**os.environ, "MEDIATOR_PEFT_ISA": isa, "MEDIATOR_PEFT_KERNELS": "native"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
