"""Inner loops of a build, compiled: one look at each entry instead of one for each step.

Each gives bit for bit what the plain steps give that stand beside its call; what is summed up is not touched here, so
that no sum depends on how it was computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from ..bank.kernels_intrinsics import count_bits, pointer_to
from ..bank.kernels_ir import (
    BFLOAT16,
    FLOATS,
    INT64,
    LANES,
    VECTOR_TYPE,
    at,
    broadcast,
    call_llvm,
    constant,
    from_float,
    splat,
    to_float,
)

if getattr(config, "DISABLE_JIT", False):
    raise ImportError("numba is switched off by NUMBA_DISABLE_JIT")

_SHORTS = ir.IntType(LANES)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True, error_model="numpy", nogil=True)(function)
    except RuntimeError:  # no folder can be written to for the cache
        return njit(error_model="numpy", nogil=True)(function)


def _mark(builder: Any, delta: Any, low: Any, high: Any, targets: Any) -> tuple[Any, Any, Any]:
    """Bits of ``LANES`` values: negative, above the bracket, reaching it; written to three addresses.

    Returns:
        (magnitudes, which are above, a bit for each that lies in the bracket)
    """
    magnitude = call_llvm(builder, f"llvm.fabs.v{LANES}f32", FLOATS, [delta])
    negative = builder.fcmp_ordered("<", delta, splat(0.0))
    above = builder.fcmp_ordered(">", magnitude, broadcast(builder, high))
    reach = builder.fcmp_ordered(">=", magnitude, broadcast(builder, low))
    for found, target in zip((negative, above, reach), targets, strict=True):
        builder.store(builder.bitcast(found, _SHORTS), at(builder, target, constant(0)), align=1)
    inside = builder.zext(builder.bitcast(builder.xor(above, reach), _SHORTS), INT64)
    return magnitude, above, inside


def _load(builder: Any, address: Any) -> Any:
    return builder.load(at(builder, address, constant(0)), typ=FLOATS, align=4)


@intrinsic
def _mark_values(typingctx: Any, values: Any, low: Any, high: Any, negative: Any, above: Any, reach: Any) -> Any:
    """Mark ``LANES`` values at an address; a bit for each in the bracket."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _mark(builder, _load(builder, args[0]), args[1], args[2], args[3:])[2]

    number = types.int64
    return types.uint64(number, types.float32, types.float32, number, number, number), generate


