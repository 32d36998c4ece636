"""Inner loops of a build, compiled: one look at each entry instead of one for each step.

Each gives bit for bit what the plain steps give that stand beside its call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit, types
from numba.extending import intrinsic

from .llvm_build_ir import MarkedRow, MergedRow, mark_row, merge_row
from .llvm_intrinsics import count_bits, load_word, pointer_to
from .llvm_ir import BFLOAT16, FLOAT32, INT64, deposit, extract

if getattr(config, "DISABLE_JIT", False):
    raise ImportError("numba is switched off by NUMBA_DISABLE_JIT")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True, error_model="numpy", nogil=True)(function)
    except RuntimeError:  # no folder can be written to for the cache
        return njit(error_model="numpy", nogil=True)(function)


@intrinsic
def _merge_row(
    typingctx: Any, sources: Any, num_experts: Any, offset: Any, columns: Any, is_mean: Any, count: Any, backbone: Any
) -> Any:
    """:func:`loops_ir.merge_row`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return merge_row(builder, MergedRow(*args))

    number = types.int64
    return types.float64(number, number, number, number, types.boolean, types.float32, number), generate


@_compiled
def merge_tile(sources, is_mean, shape, backbone, energies):  # type: ignore[no-untyped-def]
    """One tile of bfloat16 weights: subtracted, averaged and rounded; see ``TensorTiles``.

    Args:
        sources: (K + 1,) addresses of the rows of base and experts, bfloat16, each without gaps.
        is_mean: whether the backbone is the mean of the experts; else it is the base.
        shape: (r, I)
        backbone: address of (r, I) bfloat16, written.
        energies: (r,) float64, written: squared norm of each row of the sum of the task vectors.
    """
    rows, columns = shape
    num_experts = sources.size - 1
    for row in range(rows):
        offset = 2 * row * columns
        energies[row] = _merge_row(
            sources.ctypes.data, num_experts, offset, columns, is_mean, np.float32(num_experts), backbone + offset
        )


@intrinsic
def _mark_row(
    typingctx: Any, is_half: Any, minuend: Any, subtrahend: Any, columns: Any, low: Any, high: Any, negative: Any,
    above: Any, inside: Any, sums: Any, slots: Any, slot_bits: Any,
) -> Any:  # fmt: skip
    """:func:`loops_ir.mark_row` for rows of bfloat16 or float32."""
    number = types.int64
    result = types.UniTuple(number, 3)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row = MarkedRow(*args[1:])
        with builder.if_else(args[0]) as (if_half, if_float):
            with if_half:
                of_halves, end_of_halves = mark_row(builder, BFLOAT16, row), builder.block
            with if_float:
                of_floats, end_of_floats = mark_row(builder, FLOAT32, row), builder.block
        found = []
        for half, whole in zip(of_halves, of_floats, strict=True):
            either = builder.phi(INT64)
            either.add_incoming(half, end_of_halves)
            either.add_incoming(whole, end_of_floats)
            found.append(either)
        return context.make_tuple(builder, result, found)

    edge = types.float32
    return result(types.boolean, number, number, number, edge, edge, *[number] * 6), generate


@_compiled
def _lowest_bit(bits):  # type: ignore[no-untyped-def]
    return count_bits((bits & (~bits + np.uint64(1))) - np.uint64(1))


