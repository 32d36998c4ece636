"""Packed deltas at work: one interface, and the implementation that is there.

Everything here works on the CPU. The native kernels (``native_kernels``, C++) do the work where they were compiled;
plain numpy (``numpy_kernels``) is used otherwise, many times slower, with products that are the same up to the order of
sums. ``build_loops`` has the inner loops of a build. ``MEDIATOR_PEFT_KERNELS`` forces ``native`` or ``numpy``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, UnsupportedError
from ..storage import Array, as_array, narrowed, widened
from .native_kernels import DeltaArrays, check, check_writable, stored_as
from .numpy_kernels import CHUNK_ROWS, DenseChunk, dense_chunks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GroupedProduct",
    "PackedDelta",
    "add_to",
    "added",
    "as_array",
    "change",
    "expand",
    "has_native",
    "move_kept",
    "native",
    "row_offsets",
    "sparse_product",
]

CHOICE = "MEDIATOR_PEFT_KERNELS"
"""The environment variable that forces an implementation."""

ADD_OR_MARK, ADD_MARKED, TAKE_UNMARKED = range(3)
"""What :func:`change` does."""

SAVE, BRING_BACK = range(2)
"""What :func:`move_kept` does."""

_UINT8, _UINT16, _INT32, _FLOAT32, _FLOAT16 = map(np.dtype, ("uint8", "uint16", "int32", "float32", "float16"))
_FLOATS = (_FLOAT32, _FLOAT16, _UINT16)
_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@cache
def native() -> ModuleType | None:
    """The native kernels; None where plain numpy does their work. Looked for once; the first failure warns.

    Raises:
        ConfigError: ``MEDIATOR_PEFT_KERNELS`` is neither ``native`` nor ``numpy``.
        UnsupportedError: it asks for the native kernels, and they cannot be used.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "native", "numpy"):
        raise ConfigError(f"{CHOICE}={choice!r}: set it to 'native' or 'numpy', or leave it out.")
    if choice == "numpy":
        return None
    from . import native_kernels

    try:
        native_kernels.library()
    except native_kernels.NativeKernelsMissing as fault:
        if choice:
            raise UnsupportedError(f"{CHOICE}=native, but the native kernels cannot be used: {fault}.") from fault
        warnings.warn(
            f"The native kernels cannot be used: {fault}. Plain numpy does their work, many times slower. Install a "
            "C++ compiler and then the package again (pip install --force-reinstall --no-deps mediator_peft, or pip "
            f"install -e . in its sources), or set {CHOICE}=numpy to silence this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return native_kernels


def has_native() -> bool:
    """Whether the native kernels are in use."""
    return native() is not None


def _num_threads(wanted: int | None) -> int:
    if wanted:
        return wanted
    import torch

    return torch.get_num_threads()


def row_offsets(mask: Array) -> NDArray[np.int32]:
    """Number of kept entries before each chunk of 16 rows.

    Args:
        mask: (O, ceil(I / 8)) uint8

    Returns:
        (ceil(O / 16),) int32

    Raises:
        ValueError: more than 2³¹ − 1 entries are kept.
    """
    num_chunks = -(-len(mask) // CHUNK_ROWS)
    counts = np.zeros(num_chunks + 1, np.int64)
    for chunk in range(num_chunks):
        rows = mask[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
        counts[chunk + 1] = _ONES_IN_BYTE[rows].sum(dtype=np.int64)
    ends = counts.cumsum()
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"one matrix keeps {ends[-1]} entries, at most 2**31 - 1 can be addressed. Lower the density.")
    return ends[:-1].astype(np.int32)


def count_kept(mask: Array, offsets: NDArray[np.int32]) -> int:
    """Number of kept entries of a matrix: those before its last chunk and those in it."""
    if not len(offsets):
        return 0
    last = mask[(len(offsets) - 1) * CHUNK_ROWS :]
    return int(offsets[-1]) + int(_ONES_IN_BYTE[last].sum(dtype=np.int64))


class PackedDelta:
    """One matrix's delta for one expert, ready for the kernels. Holds what it is given and copies none of it.

    Tensors are to be given as tensors and not as ``tensor.numpy()``: a tensor's memory may be moved under it (into
    shared memory, for another process), so its address is looked up at every call.

    Args:
        mask: (O, ceil(I / 8)) uint8, bit j % 8 of byte j // 8 is column j; padding bits are 0.
        num_columns: I
        signs: (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; goes with ``scales``.
        scales: (O,) bfloat16, or uint16 with its bits.
        values: (num_kept,) float32, float16, bfloat16 or uint16 with its bits, row by row; instead of the other two.
        offsets: what :func:`row_offsets` gave for the mask; None computes it.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self,
        mask: Array | Tensor,
        num_columns: int,
        *,
        signs: Array | Tensor | None = None,
        scales: Array | Tensor | None = None,
        values: Array | Tensor | None = None,
        offsets: NDArray[np.int32] | None = None,
    ) -> None:
        self.shape = (len(mask), num_columns)
        self._mask, self._signs, self._scales, self._values = mask, signs, scales, values
        check("mask", mask, (_UINT8,), (len(mask), (num_columns + 7) // 8))
        if num_columns % 8 and (self.mask[:, -1] >> (num_columns % 8)).any():
            raise ValueError(f"the mask has ones beyond column {num_columns}; its padding bits must be 0.")
        self.offsets = row_offsets(self.mask) if offsets is None else offsets
        check("offsets", self.offsets, (_INT32,), (-(-len(mask) // CHUNK_ROWS),))
        num_kept = count_kept(self.mask, self.offsets)
        if values is not None and signs is None and scales is None:
            check("values", values, _FLOATS, (num_kept,))
        elif values is None and signs is not None and scales is not None:
            check("signs", signs, (_UINT8,), ((num_kept + 7) // 8,))
            check("scales", scales, (_UINT16,), (len(mask),))
        else:
            raise ValueError("a delta has either signs and scales, or values.")

    @property
    def mask(self) -> Array:
        """(O, ceil(I / 8)) uint8, as it lies now."""
        return as_array(self._mask)

    @property
    def signs(self) -> Array | None:
        """(ceil(num_kept / 8),) uint8, as they lie now."""
        return None if self._signs is None else as_array(self._signs)

    @property
    def scales(self) -> Array | None:
        """(O,) uint16, the bits of bfloat16, as they lie now."""
        return None if self._scales is None else as_array(self._scales)

    @property
    def values(self) -> Array | None:
        """(num_kept,) float32, float16 or uint16 (the bits of bfloat16), as they lie now."""
        return None if self._values is None else as_array(self._values)

    @property
    def is_sign(self) -> bool:
        """Whether entries are stored as signs and scales."""
        return self._values is None

    @cached_property
    def places(self) -> tuple[Callable[[], int], ...]:
        """Functions that tell where the memory lies now."""
        source = self._signs if self._values is None else self._values
        return tuple(_place_of(owner) for owner in (self._mask, source, self._scales) if owner is not None)

    def arrays(self) -> DeltaArrays:
        """What the native kernels read, as it lies now."""
        source = self.signs if self._values is None else self.values
        assert source is not None
        return DeltaArrays(self.mask, source, self.scales, self.offsets)

    def chunks(self) -> Iterator[DenseChunk]:
        """The delta in plain numpy, 16 rows at a time."""
        return dense_chunks(self.mask, self.shape[1], self.signs, self.scales, self.values, self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "places"}


class GroupedProduct:
    """What several deltas of one layer add to its output, each on its own rows of the batch.

    Made once for a layer and a set of expert weights, then called at every step; a call costs microseconds beside the
    product itself. A row may belong to several deltas (a blend). Sums have a fixed order: the result of a row does
    not depend on the number of threads nor on the other rows of the batch.

    Args:
        deltas: E deltas of one shape (O, I), all with signs or all with values.
        rows: E arrays (B_e,), rows of the batch that use the delta, each at most once.
        coefficients: E arrays (B_e,), expert weights of these rows.

    Raises:
        ValueError: shapes or kinds differ, or a row is named twice for one delta.
    """

    def __init__(self, deltas: Sequence[PackedDelta], rows: Sequence[Array], coefficients: Sequence[Array]) -> None:
        self.deltas = tuple(deltas)
        self.rows = [np.ascontiguousarray(group, np.int64) for group in rows]
        self.coefficients = [np.ascontiguousarray(group, np.float32) for group in coefficients]
        if not len(self.deltas) == len(self.rows) == len(self.coefficients):
            raise ValueError(f"{len(deltas)} deltas, {len(rows)} sets of rows, {len(coefficients)} of coefficients.")
        if len({delta.shape for delta in self.deltas}) > 1:
            raise ValueError(f"deltas of one layer differ in shape: {sorted({delta.shape for delta in self.deltas})}.")
        if len({delta.is_sign for delta in self.deltas}) > 1:
            raise ValueError("deltas of one layer are either all signs or all values.")
        for group_rows, group_coefficients in zip(self.rows, self.coefficients, strict=True):
            if group_rows.ndim != 1 or group_rows.shape != group_coefficients.shape:
                raise ValueError(f"rows have shape {group_rows.shape}, coefficients {group_coefficients.shape}.")
            if len(np.unique(group_rows)) < len(group_rows) or (group_rows < 0).any():
                raise ValueError(f"rows of one delta must differ and not be negative, got {group_rows.tolist()}.")
        self._min_batch = 1 + max((int(group.max()) for group in self.rows if len(group)), default=-1)
        self._made: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what only holds for these very arrays."""
        return {**{key: value for key, value in self.__dict__.items() if key != "_places"}, "_made": None}

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32], num_threads: int | None = None) -> None:
        """``out[b] += coefficient * (S @ x[b])`` for every delta and each of its rows b.

        Args:
            x: (B, I) float32, contiguous.
            out: (B, O) float32, contiguous.
            num_threads: most threads to use; None takes as many as torch does.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if self._min_batch == 0 or 0 in self.deltas[0].shape:
            return
        self._check_batch(len(x))
        num_outputs, num_inputs = self.deltas[0].shape
        check("x", x, (_FLOAT32,), (len(x), num_inputs))
        check_writable("out", out, (_FLOAT32,), (len(x), num_outputs))
        if (kernels := native()) is not None:
            job = self._job(kernels, self.deltas[0].shape)
            job.run(kernels.address(x), len(x), kernels.address(out), _num_threads(num_threads))
            return
        for delta, rows, coefficients in zip(self.deltas, self.rows, self.coefficients, strict=True):
            for columns, _, dense in delta.chunks():
                out[rows, columns] += coefficients[:, None] * (x[rows] @ dense.T)

    def multiply(
        self,
        x: Tensor,
        out: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        num_threads: int | None = None,
    ) -> None:
        """As a call, by the native kernels alone; with a weight, ``out`` is first set to ``x @ weight.T + bias``.

        Args:
            x: (B, I) float32, contiguous.
            out: (B, O) float32, contiguous.
            weight: (O, I) float32, float16 or bfloat16, contiguous.
            bias: (O,) float32, goes with the weight.
            num_threads: most threads to use; None takes as many as torch does.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        kernels = native()
        assert kernels is not None
        batch_size = len(x)
        self._check_batch(batch_size)
        shape = (out.shape[1], x.shape[1])
        if self.deltas and self.deltas[0].shape != shape:
            raise ValueError(f"x and out are for a matrix {shape}, the deltas have shape {self.deltas[0].shape}.")
        check("x", x, (_FLOAT32,), (batch_size, shape[1]))
        check("out", out, (_FLOAT32,), (batch_size, shape[0]))
        if weight is not None:
            check("weight", weight, _FLOATS, shape)
        if bias is not None:
            check("bias", bias, (_FLOAT32,), shape[:1])
        job = self._job(kernels, shape, weight, bias)
        job.run(x.data_ptr(), batch_size, out.data_ptr(), _num_threads(num_threads))

    @cached_property
    def _places(self) -> tuple[Callable[[], int], ...]:
        return tuple(place for delta in self.deltas for place in delta.places)

    def _job(
        self, kernels: ModuleType, shape: tuple[int, int], weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Any:
        """The job for one weight, kept for the next call as long as all memory stays where it is."""
        key = [place() for place in self._places]
        key += [0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()]
        made = self._made
        if made is None or made[0] != key:
            arrays = [delta.arrays() for delta in self.deltas]
            dense = (None if weight is None else as_array(weight), None if bias is None else as_array(bias))
            job = kernels.ProductJob(shape, arrays, self.rows, self.coefficients, *dense)
            self._made = made = (key, job)
        return made[1]

    def _check_batch(self, batch_size: int) -> None:
        if batch_size < self._min_batch:
            raise ValueError(f"the batch has {batch_size} rows, row {self._min_batch - 1} is asked for.")


def sparse_product(
    x: NDArray[np.float32],
    delta: PackedDelta,
    coefficients: NDArray[np.float32],
    out: NDArray[np.float32],
    num_threads: int | None = None,
) -> None:
    """``out[b] += coefficients[b] * (S @ x[b])`` for one delta and all rows of a batch.

    Args:
        x: (B, I) float32
        delta: (O, I)
        coefficients: (B,)
        out: (B, O) float32, changed in place.
        num_threads: most threads to use; None takes as many as torch does.
    """
    GroupedProduct([delta], [np.arange(len(x))], [coefficients])(x, out, num_threads)


def add_to(weight: Array, delta: PackedDelta, coefficient: float, num_threads: int | None = None) -> None:
    """``weight += coefficient * S`` at the kept entries; all others keep every bit.

    Computed in float32 (first ``coefficient * scale`` or ``coefficient * value``, then the sum), then rounded once, to
    nearest even.

    Args:
        weight: (O, I) float32, float16 or uint16 (the bits of bfloat16), contiguous, changed in place.
        delta: (O, I)
        coefficient: one number, e.g. an expert weight, or -1 to take a float32 delta back out.
        num_threads: most threads to use; None takes as many as torch does.

    Raises:
        ValueError: the weight's shape or dtype does not fit.
    """
    check_writable("weight", weight, _FLOATS, delta.shape)
    if not weight.size:
        return
    if (kernels := native()) is not None:
        kernels.add(weight, delta.arrays(), coefficient, _num_threads(num_threads))
        return
    for rows, kept, dense in delta.chunks():
        total = widened(weight[rows][kept]) + np.float32(coefficient) * dense[kept]
        weight[rows][kept] = narrowed(total, weight.dtype)


def added(
    weight: Tensor, delta: PackedDelta, coefficient: float, out: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """``weight + coefficient * S`` as a new matrix, rounded once, by the native kernels; they read the weight once.

    Args:
        weight: (r, I) float32, float16 or bfloat16, contiguous, on the CPU.
        delta: (O, I), of which rows ``first_row`` to ``first_row + r`` are added.
        coefficient: one number.
        out: (r, I) to be written, of the weight's dtype; None makes a new one.
        first_row: a multiple of 16.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    import torch

    kernels = native()
    assert kernels is not None
    shape = (delta.shape[0] if out is None else len(weight), delta.shape[1])
    check("weight", weight, _FLOATS, shape)
    result = torch.empty_like(weight) if out is None else out
    check("out", result, (stored_as(weight.dtype),), shape)
    if result.numel():
        threads = torch.get_num_threads()
        kernels.add(as_array(result), delta.arrays(), coefficient, threads, as_array(weight), first_row)
    return result


def expand(delta: PackedDelta) -> NDArray[np.float32]:
    """The delta as a plain matrix: (O, I) float32."""
    dense = np.zeros(delta.shape, np.float32)
    add_to(dense, delta, 1.0)
    return dense


def change(
    mode: int,
    weight: NDArray[np.float32],
    delta: PackedDelta,
    coefficient: float,
    low_bits: int,
    marks: NDArray[np.uint8],
) -> None:
    """Add ``coefficient * S`` to a float32 weight such that it can be computed back, or take it out. Native only.

    A weight of a 16-bit checkpoint has free low bits: subtracting the delta and rounding to the others gives it back.
    It is tried out row by row before a row is written; rows where an entry would not come back keep their mark.

    Args:
        mode: ``ADD_OR_MARK`` adds to the rows that can be computed back and sets their marks to 0; ``ADD_MARKED`` adds
            to the rows with a mark; ``TAKE_UNMARKED`` takes out of those without.
        weight: (O, I) float32, changed in place.
        delta: (O, I)
        coefficient: one number.
        low_bits: free low bits of the weight's numbers, 1 to 23.
        marks: (O,), all 1 at first.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    kernels = native()
    assert kernels is not None
    check_writable("weight", weight, (_FLOAT32,), delta.shape)
    check_writable("marks", marks, (_UINT8,), delta.shape[:1])
    if not 1 <= low_bits <= 23 or mode not in (ADD_OR_MARK, ADD_MARKED, TAKE_UNMARKED):
        raise ValueError(f"low_bits must be 1 to 23 and the mode known, got {low_bits} and {mode}.")
    kernels.change(mode, weight, delta.arrays(), coefficient, low_bits, marks, _num_threads(None))


def move_kept(mode: int, weight: Array, mask: Array, offsets: NDArray[np.int32], saved: Array) -> None:
    """Copy the kept entries of a weight to ``saved`` (``SAVE``), or back (``BRING_BACK``), bit for bit. Native only.

    Args:
        mode: which way.
        weight: (O, I), numbers of 2 or 4 bytes.
        mask: (O, ceil(I / 8)) uint8
        offsets: (ceil(O / 16),) int32, from :func:`row_offsets`.
        saved: (num_kept,), of the weight's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    kernels = native()
    assert kernels is not None
    rows, columns = weight.shape
    check("weight", weight, _FLOATS, weight.shape)
    check("mask", mask, (_UINT8,), (rows, (columns + 7) // 8))
    check("offsets", offsets, (_INT32,), (-(-rows // CHUNK_ROWS),))
    check("saved", saved, (weight.dtype,), (count_kept(mask, offsets),))
    if mode not in (SAVE, BRING_BACK):
        raise ValueError(f"unknown mode {mode}.")
    kernels.move_kept(mode, weight, mask, offsets, saved, _num_threads(None))


def _place_of(owner: Array | Tensor) -> Callable[[], int]:
    """Where memory lies: a tensor is asked each time, an array that is held stays where it is."""
    if isinstance(owner, np.ndarray):
        return partial(int, owner.__array_interface__["data"][0])
    return owner.data_ptr
