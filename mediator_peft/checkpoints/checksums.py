"""SHA-256 checksums of the files of an output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .adapter_files import ROUTER_PREFIX, WEIGHTS_FILE
from .headers import read_header

CHECKSUM_FILE = "checksums.json"
# Read into one buffer that stays in the core's cache: fresh memory for each piece would cost as much as the reading.
_CHUNK = 1 << 18


class RunningDigest:
    """SHA-256 of a file that is read on little by little, close behind others who read it: it is in memory still."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._place = 0

    def advance(self, stop: int | None = None) -> None:
        """Read on to a place in the file, by default to its end; what was read is not read again."""
        left = self.path.stat().st_size - self._place if stop is None else stop - self._place
        if left <= 0:
            return
        buffer = memoryview(bytearray(min(_CHUNK, left)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._place)
            while left > 0 and (count := file.readinto(buffer[: min(_CHUNK, left)])):
                self._digest.update(buffer[:count])
                self._place += count
                left -= count

    def hexdigest(self) -> str:
        """The checksum of the whole file."""
        self.advance()
        return self._digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return RunningDigest(path).hexdigest()


def bank_sha256(path: Path) -> str:
    """SHA-256 of an adapter file's deltas: their names and bytes. It outlasts the fitting of a router.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    tensors, _ = read_header(path)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        for name in sorted(tensors):
            if name.startswith(ROUTER_PREFIX):
                continue
            stored = tensors[name]
            digest.update(f"{name}\0{stored.dtype}\0{stored.shape}\0".encode())
            file.seek(stored.offset)
            left = stored.num_bytes
            while left:
                count = file.readinto(buffer[: min(_CHUNK, left)])
                if not count:
                    raise OSError(f"{path.name} was cut short while it was read")
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


def write_checksums(folder: Path, adapter: Path, backbone: Mapping[str, Path]) -> None:
    """Write ``checksums.json`` beside the adapter.

    Args:
        folder: of the output.
        adapter: folder of the adapter.
        backbone: name → file of weights.
    """
    others = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in backbone]
    known = {
        "backbone": {name: file_sha256(path) for name, path in sorted(backbone.items())},
        "other": {path.name: file_sha256(path) for path in others},
        "bank": bank_sha256(adapter / WEIGHTS_FILE),
    }
    (adapter / CHECKSUM_FILE).write_text(json.dumps(known, indent=2), encoding="utf-8")
