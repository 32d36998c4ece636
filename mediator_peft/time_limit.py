"""A bound on the time of Python code that comes from a file, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(Exception):
    """Code ran longer than it may. Raised inside of that code."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block when it has run for so long.

    Python bytecode is interrupted in any thread; a single call into compiled code is not (our choice: signals would
    reach the main thread alone).

    Args:
        seconds: wall-clock time.

    Raises:
        TimeLimitExceeded: the time is over.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    is_done = False

    def interrupt() -> None:
        with lock:
            if not is_done:
                _raise_in(thread, TimeLimitExceeded)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_done = True
        timer.cancel()


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
