"""Running compiled loops in torch's own threads.

Numba's threads are not used: a second pool beside torch's fights with it for the cores (idle threads spin), and numba's
default pool must not be entered twice at once. The loops are plain C callbacks instead, which torch's OpenMP runtime
runs as a team.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, types
from numpy.typing import NDArray

_C_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_TINY_JOB = 1 << 15
"""Entries below which starting a second thread costs more than it saves."""


class CompiledLoop(NamedTuple):
    """A loop as C knows it; it is given the address of a job."""

    code: int
    call: Any
    keep: Any
    """What must live as long as the code."""


Kernel = Callable[[], CompiledLoop]


def compiled(function: Callable[..., None]) -> Kernel:
    """A C function, compiled (or read from the cache on disk) when it is first asked for."""

    @cache
    def kernel() -> CompiledLoop:
        signature = types.void(types.CPointer(types.int64))
        try:
            loop = cfunc(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no folder can be written to for the cache
            loop = cfunc(signature, error_model="numpy")(function)
        address: Any = loop.address
        return CompiledLoop(address, _C_KERNEL(address), loop)

    return kernel


def run(kernel: Kernel, job: NDArray[np.int64], num_chunks: int, num_entries: int, num_threads: int) -> None:
    """Run a kernel on a job in up to ``num_threads`` threads, this one included; the GIL is released."""
    loop, address = kernel(), job.__array_interface__["data"][0]
    num_threads = min(num_threads, num_chunks) if num_entries >= _TINY_JOB else 1
    if num_threads <= 1:
        loop.call(address)
        return
    team = _torch_team()
    if team is not None:
        team(loop.code, address, num_threads, 0)
        return
    others = [_helpers().submit(loop.call, address) for _ in range(num_threads - 1)]
    loop.call(address)
    for other in others:
        # One that has not started finds nothing left to do.
        if not other.cancel():
            other.result()


@cache
def _torch_team() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch itself is linked with; None where it has another."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    team.restype = None
    return team


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="mediator_peft")
