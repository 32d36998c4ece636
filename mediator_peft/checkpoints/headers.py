"""Reading and writing of safetensors headers. Headers of others are validated, never trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

_ALL_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
_ALL_SIZES |= {"I64": 8, "U64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# Largest first: the order in which the safetensors library lays tensors out, then by name.
_LAYOUT_ORDER = ("F64", "F32", "BF16", "F16", "U8")
_MAX_HEADER = 100_000_000
_MAX_LENGTH = 1 << 40
_LFS = b"version https://git-lfs.github.com/"


class Stored(NamedTuple):
    """Where one tensor lies in its file."""

    dtype: str
    """As the format calls it, e.g. ``BF16``."""

    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""

    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors of a file and its metadata.

    Raises:
        ValueError: the file is no whole safetensors file; the message says in which way.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError("it is no plain file")
    if is_lfs_pointer(path):
        raise ValueError("it is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"no safetensors header in its {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"its header is no JSON: {fault}") from fault
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    tensors = {name: _stored(name, entry, start, size) for name, entry in header.items()}
    end = max((stored.offset + stored.num_bytes for stored in tensors.values()), default=start)
    if end != size:
        raise ValueError(f"it has {size} bytes, its header speaks of {end}")
    return tensors, metadata


def _stored(name: str, entry: object, start: int, size: int) -> Stored:
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))  # type: ignore[index]
        begin, end = map(int, entry["data_offsets"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError) as fault:
        raise ValueError(f"the header's entry {name!r} is malformed") from fault
    expected = prod(shape) * _ALL_SIZES.get(dtype, 0)
    if begin < 0 or end < begin or min(shape, default=0) < 0 or (dtype in _ALL_SIZES and end - begin != expected):
        raise ValueError(f"the header's entry {name!r} has offsets that do not fit its shape")
    if max(shape, default=0) > _MAX_LENGTH:
        raise ValueError(f"the header's entry {name!r} has the shape {list(shape)}, which no tensor has")
    if start + end > size:
        raise ValueError(f"it has {size} bytes, its header speaks of {start + end} or more")
    return Stored(dtype, shape, start + begin, end - begin)


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Stored]]:
    """The head of a file that will hold these tensors, and where each will lie; as ``safetensors`` itself would.

    Args:
        tensors: name → (the format's name of its dtype, shape)
        metadata: of the file; by default that of a checkpoint.
    """
    ordered = sorted(tensors, key=lambda name: (_LAYOUT_ORDER.index(tensors[name][0]), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in ordered:
        dtype, shape = tensors[name]
        begin, end = end, end + prod(shape) * _ALL_SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = (begin, end)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    stored = {name: Stored(*tensors[name], len(head) + begin, end - begin) for name, (begin, end) in places.items()}
    return head, stored


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file only says where Git LFS keeps the real one."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS
    return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        if not path.is_file():  # reading a pipe would wait for ever
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
