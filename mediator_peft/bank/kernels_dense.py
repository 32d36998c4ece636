"""The dense product of a few rows with a stored weight, as a compiled loop: what a mixed batch needs beside the deltas.

A weight is read from memory once for up to ``TILE_INPUTS`` rows and as it is stored; sums are kept in float32. General
matrix products repack the weight at every call, which for a handful of rows takes longer than the product.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .kernels_intrinsics import local_numbers, pointer_to, take_next
from .kernels_ir import (
    DTYPES,
    FLOAT,
    FLOATS,
    ITEM_SIZE,
    LANES,
    TILE_INPUTS,
    TILE_ROWS,
    VECTOR_TYPE,
    at,
    call_llvm,
    constant,
    lane_sum,
    load_item,
    splat,
    to_float,
)
from .kernels_numba import FORMS, Array, Kernel, _compiled, _run, _source_stamp

CHUNK_ROWS = 64
"""Rows of the weight that a thread takes at a time."""

# Numbers that describe one call; the first two as in ``kernels_numba``.
COUNTER, NUM_CHUNKS, NUM_ROWS, NUM_COLUMNS, WEIGHT, WEIGHT_STRIDE, DTYPE = range(7)
INPUT, NUM_INPUTS, OUTPUT, BIAS = range(7, 11)
JOB_FIELDS = 11
_TILE_SUMS = TILE_ROWS * TILE_INPUTS


@intrinsic
def _dot_weights(
    typingctx: Any, dtype: Any, num_inputs: Any, num_vectors: Any, weights: Any, inputs: Any, sums: Any
) -> Any:
    """Products of ``TILE_ROWS`` rows of a weight with up to ``TILE_INPUTS`` input vectors.

    Args:
        dtype: code of what the weight is stored as.
        num_inputs: from 1 to ``TILE_INPUTS``.
        num_vectors: length of a row in vectors of ``LANES`` numbers.
        weights: pointer to (TILE_ROWS,) int64, addresses of the rows.
        inputs: pointer to (num_inputs,) int64, addresses of float32 vectors.
        sums: pointer to (TILE_ROWS, TILE_INPUTS) float32; the first ``num_inputs`` columns are overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for type_code, columns in product(DTYPES, range(1, TILE_INPUTS + 1)):
            right_type = builder.icmp_signed("==", args[0], constant(type_code))
            right_count = builder.icmp_signed("==", args[1], constant(columns))
            with builder.if_then(builder.and_(right_type, right_count)):
                _dot(builder, type_code, columns, *args[2:])
        return context.get_dummy_value()

    number, places = types.int64, types.CPointer(types.int64)
    return types.void(number, number, number, places, places, types.CPointer(types.float32)), generate


def _dot(builder: Any, dtype: int, columns: int, num_vectors: Any, weights: Any, inputs: Any, sums: Any) -> None:
    """:func:`_dot_weights` for one dtype and number of inputs: all sums stay in registers."""
    rows = [load_item(builder, weights, r) for r in range(TILE_ROWS)]
    vectors = [load_item(builder, inputs, b) for b in range(columns)]
    totals = [[cgutils.alloca_once_value(builder, splat(0.0)) for _ in vectors] for _ in rows]
    with cgutils.for_range(builder, num_vectors) as loop:
        first = builder.mul(loop.index, constant(LANES))
        place = builder.mul(first, constant(ITEM_SIZE[dtype]))
        values = [
            to_float(builder, builder.load(at(builder, row, place), typ=VECTOR_TYPE[dtype], align=1), dtype)
            for row in rows
        ]
        for b, vector in enumerate(vectors):
            x = builder.load(at(builder, vector, builder.mul(first, constant(4))), typ=FLOATS, align=4)
            for r, value in enumerate(values):
                old = builder.load(totals[r][b])
                builder.store(call_llvm(builder, "llvm.fma.v16f32", FLOATS, [value, x, old]), totals[r][b])
    for r, b in product(range(TILE_ROWS), range(columns)):
        total = lane_sum(builder, builder.load(totals[r][b]))
        builder.store(total, builder.gep(sums, [constant(r * TILE_INPUTS + b)], source_etype=FLOAT))


@njit
def _multiply(job, stamp):  # type: ignore[no-untyped-def]
    """``out = x @ weight.T + bias`` of one call, or one thread's share of it."""
    num_rows, num_columns = job[NUM_ROWS], job[NUM_COLUMNS]
    weights, inputs = local_numbers(TILE_ROWS, np.int64(0)), local_numbers(TILE_INPUTS, np.int64(0))
    sums, output = local_numbers(_TILE_SUMS, np.float32(0)), pointer_to(job[OUTPUT], np.float32(0))
    bias = pointer_to(job[BIAS], np.float32(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        for row in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            for r in range(TILE_ROWS):
                # Past the end the last row is computed again and not stored.
                weights[r] = job[WEIGHT] + min(row + r, num_rows - 1) * job[WEIGHT_STRIDE]
            for first in range(0, job[NUM_INPUTS], TILE_INPUTS):
                count = min(TILE_INPUTS, job[NUM_INPUTS] - first)
                for b in range(count):
                    inputs[b] = job[INPUT] + 4 * num_columns * (first + b)
                _dot_weights(job[DTYPE], count, num_columns // LANES, weights, inputs, sums)
                for r in range(min(TILE_ROWS, num_rows - row)):
                    start = bias[row + r] if job[BIAS] != 0 else np.float32(0)
                    for b in range(count):
                        output[(first + b) * num_rows + row + r] = start + sums[r * TILE_INPUTS + b]
        chunk = take_next(job)


def _kernel(stamp: int) -> Kernel:
    @_compiled
    def dense(job):  # type: ignore[no-untyped-def]
        _multiply(job, stamp)

    return dense


KERNEL = _kernel(_source_stamp())


def multiply(weight: Array, bias: Array | None, x: NDArray[np.float32], output: Array, num_threads: int) -> None:
    """``output = x @ weight.T + bias``.

    Args:
        weight: (O, I) float32, float16 or uint16 (the bits of bfloat16); I a multiple of ``LANES``.
        bias: (O,) float32 or None.
        x: (B, I) float32
        output: (B, O) float32
        num_threads: most threads to use.
    """
    job = np.zeros(JOB_FIELDS, np.int64)
    job[NUM_CHUNKS], (job[NUM_ROWS], job[NUM_COLUMNS]) = -(-len(weight) // CHUNK_ROWS), weight.shape
    job[WEIGHT], job[WEIGHT_STRIDE], job[DTYPE] = weight.ctypes.data, weight.strides[0], FORMS[weight.dtype.name]
    job[INPUT], job[NUM_INPUTS], job[OUTPUT] = x.ctypes.data, len(x), output.ctypes.data
    job[BIAS] = 0 if bias is None else bias.ctypes.data
    _run(KERNEL, job, weight.size, num_threads)
