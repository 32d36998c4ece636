"""Atomic output folders: written under a temporary name, renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path

import torch

from ..errors import OutputError, OutputExistsError
from .opening import Checkpoint
from .tensor_inventory import is_known

JOURNAL = ".journal"
"""Folder of what is needed only until an output is whole."""

_PATIENCE = 1.0
"""Seconds for which the workers of a killed build may still hold its folder."""

# What makes a checkpoint folder complete besides weights and config.json.
_SIDE_FILES = (
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
)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its final name when the block ends well, and vanishes when it does not.

    Raises:
        OutputExistsError: there is something under the final name already.
    """
    check_free(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
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
    run when the process is interrupted or killed.

    Args:
        path: final name.
        key: says which work this is; what other work left behind is cleared away.

    Raises:
        OutputExistsError: there is something under the final name, or another process is at work on it.
        OutputError: it cannot be written.
    """
    check_free(path)
    partial = partial_name(path)
    with _as_output_error(path):
        created = _make_parents(partial)
        lock = _lock(partial)
    try:
        with _as_output_error(path):
            _clear_unless(partial, key)
            yield partial
            shutil.rmtree(partial / JOURNAL)
            check_free(path)
            partial.rename(path)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(lock)


def partial_name(path: Path) -> Path:
    """What an output is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _make_parents(partial: Path) -> list[Path]:
    """Make a folder and those above it; gives back the new ones, innermost first."""
    missing = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    return [folder for folder in missing if folder != partial]


def _lock(partial: Path) -> int:
    """Hold a folder for this process; a killed process lets go of it by itself, its workers a moment later."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return descriptor
    patience = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as fault:
            if time.monotonic() < patience:
                time.sleep(0.02)
                continue
            os.close(descriptor)
            raise OutputExistsError(
                f"another process is building into {str(partial)!r}. Wait for it, or choose another output."
            ) from fault


def _clear_unless(partial: Path, key: str) -> None:
    journal = partial / JOURNAL
    known = journal / "key"
    if known.is_file() and known.read_text(encoding="utf-8") == key:
        return
    for leftover in partial.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    journal.mkdir()
    known.with_suffix(".new").write_text(key, encoding="utf-8")
    known.with_suffix(".new").rename(known)


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
    """Copy tokenizer and generation settings next to a new backbone."""
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def side_files_size(source: Path) -> int:
    """Bytes that :func:`copy_side_files` copies."""
    return sum((source / name).stat().st_size for name in _SIDE_FILES if (source / name).is_file())


def copy_model_config(folder: Path, base: Checkpoint, dtype: torch.dtype) -> None:
    """Write ``config.json`` of the backbone: that of the base, with the dtype in which the backbone is stored."""
    if not is_known(base.raw_config):
        write_model_config(folder, base.config, dtype)
        return
    settings = {key: value for key, value in base.raw_config.items() if key not in ("dtype", "torch_dtype")}
    settings["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_model_config(folder: Path, config: object, dtype: torch.dtype) -> None:
    """Write ``config.json`` of a backbone as transformers does, with the dtype it is stored in."""
    from copy import deepcopy

    settings = deepcopy(config)
    settings.dtype = dtype  # type: ignore[attr-defined]
    settings.save_pretrained(folder)  # type: ignore[attr-defined]
