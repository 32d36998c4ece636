"""Processor time of the study, added up over all runs of its commands."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path

from ..evaluation.report import write_json


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def count_cost(path: Path, command: str) -> None:
    """Add this process's time to the command's in a file when it ends, however it ends but by a kill."""
    atexit.register(lambda: add_cost(path, command, cpu_seconds()))


def add_cost(path: Path, command: str, seconds: float) -> None:
    """Add seconds to a command's; the file has CPU hours by command, and their sum."""
    known = json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"] if path.exists() else {}
    known[command] = round(known.get(command, 0.0) + seconds, 1)
    write_json({"cpu_seconds": known, "cpu_hours": round(sum(known.values()) / 3600, 3)}, path)
