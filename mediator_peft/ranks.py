"""Ranks of torchrun: they share tensors or prompts; the first one writes the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
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

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself, whoever started it."""
        ranks = cls()
        ranks._dist, ranks.count, ranks.number = None, 1, 0
        return ranks

    def share(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]]) -> list[Result]:
        """Every rank does some of the items; all get the results of all.

        Args:
            items: the same on every rank, in the same order.
            work: some of the items → their results, in order. An error of one rank is raised on all.

        Returns:
            One result an item, in the order of the items.
        """
        found: list[Result] = []
        results: dict[int, Result] = {}

        def mine() -> None:
            found.extend(work(items[self.number :: self.count]))

        self.all(mine)
        parts: list[Any] = [found] * self.count
        if self._dist is not None:
            self._dist.all_gather_object(parts, found)
        for number, part in enumerate(parts):
            results.update(zip(range(number, len(items), self.count), part, strict=True))
        return [results[place] for place in range(len(items))]

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
