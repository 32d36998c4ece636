"""The native kernels (``native/``, C++), called through ctypes.

Every array is checked here before its address is passed on: the other side knows nothing but addresses. Addresses are
taken anew at each call from the arrays that own the memory; none is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FORMS = {"sign": 0, "float32": 1, "float16": 2, "uint16": 3}
"""Codes by name of the dtype; bfloat16 comes as the uint16 with its bits."""

ADD_OR_MARK, ADD_MARKED, TAKE_UNMARKED = range(3)
SAVE, BRING_BACK = range(2)

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
    "merge": [ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_void_p],
    "take_bits": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "put_bits": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
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
    return loaded


def instruction_set() -> str:
    """Name of the instruction set in use: ``avx512``, ``avx2``, ``neon`` or ``baseline``."""
    return library().mediator_use_isa(os.environ.get("MEDIATOR_PEFT_ISA", "").encode()).decode()


@cache
def _use_torch_team() -> None:
    """Run kernels in the threads of the OpenMP runtime that torch is linked with, where there is one such.

    A second pool of threads beside torch's fights with it for the cores.
    """
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(os, "RTLD_NOLOAD"):
        return
    path = Path(torch.__file__ or "").parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return
    library().mediator_use_host_team(ctypes.cast(team, ctypes.c_void_p))


def use_own_threads() -> None:
    """Run kernels in threads of the library itself, whatever torch has."""
    _use_torch_team()
    library().mediator_use_host_team(None)


def address(array: Array) -> int:
    """Where an array's numbers lie now. The caller keeps the array alive while the address is in use."""
    return array.__array_interface__["data"][0]


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
        return FORMS["sign" if self.scales is not None else self.entries.dtype.name]


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
