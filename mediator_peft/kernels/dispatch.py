"""Packed deltas at work: products, additions and expansion straight from the bitmaps, with no dense or indexed copy.

Everything here takes and gives numpy arrays on the CPU; bfloat16 travels as the uint16 with its bits. With numba the
work is done by compiled loops (``kernels_numba``), without it by plain numpy (``kernels_numpy``), which is many times
slower and gives the same up to the order of sums.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .numpy_kernels import CHUNK_ROWS, Array, DenseChunk, count_kept, dense_chunks, narrowed, row_offsets, widened

__all__ = [
    "GroupedProduct",
    "PackedDelta",
    "add_to",
    "added",
    "as_array",
    "expand",
    "has_compiled",
    "row_offsets",
    "sparse_product",
]

_FLOAT32 = (np.dtype(np.float32),)
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16))


@cache
def _compiled() -> ModuleType | None:
    """The compiled twins; None without numba or on a processor they do not know."""
    if sys.byteorder != "little":
        return None
    try:
        from . import llvm_numba as kernels_numba
    except ImportError as fault:
        warnings.warn(
            "Prompts that want different experts are computed by numpy, many times slower than by the compiled loops: "
            f"{fault}. Install numba (pip install numba), or silence this with warnings.filterwarnings.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return kernels_numba


def has_compiled() -> bool:
    """Whether the compiled loops are in use. The first call imports numba."""
    return _compiled() is not None


class _HoldsAddresses:
    """Copies and pickles leave out what only holds for these very arrays."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: None if key == "_made" else value for key, value in self.__dict__.items() if key != "fields"}


