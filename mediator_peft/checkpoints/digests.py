"""Checksums of files that are taken while the files are read or written, so that none is read for them alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ..kernels.hashing import Sha256, update_all
from .checkpoint import Checkpoint

CHUNK = 1 << 18
"""Bytes read at a time, into a buffer that stays in the core's cache: fresh memory for each piece would cost as much as
the reading."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class RunningDigest:
    """Checksums of a file that is read or written little by little: its bytes are hashed while they are in memory.

    Args:
        path: of the file.
        with_quick: take its XXH3 as well.
        is_growing: the file is being written: what lies between two writes may not be there yet, and is not read
            before the end.
    """

    def __init__(self, path: Path, with_quick: bool = False, is_growing: bool = False) -> None:
        self.path = path
        self._is_growing = is_growing
        self._sha256 = Sha256()
        self._quick = xxhash.xxh3_128() if with_quick else None
        self._place = 0

    def advance(self, stop: int | None = None) -> None:
        """Read on to a place in the file, by default to its end; what was read is not read again."""
        left = self.path.stat().st_size - self._place if stop is None else stop - self._place
        if left <= 0:
            return
        buffer = memoryview(bytearray(min(CHUNK, left)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._place)
            while left > 0 and (count := file.readinto(buffer[: min(CHUNK, left)])):
                take_all([(self, self._place, buffer[:count])])
                left -= count

    def wants(self, start: int, data: memoryview) -> bool:
        """Whether bytes from this place on come next; a small gap before them is read first.

        Where they do, they must be hashed now: they count as taken.
        """
        if not self._is_growing and self._place < start <= self._place + CHUNK:
            self.advance(start)
        if self._place != start:
            return False
        if self._quick is not None:
            self._quick.update(data)
        self._place += len(data)
        return True

    def hexdigest(self) -> str:
        """The SHA-256 of the whole file."""
        self.advance()
        return self._sha256.hexdigest()

    def quick(self) -> str:
        """The XXH3 of the whole file."""
        assert self._quick is not None
        self.advance()
        return self._quick.hexdigest()

    @property
    def sha256(self) -> Sha256:
        """Of what was taken so far."""
        return self._sha256


def take_all(shown: Iterable[tuple[RunningDigest, int, memoryview]]) -> None:
    """Hash bytes of several files side by side: (digest, place in its file, bytes).

    What does not follow closely on what a digest took before is ignored, and so are a digest's second bytes.
    """
    wanted: dict[RunningDigest, memoryview] = {}
    for digest, start, data in shown:
        if digest not in wanted and digest.wants(start, data):
            wanted[digest] = data
    update_all([(digest.sha256, data) for digest, data in wanted.items()])


class FileDigests:
    """The checksums of the files of weights that a build reads and writes, taken while their bytes are in memory.

    What a checkpoint has read is held until it reads the next, so that several files are hashed side by side.

    Args:
        checkpoints: the inputs.
        is_wanted: whether input files that do not carry their checksum in their name are read for it.
        written: files of the output.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint], is_wanted: bool, written: Iterable[Path] = ()) -> None:
        self._checkpoints = list(checkpoints)
        self.is_wanted = is_wanted
        self.written = {path.name: RunningDigest(path, with_quick=True, is_growing=True) for path in written}
        """File name → checksums, of the output."""
        self._running: dict[Path, RunningDigest] = {}
        """By file; none for files that carry their checksum in their name."""
        self._shown: dict[int, tuple[RunningDigest, int, memoryview]] = {}
        """By checkpoint: what it read last, in its buffer."""
        for path in (path for checkpoint in self._checkpoints for path in checkpoint.files):
            if is_wanted and _named_sha256(path) is None:
                self._of(path)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take what is read of the files within the block, as far as it is read in order."""
        for checkpoint in self._checkpoints if self.is_wanted else ():
            checkpoint.watch(self)
        try:
            yield
        finally:
            for checkpoint in self._checkpoints:
                checkpoint.watch(None)
            self._take_shown()

    def before_reading(self, checkpoint: Checkpoint) -> None:
        """Take what lies in a checkpoint's buffer, and what is shown of the others: they are hashed side by side."""
        if id(checkpoint) in self._shown:
            self._take_shown()

    def show(self, checkpoint: Checkpoint, path: Path, start: int, data: memoryview) -> None:
        """Hold bytes that a checkpoint has read until it reads the next."""
        if path in self._running:
            self._shown[id(checkpoint)] = self._running[path], start, data

    def wrote(self, path: Path, start: int, data: memoryview) -> None:
        """Hash bytes that were written to a place in a file of the output, beside all that is shown."""
        self._take_shown((self.written[path.name], start, data))

    def _take_shown(self, *others: tuple[RunningDigest, int, memoryview]) -> None:
        shown = [*self._shown.values(), *others]
        self._shown.clear()
        take_all(shown)

    def follow(self, name: str) -> None:
        """Read on in every file to the end of a tensor that was just read."""
        for checkpoint in self._checkpoints if self.is_wanted else ():
            place = checkpoint.place(name)
            if place is not None and _named_sha256(place[0]) is None:
                self._of(place[0]).advance(place[1])

    def sha256(self, path: Path) -> str | None:
        """Checksum of an input file; None where it is not wanted."""
        return _named_sha256(path) or (self._of(path).hexdigest() if self.is_wanted else None)

    def _of(self, path: Path) -> RunningDigest:
        return self._running.setdefault(path, RunningDigest(path))


def _named_sha256(path: Path) -> str | None:
    """The hub's cache names large files by their checksum."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None
