"""Compiled loops that write a delta into a weight and bring back every bit of it.

Two ways. *Kept entries saved*: what a mask's entries overwrite is copied out, packed, and later copied back. *Computed
back*: a float32 weight whose numbers have free low bits (a bfloat16 or float16 checkpoint, loaded as float32) is brought
back by subtracting the delta and rounding to those bits. It is tried out row by row before a row is written; rows where
an entry would not come back are marked, to be saved whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .kernels_intrinsics import _named, add_signs, add_values, local_numbers, pointer_to, take_next
from .kernels_ir import (
    DTYPES,
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    LANES,
    SIGN,
    TILE_ROWS,
    Entries,
    at,
    broadcast,
    call_llvm,
    constant,
    load_mask,
    splat,
)
from .kernels_numba import (
    CHUNK_ROWS,
    COEFFICIENTS,
    DELTA_FIELDS,
    FORM,
    FORMS,
    INPUT,
    MASK,
    MASK_BYTES,
    NUM_CHUNKS,
    NUM_COLUMNS,
    NUM_ROWS,
    OFFSETS,
    OUTPUT,
    OUTPUT_STRIDE,
    SCALES,
    TABLE,
    WEIGHT_DTYPE,
    Array,
    _job,
    _last_word,
    _open_tile,
    _source_stamp,
    _tile_bytes,
)
from .kernels_team import Kernel, compiled, run

ADD_OR_MARK, ADD_MARKED, TAKE_UNMARKED = range(3)
SAVE, BRING_BACK = range(2)
# What these jobs use of a job's numbers, besides those of an addition.
MODE, LOW_BITS, MARKS, SAVED = INPUT, 7, 8, 15

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

    return _named(subtract_row, kind)


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
def _move_row(
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


def _move(builder: Any, size: int, way: int, mask: Any, num_words: Any, last_word: Any, target: Any, saved: Any) -> None:
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


@njit
def _change_row(job, delta, add_row, subtract_row, row, mask, num_words, last_word, source, start, factor):  # type: ignore[no-untyped-def]
    """One row of :func:`_change`."""
    marks, target = pointer_to(job[MARKS], np.uint8(0)), job[OUTPUT] + row * job[OUTPUT_STRIDE]
    form, low_bits = delta[FORM], job[LOW_BITS]
    if job[MODE] == TAKE_UNMARKED:
        if marks[row] == 0:
            subtract_row(form, 1, mask, num_words, last_word, source, start, factor, low_bits, target)
        return
    if job[MODE] == ADD_OR_MARK and subtract_row(
        form, 0, mask, num_words, last_word, source, start, factor, low_bits, target
    ):
        return
    if job[MODE] == ADD_OR_MARK or marks[row] != 0:
        add_row(form, np.int64(FLOAT32), mask, num_words, last_word, source, start, factor, target)
    if job[MODE] == ADD_OR_MARK:
        marks[row] = 0


@njit
def _change(job, add_row, subtract_row, stamp):  # type: ignore[no-untyped-def]
    """Add a delta to a float32 weight, or take it out, row by row as marked; one call, or one thread's share of it."""
    delta = pointer_to(job[TABLE], np.int64(0))
    coefficient = pointer_to(delta[COEFFICIENTS], np.float32(0))[0]
    scales, num_rows, num_columns = pointer_to(delta[SCALES], np.float32(0)), job[NUM_ROWS], job[NUM_COLUMNS]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, _last_word(num_columns)
    scratch, starts = np.empty(2 * _tile_bytes(num_columns), np.uint8), local_numbers(TILE_ROWS, np.int64(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
        for tile in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            mask, source, end = _open_tile(job, delta, tile, position, starts, scratch.ctypes.data)
            for r in range(min(TILE_ROWS, num_rows - tile)):
                factor = coefficient * scales[tile + r] if delta[FORM] == SIGN else coefficient
                row_mask = mask + r * stride
                _change_row(
                    job, delta, add_row, subtract_row, tile + r, row_mask, num_words, last_word, source, starts[r], factor
                )
            position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


@njit
def _move_kept(job, stamp):  # type: ignore[no-untyped-def]
    """Copy kept entries out of a weight or back into it; one call, or one thread's share of it."""
    delta, size = pointer_to(job[TABLE], np.int64(0)), job[WEIGHT_DTYPE]
    num_rows, num_columns = job[NUM_ROWS], job[NUM_COLUMNS]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, _last_word(num_columns)
    scratch, starts = np.empty(2 * _tile_bytes(num_columns), np.uint8), local_numbers(TILE_ROWS, np.int64(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
        for tile in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            mask, _, end = _open_tile(job, delta, tile, position, starts, scratch.ctypes.data)
            for r in range(min(TILE_ROWS, num_rows - tile)):
                target = job[OUTPUT] + (tile + r) * job[OUTPUT_STRIDE]
                saved = job[SAVED] + size * starts[r]
                _move_row(size, job[MODE], mask + r * stride, num_words, last_word, target, saved)
            position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


subtract_signs, subtract_values = _row_for("signs", (SIGN,)), _row_for("values", DTYPES)


def _kernels(stamp: int) -> dict[str, Kernel]:
    @compiled
    def sign_change(job):  # type: ignore[no-untyped-def]
        _change(job, add_signs, subtract_signs, stamp)

    @compiled
    def value_change(job):  # type: ignore[no-untyped-def]
        _change(job, add_values, subtract_values, stamp)

    @compiled
    def kept_move(job):  # type: ignore[no-untyped-def]
        _move_kept(job, stamp)

    return {"signs": sign_change, "values": value_change, "kept": kept_move}


KERNELS = _kernels(_source_stamp())


def change(
    mode: int,
    weight: NDArray[np.float32],
    fields: NDArray[np.int64],
    coefficient: float,
    low_bits: int,
    marks: NDArray[np.uint8],
    num_threads: int,
) -> None:
    """Add ``coefficient * S`` to a weight, or take it out, row by row.

    Args:
        mode: ``ADD_OR_MARK`` adds to the rows that can be computed back and sets their marks to 0; ``ADD_MARKED`` adds
            to the rows with a mark; ``TAKE_UNMARKED`` takes out of those without.
        weight: (O, I) float32
        fields: (DELTA_FIELDS,), from ``kernels_numba.table``.
        coefficient: one number.
        low_bits: free low bits of the weight's numbers, at least 1.
        marks: (O,), all 1 at first.
        num_threads: most threads to use.
    """
    factor = np.array([coefficient], np.float32)
    fields = fields.copy()
    fields[COEFFICIENTS] = factor.ctypes.data
    job = _job((weight.shape[0], weight.shape[1]), fields.reshape(1, DELTA_FIELDS))
    job[OUTPUT], job[OUTPUT_STRIDE] = weight.ctypes.data, weight.strides[0]
    job[MODE], job[LOW_BITS], job[MARKS] = mode, low_bits, marks.ctypes.data
    run(KERNELS["signs" if fields[FORM] == SIGN else "values"], job, int(job[NUM_CHUNKS]), weight.size, num_threads)


def move_kept(mode: int, weight: Array, mask: Array, offsets: NDArray[np.int32], saved: Array, num_threads: int) -> None:
    """Copy the kept entries of a weight to ``saved`` (``SAVE``), or back (``BRING_BACK``), bit for bit.

    Args:
        mode: which way.
        weight: (O, I), numbers of 2 or 4 bytes.
        mask: (O, ceil(I / 8)) uint8
        offsets: (ceil(O / 16),) int32, from ``row_offsets``.
        saved: (num_kept,), of the weight's dtype.
        num_threads: most threads to use.
    """
    fields = np.zeros((1, DELTA_FIELDS), np.int64)
    fields[0, MASK], fields[0, MASK_BYTES], fields[0, FORM] = mask.ctypes.data, mask.nbytes, FORMS["float32"]
    fields[0, OFFSETS] = offsets.ctypes.data
    job = _job((weight.shape[0], weight.shape[1]), fields)
    job[OUTPUT], job[OUTPUT_STRIDE], job[WEIGHT_DTYPE] = weight.ctypes.data, weight.strides[0], weight.itemsize
    job[MODE], job[SAVED] = mode, saved.ctypes.data
    run(KERNELS["kept"], job, int(job[NUM_CHUNKS]), weight.size, num_threads)
