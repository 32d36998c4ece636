"""Replacing several files of a folder together: after a kill it holds all old ones or all new ones."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError

WHOLE_FOLDERS = ("backbone",)
"""Folders that are replaced as a whole: shards of an old backbone must not stay beside those of a new one."""

_STAGING, _COMMITTED, _OLD = ".mediator-saving-", ".mediator-saved", ".mediator-old-"


@contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """A folder to fill. When the block ends well, what it holds takes its places in ``folder``, all or nothing.

    The files are written in a folder inside ``folder`` and brought to the disk. Renaming that folder to a fixed name
    decides: before it a kill leaves the old files, after it :func:`finish_replacing`, which every load and save calls,
    moves the new ones to their places. Our choice; it is a redo log with one entry.

    Args:
        folder: made if need be. Files in it that the block does not write stay.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_replacing(folder)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        lock = _lock(staging)
    except OSError as fault:
        raise OutputError(f"{str(folder)!r} cannot be written: {fault.strerror or fault}.") from fault
    try:
        yield staging
        _to_disk(staging)
        while True:
            try:
                staging.rename(folder / _COMMITTED)
                break
            except OSError:
                # Another process has just decided, too; its files come first.
                if not (folder / _COMMITTED).exists():
                    raise
                _move_in(folder)
        _sync_folder(folder)
        _move_in(folder)
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def write_replacing(path: Path, text: str) -> None:
    """Write a text file under a new name that becomes its own; see :func:`replaced_file`."""
    with replaced_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    """Write a figure of matplotlib in the format of its ending; see :func:`replaced_file`."""
    with replaced_file(path) as new:
        figure.savefig(new, format=path.suffix[1:].lower(), dpi=dpi)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """An empty file to fill. When the block ends well, it takes the place of ``path``: old or new, whole, after a kill.

    What links share with an old file is not written to. What killed processes left of earlier tries is cleared away.

    Raises:
        OSError: it cannot be written, or a device, a pipe or a folder is in its place.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "something that is no file is in its place", str(path))
    new, lock = _new_file(path)
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.new"):
            if left != new and left.is_file() and not left.is_symlink():
                with suppress(OSError):
                    _remove_unless_in_use(left)
        yield new
        _to_disk(new)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    finally:
        os.close(lock)


def _new_file(path: Path) -> tuple[Path, int]:
    """An empty file beside ``path``, and the descriptor that holds its lock."""
    while True:
        new = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _lock_file(descriptor, waits=True)
        if new.exists():
            return new, descriptor
        os.close(descriptor)  # another process took it for one that was left behind, before it was locked


def final_place(path: Path) -> Path:
    """Where a file or folder that is being written will lie in the end."""
    return Path(*[part for part in path.parts if not part.startswith(_STAGING)])


def finish_replacing(folder: Path) -> None:
    """Move what a killed process had decided to its places, and clear away what killed ones left behind.

    Raises:
        OutputError: something was decided, and this process may not write here.
    """
    if not folder.is_dir():
        return
    if (folder / _COMMITTED).is_symlink():
        raise OutputError(f"{str(folder / _COMMITTED)!r} is a link and was not made by a save. Take it away.")
    if (folder / _COMMITTED).is_dir():
        try:
            _move_in(folder)
        except OSError as fault:
            raise OutputError(
                f"a process was killed while it saved to {str(folder)!r}; what is left to do needs write access "
                f"({fault.strerror or fault})."
            ) from fault
    for left in [*folder.glob(f"{_STAGING}*"), *folder.glob(f"{_OLD}*")]:
        with suppress(OSError):
            _remove_unless_in_use(left)


def _move_in(folder: Path) -> None:
    """From the committed folder to their places. Two processes may do it at once."""
    committed = folder / _COMMITTED
    _merge(committed, folder)
    with suppress(OSError):  # the other one has removed it, or decided anew
        committed.rmdir()
    _sync_folder(folder)


def _merge(source: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        for entry in sorted(source.iterdir()):
            place = target / entry.name
            if entry.is_dir() and entry.name not in WHOLE_FOLDERS and place.is_dir():
                _merge(entry, place)
                with suppress(OSError):
                    entry.rmdir()
            elif place.is_dir() and not place.is_symlink():
                _swap_in(entry, place)
            else:
                if entry.is_dir() and place.is_symlink():
                    place.unlink()
                with suppress(FileNotFoundError):
                    os.replace(entry, place)


def _swap_in(entry: Path, place: Path) -> None:
    """A folder in another's place."""
    old = Path(tempfile.mkdtemp(prefix=_OLD, dir=place.parent))
    lock = _lock(old)
    try:
        with suppress(FileNotFoundError):
            place.rename(old / entry.name)
        with suppress(FileNotFoundError):
            entry.rename(place)
    finally:
        os.close(lock)
        shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    _lock_file(descriptor)
    return descriptor


def _lock_file(descriptor: int, waits: bool = False) -> bool:
    """Lock an open file or folder until it is closed; whether that was possible."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except (ImportError, OSError):  # Windows, some file systems, or locked by another
        return False
    return True


def _remove_unless_in_use(left: Path) -> None:
    descriptor = os.open(left, os.O_RDONLY)
    try:
        if _lock_file(descriptor):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    finally:
        os.close(descriptor)


def _to_disk(place: Path) -> None:
    for path in [*place.rglob("*"), place] if place.is_dir() else [place]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
