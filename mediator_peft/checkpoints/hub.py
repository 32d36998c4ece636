"""Resolves where a checkpoint lies: a folder, or the snapshot folder of a hub id at a pinned commit."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

_SHOWN = 200
_WANTED = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja"]


def pinned_source(path: str, folder: Path) -> str:
    """A hub id with the commit it was resolved to; a local path as it is."""
    if Path(path).expanduser().is_dir():
        return path
    return f"{path.partition('@')[0]}@{folder.name}"


def resolve(path: str, label: str) -> Path:
    """A local folder as it is; a hub id as the folder of its downloaded snapshot.

    Raises:
        CheckpointError: neither.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as fault:
        raise CheckpointError(f"{label}: {path[:_SHOWN]!r} is no path: {fault}") from fault
    repository, _, revision = path.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(f"{label}: no folder {path!r}. Give a folder or a hub id such as 'org/model@revision'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        raise CheckpointError(
            f"{label}: {path!r} is no folder, and the hub did not give it: {str(fault).splitlines()[0]}"
        ) from fault
