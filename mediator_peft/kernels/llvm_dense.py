"""The dense product of a few rows with a stored weight, for the compiled loops: what goes with the deltas' products.

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

from .llvm_intrinsics import pointer_to
from .llvm_ir import (
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
def multiply_rows(weight, stride, dtype, bias, rows, shape, x, x_stride, num_inputs, output, weights, inputs, sums):  # type: ignore[no-untyped-def]
    """``output[:, rows] = x @ weight[rows].T + bias[rows]``.

    Args:
        weight, stride, dtype: address, bytes from row to row, code of what it is stored as.
        bias: address of (O,) float32; 0 for none.
        rows: (first, last) of the weight.
        shape: (O, I); I is a multiple of ``LANES``.
        x, x_stride, num_inputs: address of float32 rows, bytes from row to row, number of them.
        output: pointer to (num_inputs, O) float32.
        weights, inputs: pointers to room for (TILE_ROWS,) and (TILE_INPUTS,) int64.
        sums: pointer to room for (TILE_ROWS, TILE_INPUTS) float32.
    """
    first, last = rows
    num_rows, num_columns = shape
    biases = pointer_to(bias, np.float32(0))
    for row in range(first, last, TILE_ROWS):
        for r in range(TILE_ROWS):
            # Past the end the last row is computed again and not stored.
            weights[r] = weight + min(row + r, last - 1) * stride
        for b0 in range(0, num_inputs, TILE_INPUTS):
            count = min(TILE_INPUTS, num_inputs - b0)
            for b in range(count):
                inputs[b] = x + x_stride * (b0 + b)
            _dot_weights(dtype, count, num_columns // LANES, weights, inputs, sums)
            for r in range(min(TILE_ROWS, last - row)):
                start = biases[row + r] if bias != 0 else np.float32(0)
                for b in range(count):
                    output[(b0 + b) * num_rows + row + r] = start + sums[r * TILE_INPUTS + b]
