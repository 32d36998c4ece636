"""Building blocks in LLVM's language for what numba cannot say itself: vectors under a bit mask, on any processor.

Everything works on 64 columns at a time: one 64-bit word of the mask, as four vectors of 16 floats. A word is unpacked
in registers only.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, codegen, config, types

LANES = 16
"""Columns of one vector. Fixed, so that sums have the same order on every processor."""

TILE_ROWS = 4
"""Rows that share the loads of an input vector."""

TILE_INPUTS = 4
"""Most input vectors that share the unpacking of a row; with the rows, as many sums as registers hold."""

SIGN, FLOAT32, FLOAT16, BFLOAT16 = range(4)
"""Codes of how a delta's kept entries are stored."""

DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
"""Codes of what a weight is stored as."""

_i8, _i16, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_pointer = ir.PointerType()
_bits = ir.VectorType(ir.IntType(1), LANES)
FLOATS = ir.VectorType(FLOAT, LANES)
_halves = ir.VectorType(ir.HalfType(), LANES)
_shorts = ir.VectorType(_i16, LANES)
_words = ir.VectorType(INT32, LANES)
ITEM_SIZE = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}
VECTOR_TYPE = {FLOAT32: FLOATS, FLOAT16: _halves, BFLOAT16: _shorts}
VECTOR_NAME = {FLOAT32: "v16f32", FLOAT16: "v16f16", BFLOAT16: "v16i16"}


def _has_feature(name: str) -> bool:
    chosen = getattr(config, "CPU_FEATURES", None)
    features = codegen.get_host_cpu_features() if chosen is None else chosen
    return f"+{name}" in features.split(",")


def is_processor_supported() -> bool:
    """Whether the processor itself converts float16 and multiplies and adds in one step: any since about 2013.

    On others LLVM would call functions that may not exist, which ends the process.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return platform.machine().lower() in ("x86_64", "amd64") and _has_feature("f16c") and _has_feature("fma")


def call_llvm(builder: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    """Call the LLVM intrinsic ``name``."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def splat(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def broadcast(builder: Any, value: Any) -> Any:
    """One float in every lane."""
    vector = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def at(builder: Any, address: Any, offset: Any) -> Any:
    """Pointer to ``offset`` bytes after ``address``; both 64-bit integers."""
    return builder.inttoptr(builder.add(address, offset), _pointer)


def constant(value: int) -> Any:
    return ir.Constant(INT64, value)


def _deposit_bits(bits: Any, mask: Any) -> Any:
    """The lowest bits of ``bits``, in order, at the set bits of ``mask``."""
    result = mask ^ mask
    one = (result ^ result) + types.uint64(1)
    while mask != 0:
        lowest = mask & (~mask + one)
        if bits & one != 0:
            result |= lowest
        bits >>= one
        mask ^= lowest
    return result


def deposit(context: Any, builder: Any, bits: Any, mask: Any) -> Any:
    """The lowest bits of a 64-bit word, in order, at the set bits of a mask."""
    if _has_feature("bmi2"):
        return call_llvm(builder, "llvm.x86.bmi.pdep.64", INT64, [bits, mask])
    signature = types.uint64(types.uint64, types.uint64)
    return context.compile_internal(builder, _deposit_bits, signature, (bits, mask))


def _extract_bits(bits: Any, mask: Any) -> Any:
    """The reverse of :func:`_deposit_bits`: those of ``bits`` at the set bits of ``mask``, closed up."""
    result = mask ^ mask
    one = (result ^ result) + types.uint64(1)
    target = one
    while mask != 0:
        lowest = mask & (~mask + one)
        if bits & lowest != 0:
            result |= target
        target <<= one
        mask ^= lowest
    return result


def extract(context: Any, builder: Any, bits: Any, mask: Any) -> Any:
    """The bits of a 64-bit word at the set bits of a mask, closed up."""
    if _has_feature("bmi2"):
        return call_llvm(builder, "llvm.x86.bmi.pext.64", INT64, [bits, mask])
    signature = types.uint64(types.uint64, types.uint64)
    return context.compile_internal(builder, _extract_bits, signature, (bits, mask))