@_compiled
def mark_tile(is_half, shape, jobs, brackets, counts):  # type: ignore[no-untyped-def]
    """Mark some rows of several differences against a bracket each, and sum them up; see ``Marking.add``.

    Args:
        is_half: whether the numbers are bfloat16; else they are float32.
        shape: (r, I)
        jobs: (n, 7) int64, addresses. Read: minuend and subtrahend, (r, I) without gaps. Written, for
            ``minuend - subtrahend``: three bitmaps (r, ceil(I / 8)) uint8, namely signs, magnitudes > high, and other
            magnitudes >= low; (r, 3) float64, for each row the sum of squares, and of magnitudes > high and their
            squares; with room for r * I float32 the magnitudes that lie in the bracket, in order, if low < high.
        brackets: (n, 2) float32, low and high.
        counts: (n, 2) int64, written: how many lie above the bracket, how many in it.
    """
    rows, columns = shape
    row_bytes, item = (columns + 7) // 8, 2 if is_half else 4
    slots, slot_bits = np.empty((columns + 15) // 16 * 16, np.float32), np.empty((columns + 15) // 16, np.uint16)
    for number in range(len(jobs)):
        minuend, subtrahend, negative, above, inside = jobs[number, :5]
        sums, values = jobs[number, 5], pointer_to(jobs[number, 6], np.float32(0))
        num_above, num_inside, num_values = 0, 0, 0
        for row in range(rows):
            place, byte = row * columns * item, row * row_bytes
            num_slots, more_above, more_inside = _mark_row(
                is_half, minuend + place, subtrahend + place, columns, brackets[number, 0], brackets[number, 1],
                negative + byte, above + byte, inside + byte, sums + 24 * row, slots.ctypes.data, slot_bits.ctypes.data,
            )  # fmt: skip
            num_above += more_above
            num_inside += more_inside
            for slot in range(num_slots):
                found = np.uint64(slot_bits[slot])
                while found != 0:
                    values[num_values] = slots[16 * slot + _lowest_bit(found)]
                    num_values += 1
                    found &= found - np.uint64(1)
        counts[number, 0], counts[number, 1] = num_above, num_inside


@intrinsic
def _extract(typingctx: Any, bits: Any, mask: Any) -> Any:
    """:func:`kernels_ir.extract`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return extract(context, builder, args[0], args[1])

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _deposit(typingctx: Any, bits: Any, mask: Any) -> Any:
    """:func:`kernels_ir.deposit`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return deposit(context, builder, args[0], args[1])

    return types.uint64(types.uint64, types.uint64), generate


@_compiled
def _partial_word(bitmap, start):  # type: ignore[no-untyped-def]
    """The bytes of a bitmap from ``start`` on, fewer than eight."""
    word = np.uint64(0)
    for index in range(start, bitmap.size):
        word |= np.uint64(bitmap[index]) << np.uint64(8 * (index - start))
    return word


@_compiled
def take_bits(bitmap, mask, target):  # type: ignore[no-untyped-def]
    """The bits of ``bitmap`` that stand where ``mask`` has ones, closed up; see ``kept_bits``.

    Args:
        bitmap, mask: (n,) uint8
        target: (m,) uint64 with room for all of them, written.
    """
    words = mask.size // 8
    word, held, place = np.uint64(0), 0, 0
    for index in range(words + 1):
        if index < words:
            ones, bits = load_word(mask.ctypes.data + 8 * index), load_word(bitmap.ctypes.data + 8 * index)
        else:
            ones, bits = _partial_word(mask, 8 * words), _partial_word(bitmap, 8 * words)
        taken = _extract(bits, ones)
        count = count_bits(ones)
        word |= taken << np.uint64(held)
        held += count
        if held >= 64:
            target[place] = word
            place += 1
            held -= 64
            # A shift by 64 is undefined.
            word = taken >> np.uint64(count - held) if held else np.uint64(0)
    if held:
        target[place] = word


@_compiled
def put_bits(bits, mask):  # type: ignore[no-untyped-def]
    """The reverse of :func:`take_bits`: bits that follow each other, where ``mask`` has ones; see ``choose``.

    Args:
        bits: (m,) uint8, with 9 bytes more than there are bits for.
        mask: (n,) uint8, written over; its zeros stay zeros.
    """
    words, place = mask.size // 8, 0
    whole = pointer_to(mask.ctypes.data, np.uint64(0))
    for index in range(words + 1):
        ones = load_word(mask.ctypes.data + 8 * index) if index < words else _partial_word(mask, 8 * words)
        shift = np.uint64(place & 7)
        # A shift by 64 is undefined, so the ninth byte moves by one bit and by the rest.
        ninth = (np.uint64(bits[(place >> 3) + 8]) << np.uint64(1)) << (np.uint64(63) - shift)
        put = _deposit((load_word(bits.ctypes.data + (place >> 3)) >> shift) | ninth, ones)
        if index < words:
            whole[index] = put
        for byte in range(8 * words, mask.size if index == words else 0):
            mask[byte] = np.uint8((put >> np.uint64(8 * (byte - 8 * words))) & np.uint64(255))
        place += count_bits(ones)
