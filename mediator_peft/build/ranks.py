"""Processes that torchrun started: they share the tensors out and write into one folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Ranks:
    """This process among its like; alone where torch.distributed was not started.

    All ranks must see the same file system.
    """

    def __init__(self) -> None:
        # Whoever started it has imported it.
        dist: Any = sys.modules.get("torch.distributed")
        started = dist is not None and dist.is_available() and dist.is_initialized()
        self._dist: Any = dist if started else None
        self.count, self.number = 1, 0
        if self._dist is not None:
            self.count, self.number = self._dist.get_world_size(), self._dist.get_rank()

    def first(self, work: Callable[[], Result]) -> Result:
        """Do something on the first rank only; every rank gets the result, or the error."""
        outcome: list[Any] = [None, None]
        if self.number == 0:
            try:
                outcome[0] = work()
            except Exception as fault:
                if self.count == 1:
                    raise
                outcome[1] = fault
        if self._dist is not None:
            self._dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all(self, work: Callable[[], object]) -> None:
        """Do something on every rank, and wait for the others; an error of one is raised on all."""
        fault: Exception | None = None
        try:
            work()
        except Exception as raised:
            if self.count == 1:
                raise
            fault = raised
        faults: list[Exception | None] = [None] * self.count
        if self._dist is not None:
            self._dist.all_gather_object(faults, fault)
        for other in faults:
            if other is not None:
                raise other
