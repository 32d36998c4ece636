"""The packed bank at work on a GPU, by Triton: no delta is unpacked to memory, and nothing waits for the host.

A word is 32 columns of a row of a bitmap. Where a word's signs or values begin follows from how many entries are kept
before it: where each row begins is known, and the words before are counted on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..methods.encoding.bitmaps import count_bits_by_row

WORD = 32
"""Columns in one word of a bitmap."""

_TYPES = {
    torch.uint8: tl.uint8,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_PRODUCT_OUTPUTS, _PRODUCT_WORDS, _PRODUCT_WARPS = 32, 4, 4
_ADD_OUTPUTS, _ADD_WORDS = 16, 8
_SUM_SIZE = 1024
_PROGRAMS = 1024
"""About how many programs a product is split into, so that a GPU is filled."""


@triton.jit
def _count_ones(words, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (eights * 0x01010101) >> 24


@triton.jit
def _words(mask, rows, first, num_rows, num_words, WORDS: tl.constexpr):
    """Words ``first`` and on of some rows: (R, W) int32, 0 beyond the edges."""
    columns = first + tl.arange(0, WORDS)
    inside = (rows < num_rows)[:, None] & (columns < num_words)[None, :]
    return tl.load(mask + rows[:, None] * num_words + columns[None, :], mask=inside, other=0)


@triton.jit
def _rank(mask, offsets, rows, until, num_rows, num_words, WORDS: tl.constexpr, NATIVE: tl.constexpr):
    """Kept entries of the matrix before word ``until``, a multiple of W, of some rows: (R,) int32."""
    rank = tl.load(offsets + rows, mask=rows < num_rows, other=0)
    for first in range(0, until, WORDS):
        rank += tl.sum(_count_ones(_words(mask, rows, first, num_rows, num_words, WORDS), NATIVE), axis=1)
    return rank


@triton.jit
def _entries(values, rank, words, SIGNS: tl.constexpr, NATIVE: tl.constexpr):
    """The entries of some words, without their rows' scales: (R, W * 32) in the dtype of the values or float32."""
    bit = tl.arange(0, 32)[None, None, :]
    kept = (words[:, :, None] >> bit) & 1
    place = rank[:, :, None] + _count_ones(words[:, :, None] & ((1 << bit) - 1), NATIVE)
    if SIGNS:
        signs = tl.load(values + (place >> 3), mask=kept != 0, other=0).to(tl.int32)
        entries = (kept * (1 - 2 * ((signs >> (place & 7)) & 1))).to(tl.float32)
    else:
        entries = tl.load(values + place, mask=kept != 0, other=0)
    return tl.reshape(entries, (words.shape[0], words.shape[1] * 32))


@triton.jit
def _before(counts):
    """Sum of what stands left of each entry: (R, W)."""
    return tl.cumsum(counts, axis=1) - counts


