"""Locks in a forked child: it inherits them as they are, some held by threads that it does not have."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

_PATIENCE = 5.0
"""Seconds that a fork waits for all locks together."""


class HasLocks(Protocol):
    """Something that guards its state by locks."""

    def locks(self) -> Sequence[Any]:
        """Its locks, in the order in which they are taken."""

    def renew_locks(self) -> None:
        """Put new locks in the place of all, in a forked child, and drop what other threads were doing."""


class _AtFork:
    """Holds all locks while the process is forked, so that no state is copied half-way, and renews them in the child.

    A lock that is not had in time is renewed all the same: the child does not hang.
    """

    def __init__(self) -> None:
        self._owners: weakref.WeakKeyDictionary[HasLocks, int] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        self._held: list[Any] = []

    def register(self, owner: HasLocks, rank: int) -> None:
        with self._lock:
            self._owners[owner] = rank

    def _ordered(self) -> list[HasLocks]:
        return sorted(self._owners, key=lambda owner: self._owners[owner])

    def before(self) -> None:
        self._lock.acquire()
        deadline = time.monotonic() + _PATIENCE
        locks = [lock for owner in self._ordered() for lock in owner.locks()]
        self._held = [lock for lock in locks if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))]

    def after_in_parent(self) -> None:
        for lock in reversed(self._held):
            lock.release()
        self._held = []
        self._lock.release()

    def after_in_child(self) -> None:
        self._lock, self._held = threading.RLock(), []
        for owner in self._ordered():
            owner.renew_locks()


_at_fork = _AtFork()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_at_fork.before,
        after_in_parent=_at_fork.after_in_parent,
        after_in_child=_at_fork.after_in_child,
    )


def renew_after_fork(owner: HasLocks, rank: int = 1) -> None:
    """Give ``owner`` new locks in every forked child, for as long as it lives.

    Args:
        owner: held weakly.
        rank: those of lower rank are locked first, as threads do it, too.
    """
    _at_fork.register(owner, rank)
