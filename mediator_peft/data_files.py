"""Reading files that users write: ordinary files only, UTF-8, with a bound on every line; faults name file and line."""

from __future__ import annotations

import codecs
import csv
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

from .errors import MediatorError

LONGEST_LINE = 1 << 24
"""Bytes of one line; a file without line breaks would otherwise be read whole."""

LARGEST_DOCUMENT = 1 << 28
"""Bytes of a file that must be read whole: JSON arrays, plans."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class DataFileError(MediatorError, ValueError):
    """A file of prompts, tasks or settings cannot be used; the message names file and lines."""


class MalformedJsonError(ValueError):
    """A text is not JSON, or nothing that can be read within bounds; the message says why."""


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open an ordinary file for reading. Pipes, devices and folders are refused, and opening one never blocks.

    Raises:
        DataFileError: it is missing, no ordinary file, or not readable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataFileError(f"no file {os.fspath(path)!r}. Check the path.") from None
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise DataFileError(f"{os.fspath(path)!r} cannot be read: {reason}.") from fault
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataFileError(f"{os.fspath(path)!r} is {kind}, not a file. Write the data to a file first.")
    return os.fdopen(descriptor, "rb")


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_DOCUMENT) -> str:
    """The text of a small file; a byte-order mark is taken off.

    Raises:
        DataFileError: it cannot be read, is not UTF-8, or is larger than ``limit`` bytes.
    """
    with open_file(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as fault:
            raise DataFileError(f"{os.fspath(path)!r} cannot be read: {fault.strerror}.") from fault
    if len(data) > limit:
        raise DataFileError(f"{os.fspath(path)!r} is larger than {limit:,} bytes, the most that is read.")
    return _decoded(data, f"{os.fspath(path)!r}", is_first=True)


def text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line, streamed; a byte-order mark is taken off.

    Raises:
        DataFileError: the file cannot be read, is not UTF-8, or has a line longer than ``LONGEST_LINE``.
    """
    with open_file(path) as file:
        number = 0
        while True:
            number += 1
            where = f"{os.fspath(path)}, line {number}"
            try:
                line = file.readline(LONGEST_LINE + 1)
            except OSError as fault:
                raise DataFileError(f"{where}: cannot be read: {fault.strerror}.") from fault
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise DataFileError(f"{where}: longer than {LONGEST_LINE:,} bytes. Write one record a line.")
            yield number, _decoded(line, where, is_first=number == 1)


def _decoded(data: bytes, where: str, is_first: bool) -> str:
    if is_first:
        data = data.removeprefix(codecs.BOM_UTF8)
        if data.startswith(_UTF16):
            raise DataFileError(f"{where}: this is UTF-16 text. Save the file as UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataFileError(
            f"{where}: not UTF-8 text (byte 0x{data[fault.start]:02x} at byte {fault.start + 1}). Save the file as "
            "UTF-8, e.g. iconv -f LATIN1 -t UTF-8."
        ) from fault


def parse_json(text: str, unique_names: bool = False) -> Any:
    """A JSON value.

    Args:
        text: JSON.
        unique_names: refuse a name that comes twice in one object, of which JSON takes the last.

    Raises:
        MalformedJsonError: it is no JSON, is nested too deeply, or holds a number of thousands of digits; a name comes
            twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_with_unique_names if unique_names else None)
    except MalformedJsonError:
        raise
    except json.JSONDecodeError as fault:
        raise MalformedJsonError(f"{fault.msg} at column {fault.colno}") from fault
    except RecursionError as fault:
        raise MalformedJsonError("nested too deeply") from fault
    except ValueError as fault:  # int() refuses numbers of more digits than sys.get_int_max_str_digits()
        raise MalformedJsonError("a number has too many digits") from fault


def _with_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        name = next(name for name, number in counts.items() if number > 1)
        raise MalformedJsonError(f"the name {name[:80]!r} comes {counts[name]} times in one object")
    return found


def json_lines(path: str | os.PathLike[str], faults: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSONL file that holds JSON; what is wrong is added to ``faults``.

    Raises:
        DataFileError: the file cannot be read as lines of UTF-8 text.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except MalformedJsonError as fault:
            faults.append(f"line {number}: not JSON ({fault})")


def json_array(path: str | os.PathLike[str]) -> list[Any] | None:
    """The elements of a JSON file that holds one array; None where it holds something else, JSON lines perhaps.

    Raises:
        DataFileError: the file cannot be read, or begins as an array and is none.
    """
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return None
    try:
        return list(parse_json(text))
    except MalformedJsonError as fault:
        raise DataFileError(f"{os.fspath(path)}: not JSON ({fault}). Save it again, or write JSON lines.") from fault


def csv_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column → text) of each row of a CSV file whose first line names the columns.

    Raises:
        DataFileError: the file cannot be read, has no header, or has a row of another length.
    """
    reader = csv.reader(_lines_without_nul(path), strict=True)
    names: list[str] | None = None
    rows = iter(reader)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as fault:
            raise DataFileError(
                f"{os.fspath(path)}, line {reader.line_num}: no CSV ({fault}). Quote cells that hold quotes or line "
                "breaks, or write JSONL."
            ) from fault
        if not row:
            continue
        if names is None:
            names = row
            if len(set(names)) < len(names):
                raise DataFileError(f"{os.fspath(path)}, line {reader.line_num}: two columns have one name: {names}.")
            continue
        if len(row) != len(names):
            raise DataFileError(
                f"{os.fspath(path)}, line {reader.line_num}: {len(row)} cells, but the header names {len(names)} "
                "columns. Quote cells that hold commas or line breaks."
            )
        yield reader.line_num, dict(zip(names, row, strict=True))
    if names is None:
        raise DataFileError(f"{os.fspath(path)} is empty. Its first line must name the columns.")


def _lines_without_nul(path: str | os.PathLike[str]) -> Iterator[str]:
    for number, line in text_lines(path):
        if "\0" in line:  # not all versions of the csv module refuse it
            raise DataFileError(
                f"{os.fspath(path)}, line {number}: no CSV (it holds zero bytes). Write the file again."
            )
        yield line


def text_fault(value: object) -> str | None:
    """Why a value is no text that a tokenizer takes; None where it is one."""
    if not isinstance(value, str) or not value.strip():
        return f"must be a text that is not empty, got {short(value)}"
    return surrogate_fault(value)


def surrogate_fault(text: str) -> str | None:
    """Why a text cannot be encoded; None where it can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        return (
            f"holds half of a character (\\u{ord(text[fault.start]):04x} without its partner) at character "
            f"{fault.start + 1}. Write the whole character, or take it out"
        )
    return None


def special_files(folder: Path) -> list[str]:
    """Pipes, sockets and devices directly in a folder, to which opening may block for ever."""
    found: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                mode = entry.stat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    found.append(entry.path)
    return sorted(found)
