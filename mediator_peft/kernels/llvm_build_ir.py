"""One row of a tile in LLVM's language: 16 entries at a time, with every sum in registers.

A sum over a row is sixteen sums in float32, of the columns 0, 16, 32, ..., of 1, 17, 33, ... and so on, each in order;
these are added up in float64, halves first. ``methods.sparsifying.selection.row_sums`` does the same in numpy. A row is
thought to go on with zeros to a multiple of sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from .llvm_ir import (
    BFLOAT16,
    FLOATS,
    INT32,
    INT64,
    ITEM_SIZE,
    LANES,
    VECTOR_NAME,
    VECTOR_TYPE,
    at,
    broadcast,
    call_llvm,
    constant,
    from_float,
    lane_sum,
    splat,
    to_float,
)

DOUBLE = ir.DoubleType()
_BYTE, _SHORT = ir.IntType(8), ir.IntType(LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_DOUBLES = ir.VectorType(DOUBLE, LANES)
_SLOT_BYTES = 4 * LANES

Group = Callable[[Any, Any], None]
"""Makes the code for 16 columns: (number of the first, how many there are at the end of a row; None for 16)."""


class MarkedRow(NamedTuple):
    """What :func:`mark_row` needs, as values in LLVM; places are addresses."""

    minuend: Any
    subtrahend: Any
    columns: Any
    low: Any
    high: Any
    negative: Any
    above: Any
    inside: Any
    sums: Any
    slots: Any
    slot_bits: Any


def mark_row(builder: Any, form: int, row: MarkedRow) -> list[Any]:
    """Mark one row of ``minuend - subtrahend`` against a bracket, and sum it up; see ``loops_numba.mark_tile``.

    Magnitudes of a group of 16 with an entry in the bracket go to a slot of their own, with a bit for each such entry:
    that needs no jump that a processor could guess wrong. A bracket of one number fills none, as its entries are known.

    Returns:
        Number of slots filled, of entries above the bracket, of entries in it.
    """
    low, high = broadcast(builder, row.low), broadcast(builder, row.high)
    square, above_sum, above_square = (cgutils.alloca_once_value(builder, splat(0.0)) for _ in range(3))
    num_slots, num_above, num_inside = (cgutils.alloca_once_value(builder, constant(0)) for _ in range(3))
    is_wide = builder.fcmp_ordered("!=", row.low, row.high)

    def group(column: Any, rest: Any) -> None:
        delta = builder.fsub(
            load_lanes(builder, form, row.minuend, column, rest),
            load_lanes(builder, form, row.subtrahend, column, rest),
        )
        magnitude = call_llvm(builder, f"llvm.fabs.v{LANES}f32", FLOATS, [delta])
        above = builder.fcmp_ordered(">", magnitude, high)
        inside = builder.xor(above, builder.fcmp_ordered(">=", magnitude, low))
        negative = builder.fcmp_ordered("<", delta, splat(0.0))
        for found, target in ((negative, row.negative), (above, row.above), (inside, row.inside)):
            _store_bits(builder, found, builder.add(target, builder.lshr(column, constant(3))), rest)
        squares = builder.fmul(delta, delta)
        _add_to(builder, square, squares)
        _add_to(builder, above_sum, builder.select(above, magnitude, splat(0.0)))
        _add_to(builder, above_square, builder.select(above, squares, splat(0.0)))
        for found, count in ((above, num_above), (inside, num_inside)):
            ones = call_llvm(builder, f"llvm.ctpop.i{LANES}", _SHORT, [builder.bitcast(found, _SHORT)])
            builder.store(builder.add(builder.load(count), builder.zext(ones, INT64)), count)
        _fill_slot(builder, row, num_slots, magnitude, builder.bitcast(inside, _SHORT), is_wide)

    _each_group(builder, row.columns, group)
    for number, total in enumerate((square, above_sum, above_square)):
        builder.store(_lane_total(builder, total), at(builder, row.sums, constant(8 * number)), align=8)
    return [builder.load(count) for count in (num_slots, num_above, num_inside)]


def _fill_slot(builder: Any, row: MarkedRow, num_slots: Any, magnitude: Any, bits: Any, is_wide: Any) -> None:
    """Write the next slot, and keep it if a bit is set and the bracket wide."""
    place = builder.load(num_slots)
    builder.store(magnitude, at(builder, row.slots, builder.mul(place, constant(_SLOT_BYTES))), align=4)
    builder.store(bits, at(builder, row.slot_bits, builder.mul(place, constant(2))), align=2)
    is_filled = builder.and_(is_wide, builder.icmp_unsigned("!=", bits, ir.Constant(_SHORT, 0)))
    builder.store(builder.add(place, builder.zext(is_filled, INT64)), num_slots)


class MergedRow(NamedTuple):
    """What :func:`merge_row` needs, as values in LLVM; places are addresses."""

    sources: Any
    """Of the addresses of base and experts."""

    num_experts: Any
    offset: Any
    """Bytes from these addresses to the row."""

    columns: Any
    is_mean: Any
    count: Any
    """``num_experts`` as float32."""

    backbone: Any


def merge_row(builder: Any, row: MergedRow) -> Any:
    """Merge one row of bfloat16 numbers into a backbone of such; see ``loops_numba.merge_tile``.

    Returns:
        The squared norm of the sum of the task vectors.
    """
    square = cgutils.alloca_once_value(builder, splat(0.0))
    # What is added to -0.0 stays as it is, even -0.0.
    total = cgutils.alloca_once_value(builder, splat(-0.0))
    base_row = builder.add(builder.load(at(builder, row.sources, constant(0)), typ=INT64), row.offset)
    count = broadcast(builder, row.count)

    def group(column: Any, rest: Any) -> None:
        base = load_lanes(builder, BFLOAT16, base_row, column, rest)
        builder.store(splat(-0.0), total)
        with cgutils.for_range(builder, row.num_experts) as loop:
            place = builder.mul(builder.add(loop.index, constant(1)), constant(8))
            expert_row = builder.add(builder.load(at(builder, row.sources, place), typ=INT64), row.offset)
            _add_to(builder, total, builder.fsub(load_lanes(builder, BFLOAT16, expert_row, column, rest), base))
        whole = builder.load(total)
        _add_to(builder, square, builder.fmul(whole, whole))
        mean = builder.select(row.is_mean, builder.fdiv(whole, count), splat(0.0))
        halves = from_float(builder, builder.fadd(mean, base), BFLOAT16)
        _store_halves(builder, halves, row.backbone, column, rest)

    _each_group(builder, row.columns, group)
    return _lane_total(builder, square)


def _each_group(builder: Any, columns: Any, group: Group) -> None:
    """Code for all columns of a row, 16 by 16, and for what is left at its end."""
    whole = builder.and_(columns, constant(-LANES))
    with cgutils.for_range_slice(builder, constant(0), whole, constant(LANES), INT64) as (column, _):
        group(column, None)
    rest = builder.sub(columns, whole)
    with builder.if_then(builder.icmp_signed(">", rest, constant(0))):
        group(whole, rest)


def _first_lanes(builder: Any, count: Any) -> Any:
    """Booleans, the first ``count`` of 16 true."""
    bits = builder.sub(builder.shl(constant(1), count), constant(1))
    return builder.bitcast(builder.trunc(bits, _SHORT), _BITS)


def load_lanes(builder: Any, form: int, row: Any, column: Any, rest: Any) -> Any:
    """16 numbers of a row as float32; zeros beyond the first ``rest``."""
    size, storage = ITEM_SIZE[form], VECTOR_TYPE[form]
    pointer = at(builder, row, builder.mul(column, constant(size)))
    if rest is None:
        return to_float(builder, builder.load(pointer, typ=storage, align=size), form)
    args = [pointer, ir.Constant(INT32, size), _first_lanes(builder, rest), ir.Constant(storage, None)]
    return to_float(builder, call_llvm(builder, f"llvm.masked.load.{VECTOR_NAME[form]}.p0", storage, args), form)


def _store_halves(builder: Any, halves: Any, row: Any, column: Any, rest: Any) -> None:
    pointer = at(builder, row, builder.shl(column, constant(1)))
    if rest is None:
        builder.store(halves, pointer, align=2)
        return
    args = [halves, pointer, ir.Constant(INT32, 2), _first_lanes(builder, rest)]
    call_llvm(builder, f"llvm.masked.store.{VECTOR_NAME[BFLOAT16]}.p0", ir.VoidType(), args)


def _store_bits(builder: Any, found: Any, target: Any, rest: Any) -> None:
    """Write the bits of 16 booleans; at the end of a row no byte more than there are columns for."""
    bits = builder.bitcast(found, _SHORT)
    if rest is None:
        builder.store(bits, at(builder, target, constant(0)), align=1)
        return
    builder.store(builder.trunc(bits, _BYTE), at(builder, target, constant(0)), align=1)
    with builder.if_then(builder.icmp_signed(">", rest, constant(8))):
        high = builder.trunc(builder.lshr(bits, ir.Constant(_SHORT, 8)), _BYTE)
        builder.store(high, at(builder, target, constant(1)), align=1)


def _add_to(builder: Any, total: Any, values: Any) -> None:
    builder.store(builder.fadd(builder.load(total), values), total)


def _lane_total(builder: Any, total: Any) -> Any:
    return lane_sum(builder, builder.fpext(builder.load(total), _DOUBLES))