def _sign_word(context: Any, builder: Any, source: Any, position: Any, mask: Any) -> Any:
    """64 bits in which those of negative entries are set; the first kept entry of ``mask`` is number ``position``."""
    start = builder.lshr(position, constant(3))
    shift = builder.and_(position, constant(7))
    low = builder.load(at(builder, source, start), typ=INT64, align=1)
    # A shift by 64 is undefined, so the ninth byte moves by one bit and by the rest.
    ninth = builder.zext(builder.load(at(builder, source, builder.add(start, constant(8))), typ=_i8, align=1), INT64)
    high = builder.shl(builder.shl(ninth, constant(1)), builder.sub(constant(63), shift))
    return deposit(context, builder, builder.or_(builder.lshr(low, shift), high), mask)


def _lane_bits(builder: Any, word: Any, quarter: int) -> Any:
    """16 bits of a word as a vector of booleans."""
    return builder.bitcast(builder.trunc(builder.lshr(word, constant(LANES * quarter)), _i16), _bits)


def to_float(builder: Any, stored: Any, dtype: int) -> Any:
    if dtype == FLOAT32:
        return stored
    if dtype == FLOAT16:
        return builder.fpext(stored, FLOATS)
    high = builder.shl(builder.zext(stored, _words), ir.Constant(_words, [16] * LANES))
    return builder.bitcast(high, FLOATS)


def from_float(builder: Any, value: Any, dtype: int) -> Any:
    """Round to nearest even, as torch does."""
    if dtype == FLOAT32:
        return value
    if dtype == FLOAT16:
        return builder.fptrunc(value, _halves)

    def lanes(number: int) -> Any:
        return ir.Constant(_words, [number] * LANES)

    bits = builder.bitcast(value, _words)
    odd = builder.and_(builder.lshr(bits, lanes(16)), lanes(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, lanes(0x7FFF))), lanes(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, lanes(0x7FC0), rounded), _shorts)


class Entries:
    """The kept entries of 64 columns of one row, as four vectors.

    ``place`` is a variable with the number of the first kept entry; it is moved past the last.
    """

    def __init__(self, context: Any, builder: Any, form: int, mask: Any, source: Any, place: Any) -> None:
        self.builder, self.form, self.mask, self.source = builder, form, mask, source
        self.position = builder.load(place)
        self.negative = _sign_word(context, builder, source, self.position, mask) if form == SIGN else None
        builder.store(builder.add(self.position, call_llvm(builder, "llvm.ctpop.i64", INT64, [mask])), place)

    def quarter(self, index: int) -> tuple[Any, Any]:
        """(which of 16 columns are kept, their values); the quarters must be asked for in order."""
        builder = self.builder
        kept = _lane_bits(builder, self.mask, index)
        if self.form == SIGN:
            return kept, builder.select(_lane_bits(builder, self.negative, index), splat(-1.0), splat(1.0))
        storage, suffix = VECTOR_TYPE[self.form], VECTOR_NAME[self.form]
        pointer = at(builder, self.source, builder.mul(self.position, constant(ITEM_SIZE[self.form])))
        zeros = ir.Constant(storage, None)
        stored = call_llvm(builder, f"llvm.masked.expandload.{suffix}", storage, [pointer, kept, zeros])
        count = call_llvm(builder, "llvm.ctpop.i16", _i16, [builder.bitcast(kept, _i16)])
        self.position = builder.add(self.position, builder.zext(count, INT64))
        return kept, to_float(builder, stored, self.form)


def load_mask(builder: Any, mask: Any, index: Any, num_words: Any, last_word: Any) -> Any:
    """One word of a row's mask, without the bits of other rows that may follow it."""
    word = builder.load(at(builder, mask, builder.shl(index, constant(3))), typ=INT64, align=1)
    is_last = builder.icmp_unsigned("==", index, builder.sub(num_words, constant(1)))
    return builder.and_(word, builder.select(is_last, last_word, constant(-1)))


def load_item(builder: Any, pointer: Any, index: int) -> Any:
    return builder.load(builder.gep(pointer, [constant(index)], source_etype=INT64), typ=INT64)


def lane_sum(builder: Any, vector: Any) -> Any:
    """Sum of 16 lanes, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(INT32, width), list(lanes)))
            for lanes in (range(width), range(width, 2 * width))
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(INT32, 0))
