"""Experts whose vocabulary differs from the base's: embedding rows are matched by token string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.build_loops import rounded
from ..storage import FLOAT32, Array
from .checkpoint import Checkpoint, TensorInfo
from .lora import LoraCheckpoint
from .side_files import vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LISTED = 5
_MISSING = -1


class AlignedCheckpoint(Checkpoint):
    """An expert seen with the base's vocabulary.

    A row that stands for a token of the base comes from the row that the expert has for the same token; a token the
    expert does not have keeps the base's row; what only the expert has is left out.

    Args:
        expert: with more or fewer rows.
        base: whose vocabulary counts.
        rows: (V,) int64, for each row of the base's embedding the expert's row, or -1.
        names: the tensors that have a row for each token.
    """

    folder: Path

    def __init__(self, expert: Checkpoint, base: Checkpoint, rows: NDArray[np.int64], names: frozenset[str]) -> None:
        self.label, self.source = expert.label, expert.source
        assert expert.folder is not None, "only what lies in a folder has a vocabulary"
        self.folder = expert.folder
        self._expert, self._base, self._rows, self._names = expert, base, rows, names
        self.tensors = {
            name: TensorInfo(base.tensors[name].shape, info.dtype) if name in names else info
            for name, info in expert.tensors.items()
        }

    @property
    def files(self) -> list[Path]:
        return self._expert.files

    @property
    def raw_config(self) -> Mapping[str, Any]:
        known = self._expert.raw_config
        return {**known, "vocab_size": len(self._rows)} if known else known

    @property
    def config(self) -> PretrainedConfig:
        config = deepcopy(self._expert.config)
        config.vocab_size = len(self._rows)
        return config

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._names:
            return self._expert.read_rows(name, start, stop)
        kind = self._expert.tensors[name].dtype or FLOAT32
        result = rounded(self._base.read_rows(name, start, stop), kind).copy()
        for first, last, place in _runs(self._rows[start:stop]):
            result[place : place + last - first] = self._expert.read_rows(name, first, last)
        return result

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        return None if name in self._names else self._expert.read_part(name, number, groups)


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Stretches of consecutive rows: (first, one past the last, place of the first among ``rows``)."""
    runs: list[tuple[int, int, int]] = []
    for place, row in enumerate(rows.tolist()):
        if row == _MISSING:
            continue
        if runs and runs[-1][1] == row and runs[-1][2] + row - runs[-1][0] == place:
            runs[-1] = (runs[-1][0], row + 1, runs[-1][2])
        else:
            runs.append((row, row + 1, place))
    return runs


def aligned(expert: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, str | None]:
    """An expert as it is where its vocabulary has the base's size, or cannot be compared; else seen through the base's.

    Returns:
        The checkpoint, and what is to be said of it.
    """
    if expert.folder is None or base.folder is None or isinstance(expert, LoraCheckpoint):
        return expert, None
    sizes = expert.raw_config.get("vocab_size"), base.raw_config.get("vocab_size")
    names = frozenset(
        name
        for name, info in expert.tensors.items()
        if name in base.tensors
        and info.shape[:1] != base.tensors[name].shape[:1]
        and (info.shape[:1], base.tensors[name].shape[:1]) == ((sizes[0],), (sizes[1],))
        and info.shape[1:] == base.tensors[name].shape[1:]
    )
    if not names:
        return expert, None
    ours, theirs = vocabulary(base.folder), vocabulary(expert.folder)
    if ours is None or theirs is None:
        return expert, None
    rows = _matched(ours, theirs, int(sizes[1] or 0), int(sizes[0] or 0))
    return AlignedCheckpoint(expert, base, rows, names), _message(expert.label, ours, theirs, rows)


def _matched(ours: Mapping[str, int], theirs: Mapping[str, int], num_ours: int, num_theirs: int) -> NDArray[np.int64]:
    named = set(theirs.values())
    # Rows that stand for no token (embeddings are often padded) keep their place where the expert has it to spare.
    rows = [row if row < num_theirs and row not in named else _MISSING for row in range(num_ours)]
    for token, row in ours.items():
        if row < num_ours:
            other = theirs.get(token, _MISSING)
            rows[row] = other if other < num_theirs else _MISSING
    return np.array(rows, np.int64)


def _message(label: str, ours: Mapping[str, int], theirs: Mapping[str, int], rows: NDArray[np.int64]) -> str:
    moved = sum(token in theirs and theirs[token] != row for token, row in ours.items())
    left_out = sorted(theirs.keys() - ours.keys(), key=lambda token: theirs[token])
    kept = int((rows == _MISSING).sum())
    named = ", ".join(map(repr, left_out[:_LISTED]))
    named += f", and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
    return (
        f"{label} has another vocabulary and was aligned to the base's by token: {moved} tokens moved, {kept} rows "
        f"kept from the base, {len(left_out)} tokens of its own left out" + (f" ({named})" if left_out else "")
    )
