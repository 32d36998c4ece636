"""A bounded number of experts in memory: deltas lie in memory-mapped files, and the least recently used are dropped.

A delta's tensors always point into its expert's mapping, so nothing can go wrong when an expert leaves memory while
somebody computes with it: what is missing is read again. Leaving and coming are hints to the operating system
(``madvise``); coming reads ahead in the order of the layers while the first of them are computed.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, OutputError
from ..forking import renew_after_fork

_ALIGNMENT = 64


def padded_size(num_bytes: int) -> int:
    """Room that a tensor takes in its expert's file."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class ExpertStore:
    """One mapped file an expert, of which a bounded number is held in memory, the last used.

    Args:
        max_resident: most experts in memory; more only while one batch needs more.
        folder: where the files go, best on a local disk; they are removed with the store. None takes a temporary one,
            which must not lie in memory itself.
        pinned: experts that stay in memory once they are there, and are brought there by :meth:`release`. They count
            towards ``max_resident``, which must leave room for one more.

    Raises:
        ConfigError: ``max_resident`` is no positive whole number, or leaves no room beside what is pinned.
        OutputError: the folder cannot be written.
    """

    def __init__(self, max_resident: int, folder: Path | str | None = None, pinned: Iterable[str] = ()) -> None:
        if isinstance(max_resident, bool) or not isinstance(max_resident, int) or max_resident < 1:
            raise ConfigError(f"max_resident_experts must be a whole number, 1 or more, got {max_resident!r}.")
        self.max_resident = max_resident
        self.pinned = tuple(dict.fromkeys(pinned))
        if len(self.pinned) >= max_resident:
            raise ConfigError(
                f"{len(self.pinned)} pinned deltas leave no room for others in max_resident_experts={max_resident} (an "
                "expert of a family has two, its own and the shared one). "
                f"Pin fewer, or hold {len(self.pinned) + 1} or more."
            )
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="experts-", dir=folder))
        except OSError as fault:
            raise OutputError(f"expert_folder {str(folder)!r} cannot be written: {fault.strerror or fault}.") from fault
        self._maps: dict[str, mmap.mmap] = {}
        self._ends: dict[str, int] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _remove_folder, self._folder, os.getpid())
        renew_after_fork(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertStore:
        # Copies of a model share its deltas, and with them these files.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped files belong to one process: a model that was pickled holds all of its deltas in memory.
        return (type(None), ())

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return (self._lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        self._lock = threading.Lock()

    @property
    def resident(self) -> list[str]:
        """Experts in memory, the last used at the end."""
        return list(self._used)

    def make_room(self, sizes: Mapping[str, int]) -> None:
        """Make the experts' files: name → bytes, each tensor's :func:`padded_size` counted.

        Raises:
            OutputError: the disk has no room for them.
        """
        for number, (name, size) in enumerate(sizes.items(), start=len(self._maps)):
            with open(self._folder / f"{number}.bin", "w+b") as file:
                _reserve(file.fileno(), max(size, 1))
                self._maps[name] = mmap.mmap(file.fileno(), 0)
            self._ends[name] = 0

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the expert's file; to be called layer by layer, in the order of use."""
        if not tensor.numel():
            return tensor
        start, source = self._ends[name], tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        room = np.frombuffer(self._maps[name], np.uint8, len(source), start)
        target = torch.from_numpy(room)
        target.copy_(source)
        self._ends[name] = start + padded_size(len(source))
        return target.view(tensor.dtype).reshape(tensor.shape)

    def release(self) -> None:
        """Write out what was kept, and let all of it leave memory but what is pinned."""
        with self._lock:
            for mapped in self._maps.values():
                mapped.flush()
                _advise(mapped, "MADV_DONTNEED")
            self._used.clear()
        self.use(self.pinned)

    def use(self, names: Iterable[str]) -> list[str]:
        """Hold these experts in memory, and let those go that were not used for the longest time.

        Returns:
            Those that were let go.
        """
        gone = []
        wanted = [name for name in names if name in self._maps]
        with self._lock:
            for name in wanted:
                if name not in self._used:
                    _advise(self._maps[name], "MADV_WILLNEED")
                self._used[name] = None
                self._used.move_to_end(name)
            for name in list(self._used):
                if len(self._used) <= self.max_resident:
                    break
                if name not in wanted and name not in self.pinned:
                    del self._used[name]
                    _advise(self._maps[name], "MADV_DONTNEED")
                    gone.append(name)
        return gone


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk for a file: a mapping onto a disk that is full ends the process with a bus error."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        os.truncate(descriptor, size)
    except OSError as fault:
        raise OutputError(
            f"the experts need {size / 1e9:.2f} GB on disk ({fault.strerror or fault}). Choose another disk "
            "(expert_folder=...), or keep all experts in memory (max_resident_experts=None)."
        ) from fault


def _remove_folder(folder: Path, owner: int) -> None:
    """Remove a store's folder; a forked child has the store of its parent, whose files they stay."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _advise(mapped: mmap.mmap, name: str) -> None:
    """A hint on all of a mapping, where the system knows it."""
    hint = getattr(mmap, name, None)
    if hint is not None:
        mapped.madvise(hint)
