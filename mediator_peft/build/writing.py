"""Writing a backbone in shards, under a temporary name that becomes the final one at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputExistsError
from .checkpoints import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 1 << 30

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
    if path.exists():
        raise OutputExistsError(f"output {str(path)!r} exists. Choose another folder, or delete this one first.")


class BackboneWriter:
    """Takes tensors in any order and writes each shard as soon as it is complete."""

    def __init__(self, folder: Path, sizes: Mapping[str, int], shard_bytes: int = SHARD_BYTES) -> None:
        """``sizes``: tensor name → bytes; fixes which shard a tensor goes to."""
        self.folder = folder
        self.total = sum(sizes.values())
        self._shard_of: dict[str, int] = {}
        shard, filled = 0, 0
        for name in sorted(sizes):
            if filled and filled + sizes[name] > shard_bytes:
                shard, filled = shard + 1, 0
            self._shard_of[name] = shard
            filled += sizes[name]
        self._num_shards = shard + 1
        self._pending: dict[int, dict[str, Tensor]] = {}
        self._missing = {
            number: sum(1 for other in self._shard_of.values() if other == number) for number in range(shard + 1)
        }

    def put(self, name: str, tensor: Tensor) -> None:
        """Hand over one tensor."""
        shard = self._shard_of[name]
        self._pending.setdefault(shard, {})[name] = tensor.contiguous()
        self._missing[shard] -= 1
        if not self._missing[shard]:
            save_file(self._pending.pop(shard), self.folder / self._file(shard), metadata={"format": "pt"})

    def close(self) -> None:
        """Write the index, where there is more than one shard."""
        if self._num_shards > 1:
            weight_map = {name: self._file(shard) for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _file(self, shard: int) -> str:
        if self._num_shards == 1:
            return SINGLE_FILE
        return f"model-{shard + 1:05}-of-{self._num_shards:05}.safetensors"


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings next to a new backbone."""
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_model_config(folder: Path, config: object, dtype: torch.dtype) -> None:
    """Write ``config.json`` of the backbone, with the dtype it is stored in."""
    from copy import deepcopy

    settings = deepcopy(config)
    settings.dtype = dtype  # type: ignore[attr-defined]
    settings.save_pretrained(folder)  # type: ignore[attr-defined]