@intrinsic
def _mark_differences(
    typingctx: Any, minuend: Any, subtrahend: Any, low: Any, high: Any, negative: Any, above: Any, reach: Any,
    delta: Any, kept: Any,
) -> Any:  # fmt: skip
    """Mark ``LANES`` differences; write them, and their magnitudes above the bracket, to two more addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        difference = builder.fsub(_load(builder, args[0]), _load(builder, args[1]))
        magnitude, above, inside = _mark(builder, difference, args[2], args[3], args[4:7])
        builder.store(difference, at(builder, args[7], constant(0)), align=4)
        kept = builder.select(above, magnitude, splat(0.0))
        builder.store(kept, at(builder, args[8], constant(0)), align=4)
        return inside

    number = types.int64
    signature = types.uint64(number, number, types.float32, types.float32, *[number] * 5)
    return signature, generate


@_compiled
def _lowest_bit(bits):  # type: ignore[no-untyped-def]
    return count_bits((bits & (~bits + np.uint64(1))) - np.uint64(1))


@_compiled
def mark_values(values, low, high, negative, above, reach, inside):  # type: ignore[no-untyped-def]
    """Mark the rows of a matrix against a bracket; see ``TopSelection.add``.

    Args:
        values: (r, I) float32
        low, high: float32, of the bracket.
        negative, above, reach: (r, ceil(I / 8)) uint8, written: signs, magnitudes > high, magnitudes >= low.
        inside: (r * I,) float32, written: the magnitudes in the bracket, in order.

    Returns:
        How many those are.
    """
    rows, columns = values.shape
    count = 0
    for row in range(rows):
        first, byte = values[row].ctypes.data, 0
        for start in range(0, columns - 15, 16):
            byte = start >> 3
            found = _mark_values(
                first + 4 * start,
                low,
                high,
                negative[row].ctypes.data + byte,
                above[row].ctypes.data + byte,
                reach[row].ctypes.data + byte,
            )
            while found != 0:
                inside[count] = abs(values[row, start + _lowest_bit(found)])
                count += 1
                found &= found - np.uint64(1)
        for start in range(columns // 16 * 16, columns, 8):
            bits, more_bits, signs = 0, 0, 0
            for column in range(start, min(start + 8, columns)):
                value = values[row, column]
                bit, magnitude = 1 << (column & 7), abs(value)
                signs |= bit * (value < 0)
                bits |= bit * (magnitude > high)
                more_bits |= bit * (magnitude >= low)
                if magnitude >= low and not magnitude > high:
                    inside[count] = magnitude
                    count += 1
            negative[row, start >> 3], above[row, start >> 3], reach[row, start >> 3] = signs, bits, more_bits
    return count


@_compiled
def mark_differences(minuend, subtrahend, low, high, negative, above, reach, inside, delta, kept):  # type: ignore[no-untyped-def]
    """As :func:`mark_values` for ``minuend - subtrahend``, which is written to ``delta`` (r, I).

    ``kept`` (r, I) receives the magnitudes above the bracket, and 0 elsewhere.
    """
    rows, columns = minuend.shape
    count = 0
    for row in range(rows):
        for start in range(0, columns - 15, 16):
            byte, place = start >> 3, 4 * start
            found = _mark_differences(
                minuend[row].ctypes.data + place,
                subtrahend[row].ctypes.data + place,
                low,
                high,
                negative[row].ctypes.data + byte,
                above[row].ctypes.data + byte,
                reach[row].ctypes.data + byte,
                delta[row].ctypes.data + place,
                kept[row].ctypes.data + place,
            )
            while found != 0:
                inside[count] = abs(delta[row, start + _lowest_bit(found)])
                count += 1
                found &= found - np.uint64(1)
        for start in range(columns // 16 * 16, columns, 8):
            bits, more_bits, signs = 0, 0, 0
            for column in range(start, min(start + 8, columns)):
                value = minuend[row, column] - subtrahend[row, column]
                bit, magnitude = 1 << (column & 7), abs(value)
                signs |= bit * (value < 0)
                bits |= bit * (magnitude > high)
                more_bits |= bit * (magnitude >= low)
                delta[row, column], kept[row, column] = value, magnitude if magnitude > high else np.float32(0)
                if magnitude >= low and not magnitude > high:
                    inside[count] = magnitude
                    count += 1
            negative[row, start >> 3], above[row, start >> 3], reach[row, start >> 3] = signs, bits, more_bits
    return count


@_compiled
def take_bits(bitmap, mask, table, target):  # type: ignore[no-untyped-def]
    """The bits of ``bitmap`` that stand where ``mask`` has ones, closed up; see ``kept_bits``.

    Args:
        bitmap, mask: (n,) uint8
        table: (256, 256) uint8, what :func:`bit_table` gives.
        target: (m,) uint8 with room for all of them, written.
    """
    held, word, place = 0, np.uint64(0), 0
    for index in range(mask.size):
        ones = mask[index]
        word |= np.uint64(table[ones, bitmap[index]]) << np.uint64(held)
        held += count_bits(np.uint64(ones))
        while held >= 8:
            target[place] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)
            held -= 8
            place += 1
    if held > 0:
        target[place] = np.uint8(word)


def bit_table() -> np.ndarray[Any, Any]:
    """[mask, byte] → the bits of the byte where the mask has ones, closed up: (256, 256) uint8."""
    masks, values = np.arange(256)[:, None], np.arange(256)[None, :]
    table, filled = np.zeros((256, 256), np.int64), np.zeros((256, 1), np.int64)
    for bit in range(8):
        has = masks >> bit & 1
        table |= (values >> bit & has) << filled
        filled += has
    return table.astype(np.uint8)


@intrinsic
def _widen(typingctx: Any, source: Any, target: Any) -> Any:
    """``LANES`` numbers of bfloat16 at one address, as float32 at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.load(at(builder, args[0], constant(0)), typ=VECTOR_TYPE[BFLOAT16], align=1)
        builder.store(to_float(builder, stored, BFLOAT16), at(builder, args[1], constant(0)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _subtract(typingctx: Any, weight: Any, base: Any, vector: Any, total: Any, is_first: Any) -> Any:
    """``vector = weight - base; total += vector`` for ``LANES`` numbers at these addresses; the first sets it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.fsub(_load(builder, args[0]), _load(builder, args[1]))
        total = builder.select(args[4], vector, builder.fadd(_load(builder, args[3]), vector))
        builder.store(vector, at(builder, args[2], constant(0)), align=4)
        builder.store(total, at(builder, args[3], constant(0)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.boolean), generate


@intrinsic
def _round(typingctx: Any, total: Any, base: Any, count: Any, is_mean: Any, stored: Any, rounded: Any) -> Any:
    """``total / count + base``, or the base, rounded to bfloat16, for ``LANES`` numbers at these addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _load(builder, args[1])
        mean = builder.fadd(builder.fdiv(_load(builder, args[0]), broadcast(builder, args[2])), base)
        halves = from_float(builder, builder.select(args[3], mean, base), BFLOAT16)
        builder.store(halves, at(builder, args[4], constant(0)), align=1)
        builder.store(to_float(builder, halves, BFLOAT16), at(builder, args[5], constant(0)), align=4)
        return context.get_dummy_value()

    number = types.int64
    return types.void(number, number, types.float32, types.boolean, number, number), generate


@_compiled
def merge_means(sources, is_mean, weights, task_vectors, total, stored, rounded):  # type: ignore[no-untyped-def]
    """One tile of bfloat16 weights: widened, subtracted, averaged and rounded; see ``TensorTiles``.

    Args:
        sources: (K + 1,) addresses of the n numbers of base and experts, bfloat16.
        is_mean: whether the backbone is the mean of the experts; else it is the base.
        weights: (K + 1, n) float32, written.
        task_vectors: (K, n) float32, written.
        total: (n,) float32, written: their sum, in the order of the experts.
        stored: (n,) uint16, written: the bits of the backbone.
        rounded: (n,) float32, written: the backbone.
    """
    num_experts, size = task_vectors.shape
    whole = size // 16 * 16
    count = np.float32(num_experts)
    base, totals, halves, floats = weights.ctypes.data, total.ctypes.data, stored.ctypes.data, rounded.ctypes.data
    vectors = task_vectors.ctypes.data
    for start in range(0, whole, 16):
        place = 4 * start
        _widen(sources[0] + 2 * start, base + place)
        for number in range(num_experts):
            weight = base + 4 * (number + 1) * size + place
            _widen(sources[number + 1] + 2 * start, weight)
            vector = vectors + 4 * number * size + place
            _subtract(weight, base + place, vector, totals + place, number == 0)
        _round(totals + place, base + place, count, is_mean, halves + 2 * start, floats + place)
    weight_bits, rounded_bits = weights.view(np.uint32), rounded.view(np.uint32)
    merged = np.empty(1, np.float32)
    for index in range(whole, size):
        for number in range(num_experts + 1):
            bits = pointer_to(sources[number], np.uint16(0))[index]
            weight_bits[number, index] = np.uint32(bits) << np.uint32(16)
        for number in range(num_experts):
            task_vectors[number, index] = weights[number + 1, index] - weights[0, index]
            vector = task_vectors[number, index]
            total[index] = vector if number == 0 else total[index] + vector
        merged[0] = total[index] / count + weights[0, index] if is_mean else weights[0, index]
        bits = merged.view(np.uint32)[0]
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        stored[index], rounded_bits[index] = bits, bits << np.uint32(16)