@triton.jit
def _product(
    x, coefficients, table, partial,
    num_rows, num_outputs, num_inputs, num_words, split_words,
    VALUE: tl.constexpr, SIGNS: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One delta times a part of all rows: ``partial[k, s, r, o] = c[k, r] * sum_i S_k[o, i] x[r, i]`` over split s."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    delta, split = tl.program_id(1), tl.program_id(2)
    mask = tl.load(table + 4 * delta).to(tl.pointer_type(tl.int32))
    values = tl.load(table + 4 * delta + 1).to(tl.pointer_type(VALUE))
    offsets = tl.load(table + 4 * delta + 3).to(tl.pointer_type(tl.int32))
    begin = split * split_words
    rank = _rank(mask, offsets, outputs, begin, num_outputs, num_words, WORDS, NATIVE)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(begin, tl.minimum(begin + split_words, num_words), WORDS):
        words = _words(mask, outputs, first, num_outputs, num_words, WORDS)
        counts = _count_ones(words, NATIVE)
        entries = _entries(values, rank[:, None] + _before(counts), words, SIGNS, NATIVE)
        columns = first * 32 + tl.arange(0, WORDS * 32)
        inside = (rows < num_rows)[:, None] & (columns < num_inputs)[None, :]
        inputs = tl.load(x + rows[:, None] * num_inputs + columns[None, :], mask=inside, other=0)
        if SIGNS or inputs.dtype == entries.dtype:  # 1 and -1 are exact in any dtype
            total = tl.dot(inputs, tl.trans(entries.to(inputs.dtype)), total, input_precision="ieee")
        else:
            total = tl.dot(inputs.to(tl.float32), tl.trans(entries.to(tl.float32)), total, input_precision="ieee")
        rank += tl.sum(counts, axis=1)
    weights = tl.load(coefficients + delta * num_rows + rows, mask=rows < num_rows, other=0)
    if SIGNS:
        scales = tl.load(table + 4 * delta + 2).to(tl.pointer_type(tl.bfloat16))
        total *= tl.load(scales + outputs, mask=outputs < num_outputs, other=0).to(tl.float32)[None, :]
    # A row that has no part in a delta gets nothing of it, not even from an infinite input.
    total = tl.where(weights[:, None] == 0, 0.0, total * weights[:, None])
    place = (delta * tl.num_programs(2) + split) * num_rows + rows
    inside = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(partial + place[:, None] * num_outputs + outputs[None, :], total, mask=inside)


@triton.jit
def _sum(partial, out, num_parts, size, SIZE: tl.constexpr):
    """``out += sum of the parts``, in float32 and in their order, rounded once."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(out + place, mask=place < size, other=0).to(tl.float32)
    for part in range(num_parts):
        total += tl.load(partial + part * size + place, mask=place < size, other=0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _add(
    weight, coefficients, table, out, num_deltas,
    num_outputs, num_inputs, num_words, row_stride, column_stride,
    VALUE: tl.constexpr, SIGNS: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """``out = weight + sum_k c[k] S_k``, rounded once; where no delta has an entry, every bit of the weight."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * WORDS
    columns = first * 32 + tl.arange(0, WORDS * 32)
    inside = (outputs < num_outputs)[:, None] & (columns < num_inputs)[None, :]
    place = outputs.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    old = tl.load(weight + place, mask=inside, other=0)
    total = tl.zeros((OUTPUTS, WORDS * 32), tl.float32)
    for delta in range(num_deltas):
        mask = tl.load(table + 4 * delta).to(tl.pointer_type(tl.int32))
        values = tl.load(table + 4 * delta + 1).to(tl.pointer_type(VALUE))
        offsets = tl.load(table + 4 * delta + 3).to(tl.pointer_type(tl.int32))
        rank = _rank(mask, offsets, outputs, first, num_outputs, num_words, WORDS, NATIVE)
        words = _words(mask, outputs, first, num_outputs, num_words, WORDS)
        counts = _count_ones(words, NATIVE)
        entries = _entries(values, rank[:, None] + _before(counts), words, SIGNS, NATIVE).to(tl.float32)
        factor = tl.load(coefficients + delta)
        if SIGNS:
            scales = tl.load(table + 4 * delta + 2).to(tl.pointer_type(tl.bfloat16))
            total += (
                entries
                * (factor * tl.load(scales + outputs, mask=outputs < num_outputs, other=0).to(tl.float32))[:, None]
            )
        else:
            total += entries * factor
    new = tl.where(total == 0, old, (old.to(tl.float32) + total).to(old.dtype))
    tl.store(out + place, new, mask=inside)


class PackedMatrix(Protocol):
    """What the kernels need of a sparse delta."""

    shape: tuple[int, int]
    mask: Tensor
    parts: dict[str, Tensor]


class DeviceDelta:
    """One matrix's delta for one expert on a GPU. Holds its tensors and copies none of them.

    Args:
        delta: with signs or numbers; its rows are whole words, so that I is a multiple of 32.
    """

    def __init__(self, delta: PackedMatrix) -> None:
        if delta.shape[1] % WORD:
            raise ValueError(f"rows of {delta.shape[1]} entries are no whole words of {WORD} bits.")
        self.shape = delta.shape
        self.mask = delta.mask.contiguous()
        self.scales = delta.parts.get("scales")
        self.values = delta.parts["values"] if self.scales is None else delta.parts["signs"]
        counts = count_bits_by_row(self.mask)
        self.offsets = (counts.cumsum(0) - counts).int()
        """(O,) int32, kept entries before each row."""

    @property
    def addresses(self) -> list[int]:
        """What the kernels know of it."""
        parts = (self.mask, self.values, self.scales, self.offsets)
        return [0 if part is None else part.data_ptr() for part in parts]


class DeviceDeltas:
    """Several deltas of one layer on one GPU, ready for the kernels.

    Args:
        deltas: K deltas of one shape (O, I), all with signs or all with numbers of one dtype.

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(self, deltas: Sequence[DeviceDelta]) -> None:
        self._deltas = tuple(deltas)
        first = self._deltas[0]
        if len({(delta.shape, delta.values.dtype, delta.mask.device) for delta in deltas}) > 1:
            raise ValueError("deltas of one layer have one shape, one dtype and lie on one device.")
        self._shape, self._is_sign = first.shape, first.scales is not None
        self._dtype = _TYPES[first.values.dtype]
        self._table = torch.tensor([delta.addresses for delta in self._deltas], device=first.mask.device)
        self._native = first.mask.device.type == "cuda" and torch.version.hip is None

    def add_product(self, x: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """``out[r] += sum_k coefficients[k, r] * (S_k @ x[r])``, in float32 and a fixed order, rounded once.

        Args:
            x: (R, I) float32, float16 or bfloat16, contiguous.
            coefficients: (K, R) float32, contiguous.
            out: (R, O) contiguous, changed in place.
        """
        num_outputs, num_inputs = self._shape
        num_words, num_deltas, num_rows = num_inputs // WORD, len(self._deltas), len(x)
        outputs = _PRODUCT_OUTPUTS
        blocks = triton.cdiv(num_outputs, outputs)
        num_splits = max(1, min(_PROGRAMS // (blocks * num_deltas), num_words // (2 * _PRODUCT_WORDS)))
        split_words = triton.cdiv(triton.cdiv(num_words, num_splits), _PRODUCT_WORDS) * _PRODUCT_WORDS
        num_splits = triton.cdiv(num_words, split_words)
        partial = torch.empty(num_deltas * num_splits, num_rows, num_outputs, device=x.device)
        with _on(x.device):
            _product[blocks, num_deltas, num_splits](
                x, coefficients, self._table, partial, num_rows, num_outputs, num_inputs, num_words, split_words,
                VALUE=self._dtype, SIGNS=self._is_sign, OUTPUTS=outputs, WORDS=_PRODUCT_WORDS,
                ROWS=max(16, triton.next_power_of_2(num_rows)), NATIVE=self._native, num_warps=_PRODUCT_WARPS,
            )  # fmt: skip
            _sum[(triton.cdiv(out.numel(), _SUM_SIZE),)](partial, out, len(partial), out.numel(), SIZE=_SUM_SIZE)

    def added(self, weight: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """``weight + sum_k coefficients[k] * S_k``, summed in float32 and rounded once.

        Args:
            weight: (O, I) float32, float16 or bfloat16, of any strides.
            coefficients: (K,) float32
            out: like the weight, or the weight itself; None makes a new one.
        """
        out = torch.empty_like(weight) if out is None else out
        (num_outputs, num_inputs), num_words = self._shape, self._shape[1] // WORD
        if out.stride() != weight.stride():
            raise ValueError(f"weight and result differ in strides: {weight.stride()}, {out.stride()}.")
        with _on(weight.device):
            _add[triton.cdiv(num_outputs, _ADD_OUTPUTS), triton.cdiv(num_words, _ADD_WORDS)](
                weight, coefficients, self._table, out, len(self._deltas), num_outputs, num_inputs, num_words,
                *weight.stride(), VALUE=self._dtype, SIGNS=self._is_sign, OUTPUTS=_ADD_OUTPUTS, WORDS=_ADD_WORDS,
                NATIVE=self._native,
            )  # fmt: skip
        return out


def _on(device: torch.device) -> AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
