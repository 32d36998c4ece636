"""Compiled twins of the numpy kernels: loops over packed deltas, run in torch's own threads (``kernels_team``).

Threads take chunks of rows from a counter; a chunk is computed by one thread in a fixed order, so the
result does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

from .llvm_dense import multiply_rows
from .llvm_intrinsics import (
    add_signs,
    add_values,
    count_bits,
    dot_signs,
    dot_values,
    load_word,
    local_numbers,
    pointer_to,
    take_next,
    widened,
)
from .llvm_ir import BFLOAT16, FLOAT16, FLOAT32, SIGN, TILE_INPUTS, TILE_ROWS, is_processor_supported
from .llvm_team import Kernel, compiled, run
from .numpy_kernels import CHUNK_ROWS, Array

if getattr(config, "DISABLE_JIT", False):
    raise ImportError("numba is switched off by NUMBA_DISABLE_JIT")
if not is_processor_supported():
    raise ImportError("this processor is not supported by the compiled loops")

FORMS = {"sign": SIGN, "float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16}
"""Codes by name of the dtype; bfloat16 comes as the uint16 with its bits."""

# Numbers that describe one delta and its rows of the batch; addresses and lengths in bytes.
MASK, MASK_BYTES, SOURCE, SOURCE_BYTES, SCALES, OFFSETS, FORM, ROWS, COEFFICIENTS, NUM_INPUTS = range(10)
DELTA_FIELDS = 10
# Numbers that describe one call.
COUNTER, NUM_CHUNKS, NUM_ROWS, NUM_COLUMNS, TABLE, NUM_DELTAS = range(6)
INPUT, INPUT_STRIDE, BATCH_SIZE, OUTPUT, OUTPUT_STRIDE, DTYPE = range(6, 12)
WEIGHT, WEIGHT_STRIDE, WEIGHT_DTYPE, BIAS = range(12, 16)
JOB_FIELDS = 16

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_TILE_SUMS = TILE_ROWS * TILE_INPUTS


@njit
def last_word_of(num_columns):  # type: ignore[no-untyped-def]
    """Bits of a row's last word that are columns."""
    used = num_columns & 63
    return _ALL if used == 0 else (np.uint64(1) << np.uint64(used)) - np.uint64(1)


@njit
def _copy_bytes(address, count, target, room):  # type: ignore[no-untyped-def]
    """Copy ``count`` bytes and fill the rest of the room with zeros."""
    old, new = pointer_to(address, np.uint8(0)), pointer_to(target, np.uint8(0))
    for index in range(room):
        new[index] = old[index] if index < count else np.uint8(0)


@njit
def _copy_row(address, num_bytes, target):  # type: ignore[no-untyped-def]
    """Copy one row of a weight."""
    old, new = pointer_to(address, np.uint8(0)), pointer_to(target, np.uint8(0))
    for index in range(num_bytes):
        new[index] = old[index]


@njit
def open_tile(job, delta, row, position, starts, scratch):  # type: ignore[no-untyped-def]
    """Where masks and entries of ``TILE_ROWS`` rows can be read in whole words.

    Near the end of an array a word would reach beyond it: there the bytes are copied to ``scratch``. Rows past the
    matrix are empty. ``starts`` receives the number of each row's first kept entry, counted from the second address.

    Returns:
        (address of the masks, of the signs or values, number of the first kept entry after the tile)
    """
    num_columns = job[NUM_COLUMNS]
    stride, num_words, room = (num_columns + 7) // 8, (num_columns + 63) // 64, tile_bytes(num_columns)
    mask, source = delta[MASK] + row * stride, delta[SOURCE]
    if (row + TILE_ROWS) * stride + 8 > delta[MASK_BYTES]:
        _copy_bytes(mask, min(TILE_ROWS, job[NUM_ROWS] - row) * stride, scratch, room)
        mask = scratch
    end = position
    for r in range(TILE_ROWS):
        starts[r] = end
        for word in range(num_words - 1):
            end += count_bits(load_word(mask + r * stride + 8 * word))
        end += count_bits(load_word(mask + r * stride + 8 * (num_words - 1)) & last_word_of(num_columns))
    if delta[FORM] == SIGN and (end >> 3) + 9 > delta[SOURCE_BYTES]:
        first = position >> 3
        _copy_bytes(source + first, delta[SOURCE_BYTES] - first, scratch + room, room)
        source = scratch + room
        for r in range(TILE_ROWS):
            starts[r] -= 8 * first
    return mask, source, end


