"""The native kernels (``native/``, C++), called through ctypes.

The C side receives addresses only: ``dispatch`` and ``build_loops`` check every array first (:func:`check`). Addresses
are taken anew at each call from the arrays that own the memory; none is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..storage import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIGN = 0
FORMS = {np.dtype("float32"): 1, np.dtype("float16"): 2, np.dtype("uint16"): 3}
"""Codes of how numbers are stored; bfloat16 comes as the uint16 with its bits."""

_Byte = ctypes.c_char

_FOLDER = Path(__file__).parent
_LIBRARY_NAMES = ("_native.so", "_native.dylib", "_native.dll")
_CHUNK_ROWS = 16


class _Delta(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("entry_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("form", ctypes.c_int64),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        ("delta", _Delta),
        ("rows", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_form", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("num_groups", ctypes.c_int64),
    ]


class _Addition(ctypes.Structure):
    _fields_ = [
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("delta", _Delta),
        ("coefficient", ctypes.c_float),
        ("unused", ctypes.c_int32),
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("form", ctypes.c_int64),
    ]


class _Change(ctypes.Structure):
    _fields_ = [
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("delta", _Delta),
        ("coefficient", ctypes.c_float),
        ("low_bits", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("marks", ctypes.c_void_p),
        ("mode", ctypes.c_int64),
    ]


class _Move(ctypes.Structure):
    _fields_ = [
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("num_saved", ctypes.c_int64),
        ("item_size", ctypes.c_int64),
        ("mode", ctypes.c_int64),
    ]


class _Mark(ctypes.Structure):
    _fields_ = [
        ("minuend", ctypes.c_void_p),
        ("subtrahend", ctypes.c_void_p),
        ("negative", ctypes.c_void_p),
        ("above", ctypes.c_void_p),
        ("inside", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("num_above", ctypes.c_int64),
        ("num_inside", ctypes.c_int64),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "product": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
    "addition": [ctypes.c_void_p, ctypes.c_int64],
    "change": [ctypes.c_void_p, ctypes.c_int64],
    "move": [ctypes.c_void_p, ctypes.c_int64],
    "mark": [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
    "merge": [ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_void_p],
    "narrow": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "take_bits": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "put_bits": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
    "count_rows": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
    "keep_first": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
    "find_ranked": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p],
    "sha256": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
    "use_host_team": [ctypes.c_void_p],
}


class NativeKernelsMissing(ImportError):
    """The native kernels cannot be used; the message says why."""


def source_digest() -> str | None:
    """Of the C++ sources beside this file; None where they were not installed."""
    digest = hashlib.sha256()
    paths = sorted((_FOLDER / "native").glob("*.*"))
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16] if paths else None


@cache
def library() -> ctypes.CDLL:
    """The library, with the instruction set chosen (``MEDIATOR_PEFT_ISA`` forces one).

    Raises:
        NativeKernelsMissing: there is none, it was made from other sources, or the processor lacks what was asked for.
    """
    if sys.byteorder != "little":
        raise NativeKernelsMissing("they need a little-endian processor")
    path = next((_FOLDER / name for name in _LIBRARY_NAMES if (_FOLDER / name).is_file()), None)
    if path is None:
        raise NativeKernelsMissing("they were not compiled when the package was installed (no C++17 compiler)")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as fault:
        raise NativeKernelsMissing(f"{path} cannot be loaded: {fault}") from fault
    loaded.mediator_source_digest.restype = loaded.mediator_use_isa.restype = ctypes.c_char_p
    loaded.mediator_use_isa.argtypes = [ctypes.c_char_p]
    expected = source_digest()
    if expected is not None and loaded.mediator_source_digest().decode() != expected:
        raise NativeKernelsMissing(f"{path.name} was made from other sources than those beside it")
    wanted = os.environ.get("MEDIATOR_PEFT_ISA", "")
    if loaded.mediator_use_isa(wanted.encode()) is None:
        raise NativeKernelsMissing(f"this processor or library has no instruction set MEDIATOR_PEFT_ISA={wanted!r}")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, f"mediator_{name}")
        function.argtypes, function.restype = arguments, None
    loaded.mediator_has_sha256.restype = ctypes.c_int64
    return loaded


def instruction_set() -> str:
    """Name of the instruction set in use: ``avx512``, ``avx2``, ``neon`` or ``baseline``."""
    return library().mediator_use_isa(os.environ.get("MEDIATOR_PEFT_ISA", "").encode()).decode()


@cache
def _torch_team() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch is linked with; None where it has another."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(os, "RTLD_NOLOAD"):
        return None
    path = Path(torch.__file__ or "").parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(team, ctypes.c_void_p).value


def use_own_threads(own: bool = True) -> None:
    """Run kernels in threads of the library itself, or (``False``) in torch's own where these can be had.

    Torch's are taken unless this is called: a second pool of threads beside them fights with them for the cores.
    """
    _start_team()
    library().mediator_use_host_team(None if own else _torch_team())


@cache
def _start_team() -> None:
    library().mediator_use_host_team(_torch_team())


def address(array: Array) -> int:
    """Where an array's numbers lie now. The caller keeps the array alive while the address is in use."""
    try:
        return ctypes.addressof(_Byte.from_buffer(array))  # type: ignore[arg-type]  # an array has a buffer
    except (TypeError, ValueError):  # read-only, empty or with gaps: the same in four times the time
        return array.__array_interface__["data"][0]


