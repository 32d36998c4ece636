"""Worker processes of a build. The result does not depend on their number."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from ..deferred import torch, when_used
from ..errors import ConfigError, OutOfMemoryError
from ..kernels.dispatch import native

_PR_SET_PDEATHSIG = 1

# Set in the parent before it forks; a forked worker finds it as it was.
_work: Callable[[int], None] | None = None


def check_workers(workers: int) -> int:
    """The number of processes that will be used.

    Raises:
        ConfigError: not a whole number of 1 or more.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers must be a whole number, 1 or more, got {workers!r}.")
    return workers if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else 1


def run_all(work: Callable[[int], None], numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Call ``work(number)`` for all numbers, in this process or in several; gives each number when it is done.

    Args:
        work: must leave its results in files; what it returns is lost.
        numbers: the longest pieces of work first.
        workers: how many processes.

    Raises:
        OutOfMemoryError: a worker was killed.
        Exception: whatever ``work`` raised first.
    """
    if workers == 1 or len(numbers) < 2:
        for number in numbers:
            work(number)
            yield number
        return
    global _work
    _work = work
    native()  # loaded once, before there are several
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _begin, (os.getpid(),))
    try:
        futures = {pool.submit(_call, number): number for number in numbers}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as fault:
        raise OutOfMemoryError(
            "a worker process was killed, most likely for want of memory. Use fewer workers."
        ) from fault
    finally:
        pool.shutdown(cancel_futures=True)
        _work = None


def _begin(parent: int) -> None:
    """What a worker does first: die with its parent, and keep to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    when_used(lambda: torch.set_num_threads(1))


def _call(number: int) -> None:
    assert _work is not None
    _work(number)
