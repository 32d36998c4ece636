"""Checkpoints in Hugging Face folders. Headers are validated; weights are read some rows at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..deferred import torch
from ..errors import CheckpointError
from ..storage import FLOAT_TYPES, Array, as_array, float_type
from .checkpoint import Checkpoint, Reader, TensorInfo
from .headers import Stored, is_lfs_pointer, read_header
from .tensor_inventory import is_known

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLE_FILE = "pytorch_model.bin"
_LISTED, _SHOWN = 8, 60


# Numbers of these are built one by one when a model is outlined.
_COUNTED = re.compile(r"layer|block|depth|expert|head|label", re.IGNORECASE)
_MOST_COUNTED, _MOST_DEPTH = 100_000, 64


def read_config(folder: Path, faults: list[str]) -> dict[str, Any]:
    """What ``config.json`` says, word for word; empty with a fault where that is nothing.

    Args:
        folder: where it lies.
        faults: takes what is wrong: missing, unreadable, no JSON object, or numbers that no model has.
    """
    path = folder / "config.json"
    if not path.is_file():
        inner = sorted(found.parent.name for found in folder.glob("*/config.json"))
        deeper = f" Is it in {', '.join(inner[:_LISTED])}?" if inner else ""
        faults.append(f"it has no config.json.{deeper}")
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else " ".join(str(fault).split())
        pointer = " (it is a Git LFS pointer)" if not isinstance(fault, OSError) and is_lfs_pointer(path) else ""
        faults.append(f"its config.json cannot be read: {reason}{pointer}")
        return {}
    if not isinstance(settings, dict):
        faults.append(f"its config.json cannot be read: it holds no object but {str(settings)[:_SHOWN]}")
        return {}
    absurd = list(_absurd_counts(settings))
    if absurd:
        faults.append(f"its config.json cannot be read: it says {', '.join(absurd[:_LISTED])}, which no model has")
    return settings


def _absurd_counts(settings: Mapping[str, Any]) -> Iterator[str]:
    todo: list[tuple[int, str, Any]] = [(0, "", settings)]
    while todo:
        depth, key, value = todo.pop()
        if depth > _MOST_DEPTH:
            yield f"{_MOST_DEPTH} levels of nesting"
            return
        if isinstance(value, dict):
            todo += [(depth + 1, str(inner), content) for inner, content in value.items()]
        elif isinstance(value, list):
            todo += [(depth + 1, key, content) for content in value if isinstance(content, (dict, list))]
        elif isinstance(value, int) and abs(value) > _MOST_COUNTED and _COUNTED.search(key):
            yield f"{key} = {str(value)[:_SHOWN]}"


def quantization_method(settings: Mapping[str, Any]) -> str | None:
    """How ``config.json`` says that the weights are quantised; None where it says nothing of the kind."""
    known = settings.get("quantization_config") or settings.get("compression_config")
    if not known:
        return None
    return str(known.get("quant_method") or "unknown method") if isinstance(known, dict) else "unknown method"


def _hint(folder: Path) -> str:
    """What may be meant where there are no weights of the usual names."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".bin") for name in names):
        return " It holds .bin files: allow them (allow_pickle=True), or save it again with save_pretrained()."
    for ending, what in ((".gguf", "GGUF"), (".pth", "Meta's .pth"), (".distcp", "FSDP"), (".h5", "TensorFlow")):
        if any(name.endswith(ending) for name in names):
            return f" It holds {what} files, which are not read: convert them to safetensors with transformers."
    if "zero_to_fp32.py" in names:
        return " It holds a DeepSpeed state: zero_to_fp32.py makes weights of it."
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    return f" There are weights in {', '.join(inner[:_LISTED])}: give that folder." if inner else ""


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder of safetensors files, sharded or not.

    Raises:
        CheckpointError: the folder, its configuration, its index or one of its files is missing or damaged; all such
            faults are listed at once.
    """

    folder: Path

    def __init__(self, folder: Path, label: str, source: str | None = None) -> None:
        self.folder = folder
        self.label = label
        self.source = source or str(folder)
        faults: list[str] = []
        self._raw_config = read_config(folder, faults)
        # transformers is asked at once where it may refuse, and else only where its answer is needed.
        self._config = None if faults or is_known(self._raw_config) else self._read_config(faults)
        self._is_untied = False
        faults += self._quantization_faults()
        self._stored: dict[str, tuple[Path, Stored]] = {}
        self._descriptors: dict[Path, int] = {}
        self._buffer = np.empty(0, np.uint8)
        self._reader: Reader | None = None
        self.tensors = {}
        listed: list[str] = []
        pointers: list[str] = []
        for path in self._weight_files(faults, listed):
            if is_lfs_pointer(path):
                pointers.append(path.name)
            else:
                self._read_header(path, faults)
        if pointers:
            faults.append(
                f"Git LFS pointers stand in the place of {', '.join(pointers[:_LISTED])}: the weights were not "
                "downloaded. Run `git lfs pull` in the folder."
            )
        self.unlisted = frozenset(self.tensors).difference(listed) if listed else frozenset[str]()
        """Tensors in its shards that its index does not name."""
        if faults:
            raise CheckpointError("\n".join(f"{label} ({self.source}): {fault}" for fault in faults))

    def _quantization_faults(self) -> list[str]:
        method = quantization_method(self._raw_config)
        if method is None:
            return []
        entry = "quantization_config" if self._raw_config.get("quantization_config") else "compression_config"
        return [
            f"its config.json has a {entry}: its weights are quantised ({method}). Give the unquantised checkpoint, "
            "have them dequantised (dequantize=True, --dequantize), or delete that entry if they are plain."
        ]

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self._raw_config

    @property
    def config(self) -> PretrainedConfig:
        if self._config is None:
            faults: list[str] = []
            self._config = self._read_config(faults)
            if faults:
                raise CheckpointError(f"{self.label} ({self.source}): {faults[0]}")
        if self._is_untied:
            self._config.tie_word_embeddings = False
        return self._config

    @property
    def is_tied(self) -> bool:
        # The configurations known by heart do not tie where they say nothing.
        if is_known(self._raw_config):
            return bool(self._raw_config.get("tie_word_embeddings", False))
        return super().is_tied

    def take_as(self, name: str, source: str) -> None:
        self.tensors[name] = self.tensors[source]
        self._stored[name] = self._stored[source]

    def set_untied(self) -> None:
        self._is_untied = True
        self._raw_config = {**self._raw_config, "tie_word_embeddings": False}

    def _read_config(self, faults: list[str]) -> PretrainedConfig:
        from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

        kind, custom = self._raw_config.get("model_type"), self._raw_config.get("auto_map")
        if custom and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            faults.append(
                f"its config.json asks for custom code ({custom}), since transformers has no model type {kind!r}. Code "
                "from checkpoints is not run here: use a version of transformers that knows the model."
            )
            return PretrainedConfig()
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as fault:  # whatever a damaged configuration may raise
            reason = " ".join(str(fault).split()) or type(fault).__name__
            faults.append(f"its config.json cannot be read: {reason}")
            return PretrainedConfig()

    _index_file, _single_file = INDEX_FILE, SINGLE_FILE

    def _weight_files(self, faults: list[str], listed: list[str]) -> list[Path]:
        """The files that transformers would read: the one that the configuration names, a single file, or shards.

        Args:
            faults: takes what is wrong.
            listed: takes the tensors that an index names.
        """
        named = self._raw_config.get("transformers_weights")
        if isinstance(named, str):
            if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
                faults.append(f"its config.json names {named!r} as its weights, which is no safetensors file beside it")
                return []
            if not named.endswith(".index.json"):
                if not (self.folder / named).is_file():
                    faults.append(f"its config.json names {named!r} as its weights, which is not there")
                    return []
                return [self.folder / named]
            return self._shards(self.folder / named, faults, listed)
        # A single file goes before an index, which may be left of older shards.
        if (self.folder / self._single_file).is_file():
            return [self.folder / self._single_file]
        if (self.folder / self._index_file).is_file():
            return self._shards(self.folder / self._index_file, faults, listed)
        faults.append(f"no {self._single_file} and no {self._index_file}.{_hint(self.folder)}")
        return []

    def _shards(self, index: Path, faults: list[str], listed: list[str]) -> list[Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            outside = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
            faults.append(f"{index.name} is damaged ({fault!r}). Download or save the checkpoint again.")
            return []
        if outside:
            faults.append(f"{index.name} names files outside the folder: {', '.join(outside)}")
            return []
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            faults.append(f"shards named in {index.name} are missing: {', '.join(missing)}")
        listed += weight_map
        return [self.folder / name for name in names if name not in missing]

    def _read_header(self, path: Path, faults: list[str]) -> None:
        try:
            found, _ = read_header(path)
        except OSError as fault:
            faults.append(f"{path.name} cannot be read: {fault.strerror or fault}.")
            return
        except ValueError as fault:
            faults.append(f"{path.name} is damaged or cut short ({fault}). Download or save it again.")
            return
        twice = sorted(self._stored.keys() & found.keys())
        if twice:
            others = sorted({self._stored[name][0].name for name in twice})
            faults.append(f"{path.name} has tensors that {', '.join(others)} has as well: {', '.join(twice[:_LISTED])}")
        for name, stored in found.items():
            self.tensors[name] = TensorInfo(stored.shape, FLOAT_TYPES.get(stored.dtype))
            self._stored[name] = (path, stored)

    @property
    def files(self) -> list[Path]:
        return sorted({path for path, _ in self._stored.values()})

    def place(self, name: str) -> tuple[Path, int] | None:
        found = self._stored.get(name)
        return None if found is None else (found[0], found[1].offset + found[1].num_bytes)

    def watch(self, reader: Reader | None) -> None:
        self._reader = reader

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self.read_groups(name, [(start, stop)])

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        stored = self._stored[name][1]
        return self._read_groups(name, groups, stored.shape or (1,))

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        num_parts, height, *rest = self._stored[name][1].shape
        first = number * height
        rows = [(first + start, first + stop) for start, stop in groups]
        return self._read_groups(name, rows, (num_parts * height, *rest))

    def _read_groups(self, name: str, groups: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Array:
        """Groups of rows of a tensor that is seen with some shape."""
        path, stored = self._stored[name]
        num_rows = sum(stop - start for start, stop in groups)
        row_bytes = stored.num_bytes // max(1, shape[0])
        size = row_bytes * num_rows
        if self._reader is not None:
            self._reader.before_reading(self)
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        buffer = self._buffer[:size]
        view, place = buffer.data, 0
        descriptor = self._open(path) if size else -1
        for start, stop in groups if size else ():
            end = place + row_bytes * (stop - start)
            read_into(descriptor, view[place:end], stored.offset + start * row_bytes)
            place = end
        if self._reader is not None and len(groups) == 1:
            self._reader.show(self, path, stored.offset + groups[0][0] * row_bytes, view)
        return buffer.view(FLOAT_TYPES[stored.dtype].array).reshape(num_rows, *shape[1:])

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": {}, "_reader": None}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class PickleCheckpoint(FolderCheckpoint):
    """A Hugging Face folder of ``.bin`` files, read with ``weights_only=True``: plain tensors and no code."""

    _index_file, _single_file = PICKLE_INDEX_FILE, PICKLE_FILE

    def _read_header(self, path: Path, faults: list[str]) -> None:
        if not hasattr(self, "_state"):
            self._state: dict[str, Tensor] = {}
            self._paths: list[Path] = []
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        except OSError as fault:
            faults.append(f"{path.name} cannot be read: {fault.strerror or fault}.")
            return
        except Exception as fault:  # whatever a damaged pickle may raise
            reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
            faults.append(f"{path.name} is damaged, or holds more than tensors ({reason}).")
            return
        self._paths.append(path)
        self._state.update(found)
        for name, tensor in found.items():
            self.tensors[name] = TensorInfo(tuple(tensor.shape), float_type(tensor.dtype))

    def take_as(self, name: str, source: str) -> None:
        self.tensors[name] = self.tensors[source]
        self._state[name] = self._state[source]

    @property
    def files(self) -> list[Path]:
        return self._paths

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._state[name]
        return as_array((tensor.reshape(1) if tensor.ndim == 0 else tensor)[start:stop])

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        return Checkpoint.read_groups(self, name, groups)

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        return None


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a place in an open file.

    Raises:
        OSError: the file ends before the buffer is full.
    """
    # Nearly always all of it comes at once, and many a piece is a single row.
    done = os.preadv(descriptor, [buffer], offset)
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends {len(buffer) - done} bytes too early; it was cut short while in use")
        done += count
