"""Atomic output folders: written under a temporary name, renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from errno import ENOSPC
from pathlib import Path

from ..errors import CheckpointError, OutputError, OutputExistsError
from ..storage import FloatType
from .opening import Checkpoint
from .tensor_inventory import is_known

JOURNAL = ".journal"
"""Folder of what is needed only until an output is whole."""

MARKER = "made-by-mediator_peft"
"""Empty file in the journal: the working folder is ours, and may be cleared."""

_OWNER = "folder"
"""File in a journal that is taken out: which folder it was in."""

_PATIENCE = 1.0
"""Seconds for which the workers of a killed build may still hold its folder."""

EXTRA_TEMPLATES = "additional_chat_templates"
"""Folder of chat templates for special uses."""

# What makes a checkpoint folder complete besides weights and config.json.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


_NOT_COPIED = ("dtype", "torch_dtype", "transformers_weights")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its final name when the block ends well, and vanishes when it does not.

    Raises:
        OutputExistsError: there is something under the final name, or under the temporary one, already.
    """
    check_free(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as fault:
        raise OutputExistsError(f"{str(partial)!r} is in the way of a working folder. Move it away.") from fault
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    """Refuse an output that exists.

    Raises:
        OutputExistsError: it does.
    """
    if os.path.lexists(path):  # a link to nowhere is in the way, too
        raise OutputExistsError(f"output {str(path)!r} exists. Choose another folder, or delete this one first.")


@contextmanager
def resumable_folder(path: Path, key: str) -> Iterator[Path]:
    """A folder to fill, which outlives a kill: the same work finds it again and goes on.

    It gets its final name when the block ends well. It vanishes when the block raises an error, and stays for a later
    run when the process is interrupted or killed. Only folders that this function made are ever cleared: they carry
    ``MARKER`` in their journal.

    Args:
        path: final name.
        key: says which work this is; what other work left behind is cleared away.

    Raises:
        OutputExistsError: there is something under the final name, something that is not ours stands in the place of a
            working folder, or another process is at work on it.
        OutputError: it cannot be written.
    """
    check_free(path)
    check_working_folders(path)
    partial, aside = partial_name(path), _journal_aside(path)
    with _as_output_error(path):
        created = _make_parents(partial)
        lock = _lock(path, partial)
    try:
        with _as_output_error(path):
            check_free(path)
            check_working_folders(path)
            _take_back(aside, partial / JOURNAL)
            _clear_unless(partial, key)
            yield partial
            # One step takes the journal out, one gives the folder its name: after a kill between them, the journal
            # is put back, and nothing is made anew.
            (partial / JOURNAL / _OWNER).write_text(_identity(partial), encoding="ascii")
            (partial / JOURNAL).rename(aside)
            check_free(path)
            partial.rename(path)
            _remove_journal(aside)
    except Exception:
        _remove(partial)
        _remove_journal(aside)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(lock)


def partial_name(path: Path) -> Path:
    """What an output is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _journal_aside(path: Path) -> Path:
    """Where the journal of a whole output is for the moment in which the output gets its name."""
    return path.with_name(f".{path.name}.journal")


def check_working_folders(path: Path) -> None:
    """Refuse whatever stands in the place of a working folder and was not made by a build.

    Raises:
        OutputExistsError: a link, a file, or a folder with files in it and without our marker.
        OutputError: it cannot be looked at.
    """
    partial, aside = partial_name(path), _journal_aside(path)
    with _as_output_error(path):
        # In this order: a build that ends at this moment takes its journal out before its folder gets its name.
        ours = {partial: _is_own_partial(partial) or _belongs_to(aside, partial), aside: _is_own_journal(aside)}
        foreign = [folder for folder, is_ours in ours.items() if not is_ours and os.path.lexists(folder)]
    if foreign:
        raise OutputExistsError(
            f"{str(foreign[0])!r} is in the place of a working folder for output {str(path)!r}, and no build made it. "
            "Nothing was touched. Move it away, or choose another output."
        )


def _is_own_partial(folder: Path) -> bool:
    """Whether a folder can only be a build's: empty, or with its marked journal inside."""
    if not _is_plain_folder(folder):
        return False
    names = _names_in(folder)
    if names <= {JOURNAL}:  # killed right after the folder was made, or at the end of its removal
        return not names or _is_own_journal(folder / JOURNAL)
    return _is_marked(folder / JOURNAL)


def _is_own_journal(folder: Path) -> bool:
    return _is_plain_folder(folder) and (_is_marked(folder) or not _names_in(folder))


def _is_marked(journal: Path) -> bool:
    marker = journal / MARKER
    return _is_plain_folder(journal) and marker.is_file() and not marker.is_symlink()


def _belongs_to(aside: Path, partial: Path) -> bool:
    """Whether a journal was taken out of this very folder."""
    try:
        return _is_marked(aside) and (aside / _OWNER).read_text(encoding="ascii") == _identity(partial)
    except FileNotFoundError:
        return False


def _identity(folder: Path) -> str:
    found = os.lstat(folder)
    return f"{found.st_dev} {found.st_ino}"


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:  # just renamed by its build
        return set()


def _is_plain_folder(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def _make_parents(partial: Path) -> list[Path]:
    """Make a folder and those above it; gives back the new ones, innermost first."""
    missing = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    return [folder for folder in missing if folder != partial]


def _lock(path: Path, partial: Path) -> int:
    """Hold a folder for this process; a killed process lets go of it by itself, its workers a moment later."""
    patience = time.monotonic() + _PATIENCE
    while True:
        descriptor = _open_folder(partial)
        if _try_lock(descriptor):
            if descriptor is not None and _is_same(descriptor, partial):
                return descriptor
            # Whoever held it is done: it was renamed or removed meanwhile.
            _close(descriptor)
            check_free(path)
            check_working_folders(path)
            partial.mkdir(parents=True, exist_ok=True)
            continue
        _close(descriptor)
        if time.monotonic() >= patience:
            raise OutputExistsError(
                f"another process is building into {str(partial)!r}. Wait for it, or choose another output."
            )
        time.sleep(0.02)


def _open_folder(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return None


def _try_lock(descriptor: int | None) -> bool:
    if descriptor is None:
        return True
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except FileNotFoundError:
        return False


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _take_back(aside: Path, journal: Path) -> None:
    """Put a journal back that was taken out right before a kill; it belongs to nothing where the output was named."""
    if _belongs_to(aside, journal.parent) and not journal.exists():
        aside.rename(journal)
    elif aside.exists():
        _remove_journal(aside)


def _clear_unless(partial: Path, key: str) -> None:
    journal = partial / JOURNAL
    known = journal / "key"
    if known.is_file() and known.read_text(encoding="utf-8") == key:
        return
    _empty(partial)
    journal.mkdir(exist_ok=True)
    (journal / MARKER).touch()
    known.with_suffix(".new").write_text(key, encoding="utf-8")
    known.with_suffix(".new").rename(known)


def _empty(partial: Path) -> None:
    """Delete all but the marker, which goes last of all: whatever a kill leaves is known as ours."""
    journal = partial / JOURNAL
    leftovers = [path for path in partial.iterdir() if path != journal]
    if journal.is_dir():
        leftovers += [path for path in journal.iterdir() if path.name != MARKER]
    for leftover in leftovers:
        shutil.rmtree(leftover) if _is_plain_folder(leftover) else leftover.unlink()


def _remove(partial: Path) -> None:
    with suppress(OSError):
        _empty(partial)
    _remove_journal(partial / JOURNAL)
    with suppress(OSError):
        partial.rmdir()


def _remove_journal(journal: Path) -> None:
    """Delete a journal, its marker last."""
    with suppress(OSError):
        for path in journal.iterdir():
            if path.name != MARKER:
                path.unlink()
        (journal / MARKER).unlink(missing_ok=True)
        journal.rmdir()


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        hint = "Choose another folder." if fault.errno != ENOSPC else "Make room, or choose another disk."
        raise OutputError(f"output {str(path)!r} cannot be written: {fault.strerror or fault}. {hint}") from fault


def check_space(path: Path, num_bytes: int) -> None:
    """Refuse an output for which the disk has no room.

    Raises:
        OutputError: it has not.
    """
    with _as_output_error(path):
        free = free_space(path)
    if free < num_bytes:
        raise OutputError(
            f"output {str(path)!r} needs {num_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left. Make room, "
            "or choose another disk."
        ) from OSError(ENOSPC, os.strerror(ENOSPC))


def free_space(path: Path) -> int:
    """Bytes left on the disk where a path lies or will lie."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings next to a new backbone.

    Raises:
        CheckpointError: one of them cannot be read.
        OSError: one of them cannot be written.
    """
    for name in _side_files(source):
        path = source / name
        (target / name).parent.mkdir(exist_ok=True)
        try:
            with open(path, "rb"):
                pass
        except OSError as fault:
            raise CheckpointError(f"{path} cannot be read: {fault.strerror or fault}") from fault
        shutil.copyfile(path, target / name)


def side_files_size(source: Path) -> int:
    """Bytes that :func:`copy_side_files` copies."""
    return sum((source / name).stat().st_size for name in _side_files(source))


def _side_files(source: Path) -> list[str]:
    """Side files that a folder has, its named chat templates among them."""
    templates = sorted(path.name for path in (source / EXTRA_TEMPLATES).glob("*") if path.is_file())
    found = [name for name in SIDE_FILES if (source / name).is_file()]
    return found + [f"{EXTRA_TEMPLATES}/{name}" for name in templates]


def copy_model_config(folder: Path, base: Checkpoint, dtype: FloatType) -> None:
    """Write ``config.json`` of the backbone: that of the base, with the dtype in which the backbone is stored."""
    if not is_known(base.raw_config):
        plain = deepcopy(base.config)
        # The backbone is of transformers' own class, in files of the usual names, and not quantised.
        for name in ("auto_map", "transformers_weights", "quantization_config"):
            if hasattr(plain, name):
                delattr(plain, name)
        write_model_config(folder, plain, dtype)
        return
    settings = {key: value for key, value in base.raw_config.items() if key not in _NOT_COPIED}
    settings["dtype"] = str(dtype)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_model_config(folder: Path, config: object, kind: FloatType) -> None:
    """Write ``config.json`` of a backbone as transformers does, with the dtype it is stored in."""
    settings = deepcopy(config)
    settings.dtype = kind.torch  # type: ignore[attr-defined]
    settings.save_pretrained(folder)  # type: ignore[attr-defined]
