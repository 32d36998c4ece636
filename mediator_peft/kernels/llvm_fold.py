"""Compiled loops that write a delta into a weight and bring back every bit of it.

Two ways. *Kept entries saved*: what a mask's entries overwrite is copied out, packed, and later copied back. *Computed
back*: a float32 weight whose numbers have free low bits (a bfloat16 or float16 checkpoint, loaded as float32) comes
back by subtracting the delta and rounding to those bits. It is tried out row by row before a row is written; rows where
an entry would not come back are marked, to be saved whole.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .llvm_fold_ir import move_row, subtract_signs, subtract_values
from .llvm_intrinsics import add_signs, add_values, local_numbers, pointer_to, take_next, widened
from .llvm_ir import FLOAT32, SIGN, TILE_ROWS
from .llvm_numba import (
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
    last_word_of,
    make_job,
    open_tile,
    source_stamp,
    tile_bytes,
)
from .llvm_team import Kernel, compiled, run

ADD_OR_MARK, ADD_MARKED, TAKE_UNMARKED = range(3)
SAVE, BRING_BACK = range(2)  # as in ``kernels_fold_ir``
# What these jobs use of a job's numbers, besides those of an addition.
MODE, LOW_BITS, MARKS, SAVED = INPUT, 7, 8, 15


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
    scales, num_rows, num_columns = pointer_to(delta[SCALES], np.uint16(0)), job[NUM_ROWS], job[NUM_COLUMNS]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, last_word_of(num_columns)
    scratch, starts = np.empty(2 * tile_bytes(num_columns), np.uint8), local_numbers(TILE_ROWS, np.int64(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
        for tile in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            mask, source, end = open_tile(job, delta, tile, position, starts, scratch.ctypes.data)
            for r in range(min(TILE_ROWS, num_rows - tile)):
                factor = coefficient * widened(scales[tile + r]) if delta[FORM] == SIGN else coefficient
                row_mask = mask + r * stride
                _change_row(
                    job,
                    delta,
                    add_row,
                    subtract_row,
                    tile + r,
                    row_mask,
                    num_words,
                    last_word,
                    source,
                    starts[r],
                    factor,
                )
            position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


@njit
def _move_kept(job, stamp):  # type: ignore[no-untyped-def]
    """Copy kept entries out of a weight or back into it; one call, or one thread's share of it."""
    delta, size = pointer_to(job[TABLE], np.int64(0)), job[WEIGHT_DTYPE]
    num_rows, num_columns = job[NUM_ROWS], job[NUM_COLUMNS]
    stride, num_words, last_word = (num_columns + 7) // 8, (num_columns + 63) // 64, last_word_of(num_columns)
    scratch, starts = np.empty(2 * tile_bytes(num_columns), np.uint8), local_numbers(TILE_ROWS, np.int64(0))
    chunk = take_next(job)
    while chunk < job[NUM_CHUNKS]:
        position = np.int64(pointer_to(delta[OFFSETS], np.int32(0))[chunk])
        for tile in range(chunk * CHUNK_ROWS, min(num_rows, (chunk + 1) * CHUNK_ROWS), TILE_ROWS):
            mask, _, end = open_tile(job, delta, tile, position, starts, scratch.ctypes.data)
            for r in range(min(TILE_ROWS, num_rows - tile)):
                target = job[OUTPUT] + (tile + r) * job[OUTPUT_STRIDE]
                saved = job[SAVED] + size * starts[r]
                move_row(size, job[MODE], mask + r * stride, num_words, last_word, target, saved)
            position = end
        chunk = take_next(job)
    scratch[0] = 0  # keeps it alive until here: the tiles know its address only


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


KERNELS = _kernels(source_stamp())


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
    job = make_job((weight.shape[0], weight.shape[1]), fields.reshape(1, DELTA_FIELDS))
    job[OUTPUT], job[OUTPUT_STRIDE] = weight.ctypes.data, weight.strides[0]
    job[MODE], job[LOW_BITS], job[MARKS] = mode, low_bits, marks.ctypes.data
    run(KERNELS["signs" if fields[FORM] == SIGN else "values"], job, int(job[NUM_CHUNKS]), weight.size, num_threads)


def move_kept(
    mode: int, weight: Array, mask: Array, offsets: NDArray[np.int32], saved: Array, num_threads: int
) -> None:
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
    job = make_job((weight.shape[0], weight.shape[1]), fields)
    job[OUTPUT], job[OUTPUT_STRIDE], job[WEIGHT_DTYPE] = weight.ctypes.data, weight.strides[0], weight.itemsize
    job[MODE], job[SAVED] = mode, saved.ctypes.data
    run(KERNELS["kept"], job, int(job[NUM_CHUNKS]), weight.size, num_threads)
