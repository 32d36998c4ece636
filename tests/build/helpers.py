"""What the tests of the build share."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mediator_peft import MediatorConfig, build_mediator

EXPERTS = ("math", "code", "law")


def experts_of(paths: dict[str, Path]) -> dict[str, Path]:
    """All checkpoints but the base."""
    return {name: path for name, path in paths.items() if name != "base"}


def build(paths: dict[str, Path], output: Path, settings: dict | None = None, **options):  # type: ignore[no-untyped-def]
    """``build_mediator`` on what ``write_tiny_checkpoints`` wrote."""
    return build_mediator(paths["base"], experts_of(paths), output, MediatorConfig(**(settings or {})), **options)


def digests(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of every file that must not depend on how the work was done."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        # The report says how long it took and how much memory.
        if path.is_file() and path.name != "report.json"
    }