@cache
def stored_as(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of :func:`as_array` for a tensor's: bfloat16 is seen as its bits."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(np.uint16) if name == "bfloat16" else np.dtype(name)


def check(name: str, array: Array | Tensor, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...]) -> None:
    """Refuse what the native kernels cannot read: they know nothing but an address.

    Raises:
        ValueError: dtype, shape or layout is another.
    """
    if isinstance(array, np.ndarray):
        fits = array.dtype in dtypes and array.flags.c_contiguous and array.flags.aligned
    else:
        fits = stored_as(array.dtype) in dtypes and array.is_contiguous() and array.device.type == "cpu"
    if not fits or tuple(array.shape) != shape:
        names = " or ".join(dtype.name for dtype in dtypes)
        raise ValueError(
            f"{name} must be an aligned, contiguous {names} array {shape}, got {array.dtype} {tuple(array.shape)}."
        )


def check_writable(name: str, array: Array, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...]) -> None:
    """The same, of what is written.

    Raises:
        ValueError: dtype, shape or layout is another, or the array is read-only.
    """
    check(name, array, dtypes, shape)
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only.")


class DeltaArrays(NamedTuple):
    """One delta as the kernels read it; checked by whoever makes it (``dispatch.PackedDelta``)."""

    mask: Array
    """(O, ceil(I / 8)) uint8"""

    entries: Array
    """Signs (uint8) or values, 1-D."""

    scales: Array | None
    """(O,) uint16, the bits of bfloat16, beside signs."""

    offsets: NDArray[np.int32]
    """(ceil(O / 16),)"""

    @property
    def form(self) -> int:
        """Code of how kept entries are stored."""
        return SIGN if self.scales is not None else FORMS[self.entries.dtype]


def _delta(arrays: DeltaArrays) -> _Delta:
    mask, entries, scales, offsets = arrays
    return _Delta(
        address(mask),
        address(entries),
        entries.nbytes,
        None if scales is None else address(scales),
        address(offsets),
        arrays.form,
    )


class ProductJob:
    """A grouped product but for input and output: a C structure, and the arrays that it points into."""

    def __init__(
        self,
        shape: tuple[int, int],
        deltas: Sequence[DeltaArrays],
        rows: Sequence[NDArray[np.int64]],
        coefficients: Sequence[NDArray[np.float32]],
        weight: Array | None = None,
        bias: NDArray[np.float32] | None = None,
    ) -> None:
        self._alive = (tuple(deltas), tuple(rows), tuple(coefficients), weight, bias)
        groups = [
            _Group(_delta(delta), address(group_rows), address(factors), len(group_rows))
            for delta, group_rows, factors in zip(deltas, rows, coefficients, strict=True)
        ]
        self._groups = (_Group * len(groups))(*groups)
        self._product = _Product(
            *shape,
            None if weight is None else address(weight),
            0 if weight is None else FORMS[weight.dtype],
            None if bias is None else address(bias),
            ctypes.addressof(self._groups),
            len(groups),
        )
        self._address = ctypes.addressof(self._product)
        self._run = library().mediator_product
        _start_team()

    def run(self, x: int, batch_size: int, out: int, num_threads: int) -> None:
        """Compute; threads may share a job.

        Args:
            x: address of (batch_size, I) float32.
            batch_size: larger than every row that is named.
            out: address of (batch_size, O) float32.
            num_threads: most threads to use.
        """
        self._run(self._address, x, batch_size, out, num_threads)


