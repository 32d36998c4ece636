"""The interface of all checkpoints: names, shapes and dtypes at once, weights some rows at a time.

Weights come as numpy arrays, those in bfloat16 as uint16 with their bits (see ``storage``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import UnsupportedError
from ..storage import Array, FloatType, to_tensor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class Reader(Protocol):
    """Is shown what a checkpoint reads from plain files."""

    def before_reading(self, checkpoint: Checkpoint) -> None:
        """The buffer in which the bytes lie that were shown last is about to be used again."""

    def show(self, checkpoint: Checkpoint, path: Path, start: int, data: memoryview) -> None:
        """These bytes were read from a place in a file; they stay until ``before_reading``."""


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: FloatType | None
    """None for anything but plain floating point."""


class Checkpoint(ABC):
    """Weights of one model, read one tensor at a time."""

    label: str
    """What messages call it, e.g. ``expert 'math'``."""

    source: str
    """Where it lies."""

    tensors: dict[str, TensorInfo]

    unlisted: frozenset[str] = frozenset()
    """Tensors in its shards that their index does not name."""

    folder: Path | None = None
    """Where its configuration and tokenizer lie; None for a model in memory."""

    @property
    def whole(self) -> Checkpoint:
        """The checkpoint with the tensors that the model has, where this one shows parts of them; else itself."""
        return self

    @property
    def raw_config(self) -> Mapping[str, Any]:
        """What its ``config.json`` says, word for word; empty for a model in memory."""
        return {}

    @property
    def is_tied(self) -> bool:
        """Whether its configuration ties ``lm_head`` to the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def leave_out(self, names: Collection[str]) -> None:
        """Forget tensors."""
        self.tensors = {name: info for name, info in self.tensors.items() if name not in names}

    def take_as(self, name: str, source: str) -> None:
        """Have a tensor under one more name.

        Args:
            name: the new one.
            source: the present one.
        """
        raise UnsupportedError(f"{self.label} ({self.source}): it has no tensor {name!r}, only {source!r}.")

    def set_untied(self) -> None:
        """Have the configuration say that ``lm_head`` is not tied."""
        raise UnsupportedError(f"{self.label} ({self.source}): its lm_head cannot be untied from its embedding.")

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of one tensor, in its own dtype: (stop - start, *rest). Not to be kept."""

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        """Rows of one tensor from several places, (start, stop) each, one below the other; no places give no rows.

        Not to be kept.
        """
        return np.concatenate([self.read_rows(name, start, stop).copy() for start, stop in groups or [(0, 0)]])

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        """Groups of rows of one matrix of a tensor (E, O, I), without reading more: (rows, I). Not to be kept.

        None where it cannot be read so.
        """
        return None

    def read(self, name: str) -> Array:
        """One whole tensor, in its own dtype."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape).copy()

    def tensor(self, name: str) -> Tensor:
        """One whole tensor as torch has it, on the CPU, in its own dtype."""
        return to_tensor(self.read(name))

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What this model adds to a tensor of its base, where that is known as a product; None elsewhere.

        Returns:
            (rows, r) and (r, columns), float32, in the layout in which the tensor is stored.
        """
        return None

    @property
    def files(self) -> list[Path]:
        """The files of weights that it is read from; none for a model in memory."""
        return []

    def place(self, name: str) -> tuple[Path, int] | None:
        """The file in which a tensor lies, and where it ends there; None where it lies in no plain file."""
        return None

    def watch(self, reader: Reader | None) -> None:
        """Show a reader the bytes that are read from plain files, rows in one piece alone; None ends it."""
        del reader  # what is read from no plain file is not shown

    def held_bytes(self, name: str) -> int:
        """Bytes that reading some rows of a tensor takes beside these rows, e.g. for what it is converted from."""
        return 0

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