class PackedDelta(_HoldsAddresses):
    """One matrix's delta for one expert, ready for the kernels. Holds the arrays it is given and copies none of them.

    Args:
        mask: (O, ceil(I / 8)) uint8, bit j % 8 of byte j // 8 is column j; padding bits are 0.
        num_columns: I
        signs: (ceil(num_kept / 8),) uint8, a one for a negative entry, row by row; goes with ``scales``.
        scales: (O,) uint16, the bits of bfloat16.
        values: (num_kept,) float32, float16 or uint16 (the bits of bfloat16), row by row; instead of the other two.
        offsets: what :func:`row_offsets` gave for the mask; None computes it.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self,
        mask: Array,
        num_columns: int,
        *,
        signs: Array | None = None,
        scales: Array | None = None,
        values: Array | None = None,
        offsets: NDArray[np.int32] | None = None,
    ) -> None:
        self.shape = (len(mask), num_columns)
        self.mask = _checked("mask", mask, (np.uint8,), (len(mask), (num_columns + 7) // 8))
        if num_columns % 8 and (mask[:, -1] >> (num_columns % 8)).any():
            raise ValueError(f"the mask has ones beyond column {num_columns}; its padding bits must be 0.")
        offsets = row_offsets(mask) if offsets is None else offsets
        self.offsets = _checked("offsets", offsets, (np.int32,), (-(-len(mask) // CHUNK_ROWS),))
        num_kept = count_kept(mask, offsets)
        self.signs = self.scales = self.values = None
        if values is not None and signs is None and scales is None:
            self.values = _checked("values", values, _FLOATS, (num_kept,))
        elif values is None and signs is not None and scales is not None:
            self.signs = _checked("signs", signs, (np.uint8,), ((num_kept + 7) // 8,))
            self.scales = _checked("scales", scales, (np.uint16,), (len(mask),))
        else:
            raise ValueError("a delta has either signs and scales, or values.")

    @cached_property
    def fields(self) -> NDArray[np.int64]:
        """What the compiled loops know of this delta: addresses."""
        compiled = _compiled()
        assert compiled is not None
        source = self.signs if self.values is None else self.values
        assert source is not None
        form = "sign" if self.values is None else self.values.dtype.name
        return compiled.table(self.mask, form, source, self.scales, self.offsets)

    def chunks(self) -> Iterator[DenseChunk]:
        """The delta in plain numpy, 16 rows at a time."""
        return dense_chunks(self.mask, self.shape[1], self.signs, self.scales, self.values, self.offsets)


class GroupedProduct(_HoldsAddresses):
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
        if len({delta.values is None for delta in self.deltas}) > 1:
            raise ValueError("deltas of one layer are either all signs or all values.")
        for group_rows, group_coefficients in zip(self.rows, self.coefficients, strict=True):
            if group_rows.ndim != 1 or group_rows.shape != group_coefficients.shape:
                raise ValueError(f"rows have shape {group_rows.shape}, coefficients {group_coefficients.shape}.")
            if len(np.unique(group_rows)) < len(group_rows) or (group_rows < 0).any():
                raise ValueError(f"rows of one delta must differ and not be negative, got {group_rows.tolist()}.")
        self._min_batch = 1 + max((int(group.max()) for group in self.rows if len(group)), default=-1)
        self._is_sign = not self.deltas or self.deltas[0].values is None
        self._made: tuple[Any, NDArray[np.int64]] | None = None

    @cached_property
    def fields(self) -> NDArray[np.int64]:
        """What the compiled loops know of the deltas and their rows: addresses."""
        compiled = _compiled()
        assert compiled is not None
        return compiled.grouped_table([delta.fields for delta in self.deltas], self.rows, self.coefficients)

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32], num_threads: int | None = None) -> None:
        """``out[b] += coefficient * (S @ x[b])`` for every delta and each of its rows b.

        Args:
            x: (B, I) float32, rows contiguous.
            out: (B, O) float32, contiguous.
            num_threads: most threads to use; None takes as many as torch does.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if self._min_batch == 0 or not self.deltas[0].mask.size:
            return
        self._check_batch(len(x))
        num_outputs, num_inputs = self.deltas[0].shape
        _checked("x", x, _FLOAT32, (len(x), num_inputs))
        _writable("out", out, _FLOAT32, (len(x), num_outputs))
        if _compiled() is not None:
            self.multiply(torch.from_numpy(x), torch.from_numpy(out), num_threads=num_threads)
            return
        for delta, rows, coefficients in zip(self.deltas, self.rows, self.coefficients, strict=True):
            for columns, _, dense in delta.chunks():
                out[rows, columns] += coefficients[:, None] * (x[rows] @ dense.T)

    def multiply(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        num_threads: int | None = None,
    ) -> None:
        """As a call, by the compiled loops alone; with a weight, ``out`` is first set to ``x @ weight.T + bias``.

        Args:
            x: (B, I) float32, contiguous.
            out: (B, O) float32, contiguous.
            weight: (O, I) float32, float16 or bfloat16, contiguous; I a multiple of 16.
            bias: (O,) float32, goes with the weight.
            num_threads: most threads to use; None takes as many as torch does.
        """
        compiled = _compiled()
        assert compiled is not None
        self._check_batch(len(x))
        width = x.shape[1]
        if width % 64:
            # Vectors are read in whole words.
            x = torch.nn.functional.pad(x, (0, 64 - width % 64))
        rows = (x.data_ptr(), 4 * x.shape[1])
        threads = num_threads or torch.get_num_threads()
        job = self._job(out.shape[1], width, weight, bias)
        compiled.run_product(job, self._is_sign, rows, len(x), out.data_ptr(), threads)

    def _job(self, num_outputs: int, num_inputs: int, weight: Any, bias: Any) -> NDArray[np.int64]:
        """The job for one weight, kept for the next call."""
        key = (None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr())
        made = self._made
        if made is None or made[0] != key:
            compiled = _compiled()
            assert compiled is not None
            arrays = (None if weight is None else as_array(weight), None if bias is None else as_array(bias))
            fields = self.fields if self.deltas else np.zeros((0, compiled.DELTA_FIELDS), np.int64)
            self._made = made = (key, compiled.product_job(fields, (num_outputs, num_inputs), *arrays))
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
    """``weight += coefficient * S`` at the kept entries; no other is written, not even with its own value.

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
    _writable("weight", weight, _FLOATS, delta.shape)
    if not weight.size:
        return
    if (compiled := _compiled()) is not None:
        compiled.add_to(weight, delta.fields, coefficient, num_threads or torch.get_num_threads())
        return
    for rows, kept, dense in delta.chunks():
        total = widened(weight[rows][kept]) + np.float32(coefficient) * dense[kept]
        weight[rows][kept] = narrowed(total, weight.dtype)


def added(weight: torch.Tensor, delta: PackedDelta, coefficient: float) -> torch.Tensor:
    """``weight + coefficient * S`` as a new matrix, rounded once, by the compiled loops; they read the weight once.

    Args:
        weight: (O, I) float32, float16 or bfloat16, contiguous, on the CPU.
        delta: (O, I)
        coefficient: one number.
    """
    compiled = _compiled()
    assert compiled is not None
    result = torch.empty_like(weight)
    _checked("weight", as_array(weight), _FLOATS, delta.shape)
    arrays = as_array(result), delta.fields, coefficient, torch.get_num_threads(), as_array(weight)
    if result.numel():
        compiled.add_to(*arrays)
    return result


def expand(delta: PackedDelta) -> NDArray[np.float32]:
    """The delta as a plain matrix: (O, I) float32."""
    dense = np.zeros(delta.shape, np.float32)
    add_to(dense, delta, 1.0)
    return dense


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's memory as the kernels read it: bfloat16, which numpy does not know, as its bits."""
    plain = tensor.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _checked(name: str, array: Array, dtypes: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
    """The array, if the compiled loops can read it: they know nothing but an address."""
    if array.shape != shape or array.dtype not in dtypes or not (array.flags.c_contiguous and array.flags.aligned):
        names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(
            f"{name} must be an aligned, contiguous {names} array {shape}, got {array.dtype} {array.shape}."
        )
    return array


def _writable(name: str, array: Array, dtypes: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    if not _checked(name, array, dtypes, shape).flags.writeable:
        raise ValueError(f"{name} is read-only.")
