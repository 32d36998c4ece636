"""Functions that compiled loops over packed deltas call, generated for the processor at hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .llvm_ir import (
    DTYPES,
    FLOAT,
    FLOATS,
    INT32,
    INT64,
    ITEM_SIZE,
    LANES,
    SIGN,
    TILE_INPUTS,
    TILE_ROWS,
    VECTOR_NAME,
    VECTOR_TYPE,
    Entries,
    at,
    broadcast,
    call_llvm,
    constant,
    from_float,
    lane_sum,
    load_item,
    load_mask,
    splat,
    to_float,
)


@intrinsic
def load_word(typingctx: Any, address: Any) -> Any:
    """The 64 bits at an address, which need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(at(builder, args[0], constant(0)), typ=INT64, align=1)

    return types.uint64(types.int64), generate


@intrinsic
def count_bits(typingctx: Any, word: Any) -> Any:
    """Number of set bits of a 64-bit word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call_llvm(builder, "llvm.ctpop.i64", INT64, args)

    return types.int64(types.uint64), generate


@intrinsic
def take_next(typingctx: Any, counter: Any) -> Any:
    """Atomic ``counter[0]++`` on an int64 pointer; returns the value before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], constant(1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic(prefer_literal=True)
def local_numbers(typingctx: Any, count: Any, like: Any) -> Any:
    """Pointer to ``count`` (a literal) numbers of the type of ``like``; they live while the calling function runs."""
    size = ir.Constant(INT32, count.literal_value)
    like = types.unliteral(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.alloca_once(builder, context.get_value_type(like), size=size)

    return types.CPointer(like)(count, like), generate


@intrinsic
def pointer_to(typingctx: Any, address: Any, like: Any) -> Any:
    """Pointer at an address to numbers of the type of ``like``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


@intrinsic
def widened(typingctx: Any, bits: Any) -> Any:
    """The float32 number whose upper half these bits are: a bfloat16 number, as uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(types.uint16), generate


def named(function: Any, kind: str) -> Any:
    """The function as an intrinsic, under a name of its own.

    Numba builds the symbols of the functions that take it as an argument from its name: under one name, the loops for
    signs and for values would be taken for one another.
    """
    function.__name__ = f"{function.__name__}_of_{kind}"
    return intrinsic(function)


def _add_row_for(kind: str, forms: Sequence[int]) -> Any:
    def add_row(
        typingctx: Any,
        form: Any,
        dtype: Any,
        mask: Any,
        num_words: Any,
        last_word: Any,
        source: Any,
        position: Any,
        factor: Any,
        target: Any,
    ) -> Any:
        """``target[j] += factor * entry[j]`` at the kept entries j of one row; other places are not written.

        Computed in float32 (product rounded, then sum), then rounded once.

        Args:
            form, dtype: codes of the delta's entries and of the target.
            mask, num_words, last_word: address of the row's mask, its words, what its last word is masked with.
            source, position: address of the matrix's signs or values, number of the row's first kept entry.
            factor: float32
            target: address of the row's first number.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for form_code, type_code in product(forms, DTYPES):
                right_form = builder.icmp_signed("==", args[0], constant(form_code))
                right_type = builder.icmp_signed("==", args[1], constant(type_code))
                with builder.if_then(builder.and_(right_form, right_type)):
                    _add_row(context, builder, form_code, type_code, *args[2:])
            return context.get_dummy_value()

        number, word = types.int64, types.uint64
        return types.void(number, number, number, number, word, number, number, types.float32, number), generate

    return named(add_row, kind)


def _add_row(
    context: Any,
    builder: Any,
    form: int,
    dtype: int,
    mask: Any,
    num_words: Any,
    last_word: Any,
    source: Any,
    position: Any,
    factor: Any,
    target: Any,
) -> None:
    """:func:`add_row` for one form and dtype."""
    storage, suffix, size = VECTOR_TYPE[dtype], VECTOR_NAME[dtype], ITEM_SIZE[dtype]
    factors, align, zeros = broadcast(builder, factor), ir.Constant(INT32, size), ir.Constant(storage, None)
    place = cgutils.alloca_once_value(builder, position)
    with cgutils.for_range(builder, num_words) as loop:
        word = load_mask(builder, mask, loop.index, num_words, last_word)
        entries = Entries(context, builder, form, word, source, place)
        for index in range(4):
            kept, values = entries.quarter(index)
            column = builder.add(builder.shl(loop.index, constant(6)), constant(LANES * index))
            pointer = at(builder, target, builder.mul(column, constant(size)))
            old = call_llvm(builder, f"llvm.masked.load.{suffix}.p0", storage, [pointer, align, kept, zeros])
            new = builder.fadd(to_float(builder, old, dtype), builder.fmul(factors, values))
            new = from_float(builder, new, dtype)
            call_llvm(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [new, pointer, align, kept])


def _dot_rows_for(kind: str, forms: Sequence[int]) -> Any:
    def dot_rows(
        typingctx: Any,
        form: Any,
        num_inputs: Any,
        mask: Any,
        mask_stride: Any,
        num_words: Any,
        last_word: Any,
        source: Any,
        positions: Any,
        inputs: Any,
        sums: Any,
    ) -> Any:
        """Products of ``TILE_ROWS`` rows of a delta with up to ``TILE_INPUTS`` input vectors, without scales.

        The order of a sum does not depend on ``num_inputs``: a row of a batch gives the same alone.

        Args:
            form: code of the delta's entries.
            num_inputs: from 1 to ``TILE_INPUTS``.
            mask, mask_stride: address of the first row's mask and bytes from row to row.
            num_words, last_word: words of a row, what its last word is masked with.
            source: address of the matrix's signs or values.
            positions: pointer to (TILE_ROWS,) int64, number of each row's first kept entry.
            inputs: pointer to (num_inputs,) int64, addresses of float32 vectors of ``64 * num_words`` numbers.
            sums: pointer to (TILE_ROWS, TILE_INPUTS) float32; the first ``num_inputs`` columns are overwritten.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for form_code, columns in product(forms, range(1, TILE_INPUTS + 1)):
                right_form = builder.icmp_signed("==", args[0], constant(form_code))
                right_count = builder.icmp_signed("==", args[1], constant(columns))
                with builder.if_then(builder.and_(right_form, right_count)):
                    _dot_rows(context, builder, form_code, columns, *args[2:])
            return context.get_dummy_value()

        number, places = types.int64, types.CPointer(types.int64)
        word, floats = types.uint64, types.CPointer(types.float32)
        return types.void(number, number, number, number, number, word, number, places, places, floats), generate

    return named(dot_rows, kind)


def _dot_rows(
    context: Any,
    builder: Any,
    form: int,
    columns: int,
    mask: Any,
    stride: Any,
    num_words: Any,
    last_word: Any,
    source: Any,
    positions: Any,
    inputs: Any,
    sums: Any,
) -> None:
    """:func:`dot_rows` for one form and number of inputs: all sums stay in registers."""
    places = [cgutils.alloca_once_value(builder, load_item(builder, positions, r)) for r in range(TILE_ROWS)]
    masks = [builder.add(mask, builder.mul(stride, constant(r))) for r in range(TILE_ROWS)]
    vectors = [load_item(builder, inputs, b) for b in range(columns)]
    totals = [[cgutils.alloca_once_value(builder, splat(0.0)) for _ in range(columns)] for _ in range(TILE_ROWS)]
    with cgutils.for_range(builder, num_words) as loop:
        words = [load_mask(builder, row_mask, loop.index, num_words, last_word) for row_mask in masks]
        entries = [
            Entries(context, builder, form, word, source, place) for word, place in zip(words, places, strict=True)
        ]
        for index in range(4):
            offset = builder.add(builder.shl(loop.index, constant(8)), constant(4 * LANES * index))
            x = [builder.load(at(builder, vector, offset), typ=FLOATS, align=4) for vector in vectors]
            for r in range(TILE_ROWS):
                kept, values = entries[r].quarter(index)
                for b in range(columns):
                    old = builder.load(totals[r][b])
                    new = call_llvm(builder, "llvm.fma.v16f32", FLOATS, [values, x[b], old])
                    # Entries that are not kept leave the sum alone, whatever the input holds there.
                    builder.store(builder.select(kept, new, old), totals[r][b])
    for r, b in product(range(TILE_ROWS), range(columns)):
        total = lane_sum(builder, builder.load(totals[r][b]))
        builder.store(total, builder.gep(sums, [constant(r * TILE_INPUTS + b)], source_etype=FLOAT))


# One set of loops for each kind of delta: compiling takes seconds, and most programs need one kind only.
add_signs, add_values = _add_row_for("signs", (SIGN,)), _add_row_for("values", DTYPES)
dot_signs, dot_values = _dot_rows_for("signs", (SIGN,)), _dot_rows_for("values", DTYPES)