def add(
    target: Array,
    delta: DeltaArrays,
    coefficient: float,
    num_threads: int,
    source: Array | None = None,
    first_row: int = 0,
) -> None:
    """``target = source + coefficient * S``; without a source, ``target += coefficient * S``.

    Args:
        target: (r, I) float32, float16 or uint16 (the bits of bfloat16).
        delta: (O, I), of which rows ``first_row`` to ``first_row + r`` are added.
        coefficient: one number.
        num_threads: most threads to use.
        source: of the target's shape and dtype.
        first_row: a multiple of 16.
    """
    mask, _, scales, offsets = delta
    if first_row % _CHUNK_ROWS or first_row + len(target) > len(mask):
        raise ValueError(
            f"rows {first_row} to {first_row + len(target)} of {len(mask)} must begin at a multiple of 16."
        )
    part = _delta(delta)
    part.mask = address(mask) + first_row * mask.shape[1]
    part.scales = None if scales is None else address(scales) + 2 * first_row
    part.offsets = address(offsets) + 4 * (first_row // _CHUNK_ROWS)
    read = target if source is None else source
    job = _Addition(
        *target.shape, part, coefficient, 0, address(read), address(target), FORMS[target.dtype]
    )  # fmt: skip
    _start_team()
    library().mediator_addition(ctypes.addressof(job), num_threads)


def change(
    mode: int,
    weight: NDArray[np.float32],
    delta: DeltaArrays,
    coefficient: float,
    low_bits: int,
    marks: NDArray[np.uint8],
    num_threads: int,
) -> None:
    """Add a delta such that it can be computed back, or take it out; see ``dispatch.change``."""
    job = _Change(*weight.shape, _delta(delta), coefficient, low_bits, address(weight), address(marks), mode)
    _start_team()
    library().mediator_change(ctypes.addressof(job), num_threads)


def move_kept(
    mode: int, weight: Array, mask: Array, offsets: NDArray[np.int32], saved: Array, num_threads: int
) -> None:
    """Copy the kept entries of a weight out of it or back; see ``dispatch.move_kept``."""
    places = (address(mask), address(offsets), address(weight), address(saved))
    job = _Move(*weight.shape, *places, len(saved), weight.itemsize, mode)
    _start_team()
    library().mediator_move(ctypes.addressof(job), num_threads)


def mark_tile(jobs: Sequence[Any]) -> list[tuple[int, int]]:
    """Mark rows of several differences; see ``numpy_kernels.mark_tile``."""
    if not jobs:
        return []
    table = (_Mark * len(jobs))(*(_Mark(*map(address, job[:7]), *job[7:]) for job in jobs))
    rows, columns = jobs[0].minuend.shape
    form = FORMS[jobs[0].minuend.dtype]
    library().mediator_mark(form, rows, columns, ctypes.addressof(table), len(jobs))
    return [(done.num_above, done.num_inside) for done in table]


def merge_tile(sources: Sequence[Array], is_mean: bool, backbone: Array, energies: NDArray[np.float64]) -> None:
    """Merge rows of weights; see ``numpy_kernels.merge_tile``."""
    places = (ctypes.c_void_p * len(sources))(*map(address, sources))
    rows, columns = backbone.shape
    form, num_experts = FORMS[backbone.dtype], len(sources) - 1
    library().mediator_merge(
        form, ctypes.addressof(places), num_experts, is_mean, rows, columns, address(backbone), address(energies)
    )


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Contiguous numbers rounded to nearest even; see ``build_loops.rounded``."""
    rounded = np.empty(values.shape, np.uint16)
    library().mediator_narrow(address(values), values.size, address(rounded))
    return rounded


def take_bits(bitmap: Array, mask: Array, num_ones: int) -> Array:
    """Bits of a bitmap where a mask has ones; see ``numpy_kernels.take_bits``."""
    target = np.empty((num_ones + 63) // 64, np.uint64)
    library().mediator_take_bits(address(bitmap), address(mask), mask.size, address(target))
    return target.view(np.uint8)[: (num_ones + 7) // 8]


def put_bits(bits: Array, mask: Array) -> None:
    """Write bits over the ones of a mask.

    Args:
        bits: (ceil(number of ones / 8),) uint8
        mask: contiguous uint8, changed in place.
    """
    library().mediator_put_bits(address(bits), bits.size, address(mask), mask.size)


def row_counts(bitmap: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Number of ones in each row of a contiguous bitmap (r, n): (r,)."""
    counts = np.empty(len(bitmap), np.int64)
    library().mediator_count_rows(address(bitmap), *bitmap.shape, address(counts))
    return counts


def keep_first(bitmap: NDArray[np.uint8], num_ones: int) -> None:
    """Clear all ones of a contiguous bitmap but the first ``num_ones``."""
    library().mediator_keep_first(address(bitmap), bitmap.size, num_ones)


def ranked(values: NDArray[np.float32], ranks: Sequence[int]) -> list[float]:
    """Numbers at some places of the ascending order; see ``selection.ranked``."""
    scratch, found = np.empty(values.size + 16, np.float32), np.empty(len(ranks), np.float32)
    places = (ctypes.c_int64 * len(ranks))(*ranks)
    library().mediator_find_ranked(
        address(values), values.size, ctypes.addressof(places), len(ranks), address(scratch), address(found)
    )
    numbers: list[float] = found.tolist()
    return numbers


@cache
def has_sha256() -> bool:
    """Whether the processor has instructions for SHA-256 that the library uses."""
    return bool(library().mediator_has_sha256())


def hash_blocks(states: Sequence[NDArray[np.uint32]], data: Sequence[NDArray[np.uint8]], num_blocks: int) -> None:
    """Take blocks of one to three streams into their states; see ``hashing``.

    Args:
        states: (8,) each, changed in place.
        data: (64 * num_blocks,) each or longer.
        num_blocks: of 64 bytes, from each.
    """
    places = (ctypes.c_void_p * len(states))(*map(address, states))
    sources = (ctypes.c_void_p * len(data))(*map(address, data))
    library().mediator_sha256(ctypes.addressof(places), ctypes.addressof(sources), len(states), num_blocks)