@njit
def tile_bytes(num_columns):  # type: ignore[no-untyped-def]
    """Bytes of the masks of a tile, or of its signs at most, with a word to spare."""
    return TILE_ROWS * ((num_columns + 7) // 8) + 16


@njit
def _add_tile(dot_rows, job, delta, row, mask, source, starts, inputs, sums):  # type: ignore[no-untyped-def]
    """Add the products of one delta's tile with all its rows of the batch to the output."""
    num_rows, num_columns, form = job[NUM_ROWS], job[NUM_COLUMNS], delta[FORM]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, last_word_of(num_columns)
    batch_rows = pointer_to(delta[ROWS], np.int64(0))
    coefficients = pointer_to(delta[COEFFICIENTS], np.float32(0))
    scales = pointer_to(delta[SCALES], np.uint16(0))
    output = pointer_to(job[OUTPUT], np.float32(0))
    for first in range(0, delta[NUM_INPUTS], TILE_INPUTS):
        count = min(TILE_INPUTS, delta[NUM_INPUTS] - first)
        for b in range(count):
            inputs[b] = job[INPUT] + job[INPUT_STRIDE] * batch_rows[first + b]
        dot_rows(form, count, mask, stride, num_words, last_word, source, starts, inputs, sums)
        for b in range(count):
            place = batch_rows[first + b] * num_rows + row
            for r in range(min(TILE_ROWS, num_rows - row)):
                scale = widened(scales[row + r]) if form == SIGN else np.float32(1)
                output[place + r] += coefficients[first + b] * scale * sums[r * TILE_INPUTS + b]


@njit
def _product(job, dot_rows, stamp):  # type: ignore[no-untyped-def]
    """Dense and grouped product of one call, or one thread's share of it."""
    weights, shape = local_numbers(TILE_ROWS, np.int64(0)), (job[NUM_ROWS], job[NUM_COLUMNS])
    scratch = np.empty(2 * tile_bytes(job[NUM_COLUMNS]), np.uint8)
    starts, inputs = local_numbers(TILE_ROWS, np.int64(0)), local_numbers(TILE_INPUTS, np.int64(0))
    sums = local_numbers(_TILE_SUMS, np.float32(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        first, last = chunk * CHUNK_ROWS, min(job[NUM_ROWS], (chunk + 1) * CHUNK_ROWS)
        if job[WEIGHT] != 0:
            multiply_rows(
                job[WEIGHT],
                job[WEIGHT_STRIDE],
                job[WEIGHT_DTYPE],
                job[BIAS],
                (first, last),
                shape,
                job[INPUT],
                job[INPUT_STRIDE],
                job[BATCH_SIZE],
                pointer_to(job[OUTPUT], np.float32(0)),
                weights,
                inputs,
                sums,
            )
        for index in range(job[NUM_DELTAS]):
            delta = pointer_to(job[TABLE] + 8 * DELTA_FIELDS * index, np.int64(0))
            position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
            for row in range(first, last, TILE_ROWS):
                mask, source, end = open_tile(job, delta, row, position, starts, scratch.ctypes.data)
                _add_tile(dot_rows, job, delta, row, mask, source, starts, inputs, sums)
                position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


@njit
def _addition(job, add_row, stamp):  # type: ignore[no-untyped-def]
    """``weight += coefficient * delta`` of one call, or one thread's share of it."""
    delta = pointer_to(job[TABLE], np.int64(0))
    coefficient = pointer_to(delta[COEFFICIENTS], np.float32(0))[0]
    scales = pointer_to(delta[SCALES], np.uint16(0))
    form, num_rows, num_columns = delta[FORM], job[NUM_ROWS], job[NUM_COLUMNS]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, last_word_of(num_columns)
    scratch, starts = np.empty(2 * tile_bytes(num_columns), np.uint8), local_numbers(TILE_ROWS, np.int64(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
        for tile in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            mask, source, end = open_tile(job, delta, tile, position, starts, scratch.ctypes.data)
            for r in range(min(TILE_ROWS, num_rows - tile)):
                factor = coefficient * widened(scales[tile + r]) if form == SIGN else coefficient
                place = (tile + r) * job[OUTPUT_STRIDE]
                target, row_mask = job[OUTPUT] + place, mask + r * stride
                if job[INPUT] != 0:
                    _copy_row(job[INPUT] + place, job[INPUT_STRIDE], target)
                add_row(form, job[DTYPE], row_mask, num_words, last_word, source, starts[r], factor, target)
            position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


def _kernels(stamp: int) -> dict[tuple[str, bool], Kernel]:
    """The C functions, by what they do and whether the delta has signs.

    Numba's cache on disk looks at this file and at ``stamp``, which stands for the files that the loops are made from.
    """

    @compiled
    def sign_product(job):  # type: ignore[no-untyped-def]
        _product(job, dot_signs, stamp)

    @compiled
    def value_product(job):  # type: ignore[no-untyped-def]
        _product(job, dot_values, stamp)

    @compiled
    def sign_addition(job):  # type: ignore[no-untyped-def]
        _addition(job, add_signs, stamp)

    @compiled
    def value_addition(job):  # type: ignore[no-untyped-def]
        _addition(job, add_values, stamp)

    return {
        ("product", True): sign_product,
        ("product", False): value_product,
        ("addition", True): sign_addition,
        ("addition", False): value_addition,
    }


def source_stamp() -> int:
    """A number that changes with the code of the other files."""
    digest = sha256()
    for part in ("dense", "fold_ir", "intrinsics", "ir", "numba"):
        digest.update(Path(__file__).with_name(f"llvm_{part}.py").read_bytes())
    return int.from_bytes(digest.digest()[:6], "little")


KERNELS = _kernels(source_stamp())


def table(mask: Array, form: str, source: Array, scales: Array | None, offsets: Array) -> NDArray[np.int64]:
    """One delta as a kernel sees it: (DELTA_FIELDS,). The arrays must outlive it.

    Args:
        mask: (O, ceil(I / 8)) uint8
        form: a key of ``FORMS``.
        source: signs or values, 1-D.
        scales: (O,) uint16, the bits of bfloat16; None unless the form is ``"sign"``.
        offsets: (ceil(O / CHUNK_ROWS),) int32
    """
    fields = np.zeros(DELTA_FIELDS, np.int64)
    fields[MASK], fields[MASK_BYTES] = mask.ctypes.data, mask.nbytes
    fields[SOURCE], fields[SOURCE_BYTES] = source.ctypes.data, source.nbytes
    fields[SCALES] = 0 if scales is None else scales.ctypes.data
    fields[OFFSETS], fields[FORM] = offsets.ctypes.data, FORMS[form]
    return fields


def grouped_table(
    deltas: Sequence[NDArray[np.int64]], rows: Sequence[Array], coefficients: Sequence[Array]
) -> NDArray[np.int64]:
    """Deltas with their rows of the batch: (E, DELTA_FIELDS). The arrays must outlive it.

    Args:
        deltas: E results of :func:`table`, of one shape.
        rows: E arrays (B_e,) int64.
        coefficients: E arrays (B_e,) float32.
    """
    fields = np.array(deltas, np.int64).reshape(len(deltas), DELTA_FIELDS)
    for entry, group_rows, group_coefficients in zip(fields, rows, coefficients, strict=True):
        entry[ROWS], entry[NUM_INPUTS] = group_rows.ctypes.data, len(group_rows)
        entry[COEFFICIENTS] = group_coefficients.ctypes.data
    return fields


def product_job(
    fields: NDArray[np.int64], shape: tuple[int, int], weight: Array | None = None, bias: Array | None = None
) -> NDArray[np.int64]:
    """A grouped product, but for input and output: (JOB_FIELDS,). The arrays must outlive it.

    Args:
        fields: (E, DELTA_FIELDS), from :func:`grouped_table`; all signs or all values.
        shape: (O, I) of the deltas.
        weight: (O, I) float32, float16 or uint16, I a multiple of 16: the output is set to the product with it first.
        bias: (O,) float32, goes with the weight.
    """
    job = make_job(shape, fields)
    if weight is not None:
        job[WEIGHT], job[WEIGHT_STRIDE] = weight.ctypes.data, weight.strides[0]
        job[WEIGHT_DTYPE] = FORMS[weight.dtype.name]
        job[BIAS] = 0 if bias is None else bias.ctypes.data
    return job


def run_product(
    job: NDArray[np.int64], is_sign: bool, x: tuple[int, int], batch_size: int, output: int, num_threads: int
) -> None:
    """Run a job from :func:`product_job`, which may be in use by other threads.

    Args:
        job: (JOB_FIELDS,)
        is_sign: whether its deltas have signs.
        x: address of float32 rows, readable in whole words of 64 numbers; and bytes from row to row.
        batch_size: how many rows.
        output: address of (batch_size, O) float32.
        num_threads: most threads to use.
    """
    job = job.copy()
    (job[INPUT], job[INPUT_STRIDE]), job[BATCH_SIZE], job[OUTPUT] = x, batch_size, output
    num_entries = int(job[NUM_ROWS] * job[NUM_COLUMNS]) * (int(job[NUM_DELTAS]) + bool(job[WEIGHT]))
    run(KERNELS["product", is_sign], job, int(job[NUM_CHUNKS]), num_entries, num_threads)


def add_to(
    weight: Array, fields: NDArray[np.int64], coefficient: float, num_threads: int, source: Array | None = None
) -> None:
    """``weight += coefficient * S``, at the kept entries only; or ``weight = source + coefficient * S``.

    Args:
        weight: (O, I) float32, float16 or uint16 (the bits of bfloat16).
        fields: (DELTA_FIELDS,), from :func:`table`.
        coefficient: one number.
        num_threads: most threads to use.
        source: contiguous, of the weight's shape and dtype.
    """
    factor = np.array([coefficient], np.float32)
    fields = fields.copy()
    fields[COEFFICIENTS] = factor.ctypes.data
    job = make_job((weight.shape[0], weight.shape[1]), fields.reshape(1, -1))
    job[OUTPUT] = weight.ctypes.data
    if source is not None:
        job[INPUT], job[INPUT_STRIDE] = source.ctypes.data, weight.strides[0]
    job[OUTPUT_STRIDE], job[DTYPE] = weight.strides[0], FORMS[weight.dtype.name]
    kernel = KERNELS["addition", bool(fields[FORM] == SIGN)]
    run(kernel, job, int(job[NUM_CHUNKS]), weight.size, num_threads)


def make_job(shape: tuple[int, int], fields: NDArray[np.int64]) -> NDArray[np.int64]:
    job = np.zeros(JOB_FIELDS, np.int64)
    job[NUM_CHUNKS] = -(-shape[0] // CHUNK_ROWS)
    job[NUM_ROWS], job[NUM_COLUMNS] = shape
    job[TABLE], job[NUM_DELTAS] = fields.ctypes.data, len(fields)
    return job
