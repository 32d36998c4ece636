"""Scores of finished systems on disk, so that an evaluation that was stopped goes on with the next system."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .report import write_json
from .runner import AnsweredItem, SystemScore, TaskScore

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")


def checkpoint_identity(path: str | os.PathLike[str]) -> list[Any]:
    """Names, sizes and times of a folder's files: another checkpoint under the same name has others.

    Args:
        path: a folder; of a hub id, the id alone.
    """
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*") if file.suffix in _WEIGHT_SUFFIXES) if folder.is_dir() else []
    return [str(path), [[str(file.relative_to(folder)), *_state(file)] for file in files]]


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


class ScoreStore:
    """A folder with one file a system; the name holds a hash of all that its figures depend on."""

    def __init__(self, folder: Path, depends: Any) -> None:
        self._folder = folder
        self._depends = depends

    def find(self, system: str, depends: Any = "") -> SystemScore | None:
        """Scores that were kept; None where there are none, or the file is damaged."""
        path = self._path(system, depends)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            tasks = {name: _task_score(score) for name, score in found["tasks"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return SystemScore(found["name"], tasks)

    def keep(self, score: SystemScore, depends: Any = "") -> None:
        """Write the scores of a finished system."""
        write_json(asdict(score), self._path(score.name, depends))

    def clear(self) -> None:
        """Remove the folder: the evaluation is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, system: str, depends: Any) -> Path:
        text = json.dumps([self._depends, system, depends], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _task_score(found: dict[str, Any]) -> TaskScore:
    return TaskScore(**{**found, "items": [AnsweredItem(**item) for item in found["items"]]})
