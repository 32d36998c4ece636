"""Side files: statistics of each expert, one tensor for a tensor of the model, read a few rows at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ...deferred import torch
from ...errors import ConfigError
from .row import LINEAR, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


GRAM, FISHER, NORMS, MOMENTS = "gram", "fisher", "norms", "moments"
"""What a side file holds, as its header's ``statistic`` says."""

_LISTED = 8
_SUFFIX = ".exp_avg_sq"
_ROWS, _COLUMNS = ".rows", ".columns"


class SideFile:
    """One safetensors file of statistics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, Any] | None = None
        handle = self._handle()
        self.header: dict[str, str] = dict(handle.metadata() or {})
        names: list[str] = handle.keys()
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
        self._holders: dict[str, str] = json.loads(self.header.get("shared", "{}"))

    def _handle(self) -> Any:
        # A process that was forked opens the file for itself.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), safe_open(str(self.path), framework="pt")
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def holder(self, name: str) -> str | None:
        """Under which name the file holds the statistic of a tensor; None where it has none."""
        candidates = (name, self._holders.get(name, name), f"{name}{_SUFFIX}")
        return next((candidate for candidate in candidates if candidate in self.shapes), None)

    def is_rank_one(self, name: str) -> bool:
        """Whether it holds row sums and column sums in place of the whole."""
        return all(f"{name}{part}" in self.shapes for part in (_ROWS, _COLUMNS))

    def whole(self, name: str) -> Tensor:
        """One tensor in float32."""
        holder = self.holder(name)
        assert holder is not None
        tensor: Tensor = self._handle().get_tensor(holder)
        return tensor.float()

    def rows(self, context: TensorContext, num_rows: int, num_columns: int) -> Tensor:
        """The statistic at the place of a tile: (num_rows, num_columns) float64."""
        start, stop = context.start, context.start + num_rows
        if self.is_rank_one(context.name):
            by_row = self._handle().get_tensor(f"{context.name}{_ROWS}").double()
            by_column = self._handle().get_tensor(f"{context.name}{_COLUMNS}").double()
            if context.is_transposed:
                by_row, by_column = by_column, by_row
            total = by_row.sum()
            return torch.outer(by_row[start:stop], by_column) / (total if total > 0 else 1.0)
        holder = self.holder(context.name)
        if not context.stored_shape:
            return self._handle().get_tensor(holder).double().reshape(1, 1)
        part = self._handle().get_slice(holder)
        tile = part[:, start:stop].T if context.is_transposed else part[start:stop]
        return tile.double().reshape(num_rows, num_columns)


class SideTensors:
    """Side files of all experts, checked for one model."""

    def __init__(self, files: Mapping[str, SideFile]) -> None:
        self.files = files

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Expert → sampled values of the model that was measured, where the file says so."""
        return {
            expert: json.loads(file.header["fingerprint"])
            for expert, file in self.files.items()
            if "fingerprint" in file.header
        }

    def tile(self, expert: str, context: TensorContext, num_rows: int, num_columns: int) -> Tensor:
        """An expert's statistic at the place of a tile: (num_rows, num_columns) float64, 0 or more.

        Raises:
            ConfigError: it holds a number below 0, NaN or infinity.
        """
        found = self.files[expert].rows(context, num_rows, num_columns)
        if not bool(((found >= 0) & torch.isfinite(found)).all()):
            raise ConfigError(_not_usable(self.files[expert], context.name, "numbers below 0, NaN or infinity"))
        return found

    def gram(self, expert: str, context: TensorContext) -> Tensor | None:
        """Gram matrix of an expert's inputs of a layer, (I, I) float32; None where the file has none.

        Raises:
            ConfigError: it holds NaN or infinity.
        """
        file = self.files[expert]
        if file.holder(context.name) is None:
            return None
        found = file.whole(context.name)
        if not bool(torch.isfinite(found).all()):
            raise ConfigError(_not_usable(file, context.name, "NaN or infinity"))
        return found

    def totals(self, contexts: Mapping[str, TensorContext]) -> dict[str, tuple[float, float]]:
        """Expert → (mean, 2-norm) of its statistics over the whole model, in float64."""
        found = {}
        for expert, file in self.files.items():
            total, squared, count = 0.0, 0.0, 0
            for name in sorted(contexts):
                values = file.whole(name).double()
                total, squared = total + float(values.sum()), squared + float(values.square().sum())
                count += values.numel()
            found[expert] = (total / max(1, count), squared**0.5)
        return found


