"""Rows of a weight that a delta is written to, for the loops of ``kernels_fold``: subtracting it again, and copying out
what it overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .llvm_intrinsics import named
from .llvm_ir import (
    DTYPES,
    FLOATS,
    INT32,
    INT64,
    LANES,
    SIGN,
    Entries,
    at,
    broadcast,
    call_llvm,
    constant,
    load_mask,
    splat,
)

SAVE, BRING_BACK = range(2)

_I16 = ir.IntType(16)
_WORDS = {4: ir.VectorType(INT32, LANES), 2: ir.VectorType(_I16, LANES)}
_NAMES = {4: "v16i32", 2: "v16i16"}


def _rounded(builder: Any, value: Any, low_bits: Any) -> Any:
    """A float32 vector's bits with the ``low_bits`` lowest rounded away, to nearest even."""
    words = _WORDS[4]

    def everywhere(number: Any) -> Any:
        vector = builder.insert_element(ir.Constant(words, ir.Undefined), number, ir.Constant(INT32, 0))
        return builder.shuffle_vector(vector, vector, ir.Constant(words, [0] * LANES))

    shift = builder.trunc(low_bits, INT32)
    one = ir.Constant(INT32, 1)
    unit = builder.shl(one, shift)
    below_half = builder.sub(builder.lshr(unit, one), one)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, everywhere(shift)), everywhere(one))
    raised = builder.add(bits, builder.add(odd, everywhere(below_half)))
    return builder.and_(raised, everywhere(builder.neg(unit)))


def _row_for(kind: str, forms: Sequence[int]) -> Any:
    def subtract_row(
        typingctx: Any,
        form: Any,
        stores: Any,
        mask: Any,
        num_words: Any,
        last_word: Any,
        source: Any,
        position: Any,
        factor: Any,
        low_bits: Any,
        target: Any,
    ) -> Any:
        """Take ``factor * entry`` out of one float32 row again; or count where that would not bring back its bits.

        Args:
            form: code of the delta's entries.
            stores: 1 to subtract from the row, 0 to try on a row that has not been added to.
            mask, num_words, last_word: address of the row's mask, its words, what its last word is masked with.
            source, position: address of the matrix's signs or values, number of the row's first kept entry.
            factor: float32
            low_bits: how many low bits of the row's own numbers are free, at least 1.
            target: address of the row's first number.

        Returns:
            Number of entries that would differ; 0 when subtracting.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lost = cgutils.alloca_once_value(builder, constant(0))
            for code in forms:
                with builder.if_then(builder.icmp_signed("==", args[0], constant(code))):
                    for stores in (False, True):
                        with builder.if_then(builder.icmp_signed("==", args[1], constant(int(stores)))):
                            _subtract_row(context, builder, code, stores, lost, *args[2:])
            return builder.load(lost)

        number, word = types.int64, types.uint64
        arguments = (number, number, number, number, word, number, number, types.float32, number, number)
        return types.int64(*arguments), generate

    return named(subtract_row, kind)


def _subtract_row(
    context: Any,
    builder: Any,
    form: int,
    stores: bool,
    lost: Any,
    mask: Any,
    num_words: Any,
    last_word: Any,
    source: Any,
    position: Any,
    factor: Any,
    low_bits: Any,
    target: Any,
) -> None:
    factors, align = broadcast(builder, factor), ir.Constant(INT32, 4)
    place = cgutils.alloca_once_value(builder, position)
    with cgutils.for_range(builder, num_words) as loop:
        word = load_mask(builder, mask, loop.index, num_words, last_word)
        entries = Entries(context, builder, form, word, source, place)
        for index in range(4):
            kept, values = entries.quarter(index)
            column = builder.add(builder.shl(loop.index, constant(6)), constant(LANES * index))
            pointer = at(builder, target, builder.shl(column, constant(2)))
            args = [pointer, align, kept, splat(0.0)]
            old = call_llvm(builder, "llvm.masked.load.v16f32.p0", FLOATS, args)
            shift = builder.fmul(factors, values)
            changed = old if stores else builder.fadd(old, shift)
            back = _rounded(builder, builder.fsub(changed, shift), low_bits)
            if stores:
                args = [builder.bitcast(back, FLOATS), pointer, align, kept]
                call_llvm(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)
            else:
                differs = builder.icmp_unsigned("!=", back, builder.bitcast(old, _WORDS[4]))
                bits = builder.bitcast(builder.and_(differs, kept), _I16)
                count = builder.zext(call_llvm(builder, "llvm.ctpop.i16", _I16, [bits]), INT64)
                builder.store(builder.add(builder.load(lost), count), lost)


@intrinsic
def move_row(
    typingctx: Any, size: Any, mode: Any, mask: Any, num_words: Any, last_word: Any, target: Any, saved: Any
) -> Any:
    """Copy a row's kept entries, of ``size`` bytes, to the packed room at ``saved``; or back from there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for item_size in (2, 4):
            for way in (SAVE, BRING_BACK):
                right_size = builder.icmp_signed("==", args[0], constant(item_size))
                right_way = builder.icmp_signed("==", args[1], constant(way))
                with builder.if_then(builder.and_(right_size, right_way)):
                    _move(builder, item_size, way, *args[2:])
        return context.get_dummy_value()

    number = types.int64
    return types.void(number, number, number, number, types.uint64, number, number), generate


def _move(
    builder: Any, size: int, way: int, mask: Any, num_words: Any, last_word: Any, target: Any, saved: Any
) -> None:
    vector, name, align = _WORDS[size], _NAMES[size], ir.Constant(INT32, size)
    place, zeros = cgutils.alloca_once_value(builder, saved), ir.Constant(vector, None)
    with cgutils.for_range(builder, num_words) as loop:
        word = load_mask(builder, mask, loop.index, num_words, last_word)
        for index in range(4):
            lanes = builder.trunc(builder.lshr(word, constant(LANES * index)), _I16)
            kept = builder.bitcast(lanes, ir.VectorType(ir.IntType(1), LANES))
            column = builder.add(builder.shl(loop.index, constant(6)), constant(LANES * index))
            pointer = at(builder, target, builder.mul(column, constant(size)))
            packed = at(builder, builder.load(place), constant(0))
            if way == SAVE:
                values = call_llvm(builder, f"llvm.masked.load.{name}.p0", vector, [pointer, align, kept, zeros])
                call_llvm(builder, f"llvm.masked.compressstore.{name}", ir.VoidType(), [values, packed, kept])
            else:
                values = call_llvm(builder, f"llvm.masked.expandload.{name}", vector, [packed, kept, zeros])
                call_llvm(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), [values, pointer, align, kept])
            count = builder.zext(call_llvm(builder, "llvm.ctpop.i16", _I16, [lanes]), INT64)
            builder.store(builder.add(builder.load(place), builder.mul(count, constant(size))), place)


subtract_signs, subtract_values = _row_for("signs", (SIGN,)), _row_for("values", DTYPES)