def open_side_tensors(
    path: Path,
    contexts: Mapping[str, TensorContext],
    statistic: str,
    faults_of: Callable[[SideFile, TensorContext], str | None],
) -> SideTensors:
    """Open ``<path>/<expert>.safetensors`` for every expert, and check them for a model.

    Args:
        path: folder of the side files.
        contexts: tensor name → context, of all tensors that are merged.
        statistic: that the files must hold, where their header says what they hold.
        faults_of: (file, context) → what is wrong with what a file holds for a tensor; None where nothing is.

    Raises:
        ConfigError: a file is missing, damaged, of another statistic, or does not fit the model. All faults are listed.
    """
    experts = next(iter(contexts.values())).experts
    if not path.is_dir():
        raise ConfigError(
            f"merge_data {str(path)!r} must be a folder with one file for each expert: "
            f"{', '.join(f'{expert}.safetensors' for expert in experts)}. `mediator-peft measure` writes them."
        )
    files, faults = {}, []
    for expert in experts:
        place = path / f"{expert}.safetensors"
        try:
            files[expert] = SideFile(place)
        except (OSError, SafetensorError, ValueError) as fault:
            reason = "it is missing" if not place.exists() else str(fault)
            faults.append(f"{place}: {reason}. Write it with `mediator-peft measure --statistic {statistic}`")
            continue
        faults += _faults(files[expert], contexts, statistic, faults_of)
    if faults:
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        raise ConfigError("merge_data cannot be used:\n- " + "\n- ".join(faults[:_LISTED] + more))
    return SideTensors(files)


def _faults(
    file: SideFile,
    contexts: Mapping[str, TensorContext],
    statistic: str,
    faults_of: Callable[[SideFile, TensorContext], str | None],
) -> Iterator[str]:
    kind = file.header.get("statistic", statistic)
    if kind != statistic and {kind, statistic} != {FISHER, MOMENTS}:
        yield f"{file.path}: it holds {kind!r}, this merge method needs {statistic!r}"
        return
    for context in contexts.values():
        fault = faults_of(file, context)
        if fault is not None:
            yield f"{file.path}: {context.name}: {fault}"


def fault_of_entries(file: SideFile, context: TensorContext) -> str | None:
    """What is wrong with a statistic that has one number for each weight; None where nothing is."""
    if file.is_rank_one(context.name):
        found = tuple(file.shapes[f"{context.name}{part}"] for part in (_ROWS, _COLUMNS))
        expected = tuple((length,) for length in context.stored_shape)
        return None if found == expected else f"row and column sums have shapes {found}, expected {expected}"
    holder = file.holder(context.name)
    if holder is None:
        return "it is missing. Measure the model that is merged"
    shape = file.shapes[holder]
    return None if shape == context.stored_shape else f"shape {shape}, the model has {context.stored_shape}"


def fault_of_gram(file: SideFile, context: TensorContext) -> str | None:
    """What is wrong with the Gram matrix of a linear layer; None where nothing is, or where none is needed."""
    if context.kind != LINEAR:
        return None
    holder = file.holder(context.name)
    if holder is None:
        return "it is missing. Measure the model that is merged"
    width = context.stored_shape[0] if context.is_transposed else context.stored_shape[-1]
    shape = file.shapes[holder]
    return None if shape == (width, width) else f"shape {shape}, the layer has {width} inputs"


def _not_usable(file: SideFile, name: str, what: str) -> str:
    return f"{file.path}: {name!r} holds {what}. Measure again; the measured model may be damaged."
