"""One tensor of all checkpoints as a stream of tiles: a few rows at a time, as float32, with the backbone they give.

A tile has a fixed number of rows for a shape, so that whatever is summed over tiles does not depend on memory, workers
or the layout of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError
from ..methods.merging import ENTRYWISE, MERGE_METHODS
from ..methods.merging.average import average
from ..methods.merging.base import keep_base
from .checkpoints import Checkpoint
from .loops import compiled

TILE_ENTRIES = 1 << 17
"""Entries of a tile: small enough for a core's cache, large enough to make a call cheap."""

_SAMPLED_GROUPS = 18
_SAMPLED_ROWS = 144
_SAMPLED_ENTRIES = 16_000


class Tile(NamedTuple):
    """Some rows of one tensor. All of it lies in buffers that the next tile overwrites."""

    start: int
    stop: int
    weights: Tensor
    """(K + 1, r, I) float32, the base first, rounded to the storage dtype."""

    task_vectors: Tensor
    """(K, r, I) float32"""

    backbone: Tensor
    """(r, I) in the storage dtype."""

    rounded: Tensor
    """(r, I) float32, the same numbers as ``backbone``."""


class Workspace:
    """Buffers that are used again for every tile of every tensor."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._arrays: dict[tuple[str, tuple[int, ...]], tuple[Tensor, NDArray[np.float32]]] = {}
        self._ones = np.empty(0, np.float32)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of this shape; its former content is lost."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            size = prod(shape)
            flat = self._flat.get((name, dtype))
            if flat is None or flat.numel() < size:
                flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype)
                self._views = {key: old for key, old in self._views.items() if key[0] != name}
            view = self._views[name, shape, dtype] = flat[:size].view(shape)
        return view

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The same buffer as :meth:`take` gives, as numpy sees it."""
        tensor = self.take(name, shape)
        known = self._arrays.get((name, shape))
        if known is None or known[0] is not tensor:
            known = self._arrays[name, shape] = (tensor, tensor.numpy())
        return known[1]

    def ones(self, length: int) -> NDArray[np.float32]:
        """A vector of ones, not to be changed."""
        if len(self._ones) < length:
            self._ones = np.ones(length, np.float32)
        return self._ones[:length]


class TensorTiles:
    """One tensor of base and experts, seen as a matrix (O, I): the first dimension by all others.

    Args:
        name: of the tensor.
        checkpoints: the base, then the experts.
        dtype: storage dtype; weights are rounded to it before anything else.
        merge_method: a key of ``MERGE_METHODS``.
        workspace: buffers.
        is_transposed: the tensor is stored as (I, O), as ``Conv1D`` does.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Sequence[Checkpoint],
        dtype: torch.dtype,
        merge_method: str,
        workspace: Workspace,
        is_transposed: bool = False,
    ) -> None:
        self.name = name
        self.checkpoints = checkpoints
        self.dtype = dtype
        self.merge = MERGE_METHODS[merge_method]
        self.stored_shape = checkpoints[0].tensors[name].shape
        rows = self.stored_shape[0] if self.stored_shape else 1
        columns = prod(self.stored_shape[1:])
        self.shape = (columns, rows) if is_transposed else (rows, columns)
        self.rows_per_tile = max(1, TILE_ENTRIES // max(1, self.shape[1]))
        self._space = workspace
        self._transposed = self._whole_transposed() if is_transposed else None
        self._whole_backbone = None if merge_method in ENTRYWISE else self._merged_whole()
        self._is_plain = (
            not is_transposed
            and self.merge in (average, keep_base)
            and {torch.bfloat16} == {dtype, *(checkpoint.tensors[name].dtype for checkpoint in checkpoints)}
            and compiled() is not None
        )

    def __iter__(self) -> Iterator[Tile]:
        for start in range(0, self.shape[0], self.rows_per_tile):
            stop = min(start + self.rows_per_tile, self.shape[0])
            if self._is_plain:
                yield self._plain_tile(start, stop)
                continue
            weights = self._space.take("weights", (len(self.checkpoints), stop - start, self.shape[1]))
            for number in range(len(self.checkpoints)):
                self._load(weights[number], number, [(start, stop)])
            backbone = None if self._whole_backbone is None else self._whole_backbone[start:stop]
            yield self._tile(start, stop, weights, backbone)

    def _plain_tile(self, start: int, stop: int) -> Tile:
        """As :meth:`_load` and :meth:`_tile`, by the compiled loops."""
        loops, take = compiled(), self._space.take
        assert loops is not None
        shape = (stop - start, self.shape[1])
        num_experts, size = len(self.checkpoints) - 1, prod(shape)
        # They stay where they are until the next rows are read.
        rows = [self._read(number, [(start, stop)]) for number in range(num_experts + 1)]
        sources = np.array([some.data_ptr() for some in rows], np.int64)
        loops.merge_means(
            sources,
            self.merge is average,
            self._space.array("weights", (num_experts + 1, size)),
            self._space.array("task vectors", (num_experts, size)),
            self._space.array("total", (size,)),
            take("backbone", (size,), torch.bfloat16).view(torch.uint16).numpy(),
            self._space.array("rounded", (size,)),
        )
        return Tile(
            start,
            stop,
            take("weights", (num_experts + 1, size)).view(num_experts + 1, *shape),
            take("task vectors", (num_experts, size)).view(num_experts, *shape),
            take("backbone", (size,), torch.bfloat16).view(shape),
            take("rounded", (size,)).view(shape),
        )

    def sample(self) -> Tile:
        """Some rows from all over the tensor, and some of their columns, as one tile."""
        rows, columns = self.shape
        ranges = [(0, rows)]
        if rows > _SAMPLED_ROWS:
            group = _SAMPLED_ROWS // _SAMPLED_GROUPS
            starts = (rows * number // _SAMPLED_GROUPS for number in range(_SAMPLED_GROUPS))
            ranges = [(start, start + group) for start in starts]
        num_rows = sum(stop - start for start, stop in ranges)
        stride = max(1, num_rows * columns // _SAMPLED_ENTRIES)
        width = len(range(0, columns, stride))
        weights = self._space.take("weights", (len(self.checkpoints), num_rows, width))
        for number in range(len(self.checkpoints)):
            self._load(weights[number], number, ranges, stride)
        backbone = None
        if self._whole_backbone is not None:
            backbone = torch.cat([self._whole_backbone[start:stop, ::stride] for start, stop in ranges])
        return self._tile(0, num_rows, weights, backbone)

    def _tile(self, start: int, stop: int, weights: Tensor, backbone: Tensor | None) -> Tile:
        shape = weights.shape[1:]
        task_vectors = self._space.take("task vectors", (len(weights) - 1, *shape))
        torch.sub(weights[1:], weights[0], out=task_vectors)
        if backbone is None:
            merged = self.merge(task_vectors).add_(weights[0])
            backbone = self._space.take("backbone", tuple(shape), self.dtype).copy_(merged)
        rounded = self._space.take("rounded", tuple(shape)).copy_(backbone)
        return Tile(start, stop, weights, task_vectors, backbone, rounded)

    def _load(self, target: Tensor, number: int, groups: Sequence[tuple[int, int]], stride: int = 1) -> None:
        """Groups of rows of one checkpoint as float32, rounded to the storage dtype on the way."""
        if self._transposed is not None:
            rows = torch.cat([self._transposed[number][start:stop] for start, stop in groups])
        else:
            rows = self._read(number, groups).reshape(len(target), self.shape[1])
        target.copy_((rows if stride == 1 else rows[:, ::stride]).to(self.dtype))

    def _read(self, number: int, groups: Sequence[tuple[int, int]]) -> Tensor:
        checkpoint = self.checkpoints[number]
        try:
            return checkpoint.read_groups(self.name, groups)
        except (OSError, RuntimeError) as fault:
            raise CheckpointError(
                f"{checkpoint.label} ({checkpoint.source}): cannot read {self.name!r}: {fault}"
            ) from fault

    def _whole(self, number: int) -> Tensor:
        """One checkpoint's whole tensor in the storage dtype, as (O, I)."""
        if self._transposed is not None:
            return self._transposed[number]
        checkpoint = self.checkpoints[number]
        return checkpoint.read(self.name).to(self.dtype).reshape(self.shape)

    def _whole_transposed(self) -> list[Tensor]:
        columns, rows = self.shape
        return [
            checkpoint.read(self.name).to(self.dtype).reshape(rows, columns).T.contiguous()
            for checkpoint in self.checkpoints
        ]

    def _merged_whole(self) -> Tensor:
        """The backbone by a merge method that must see the whole tensor."""
        base = self._whole(0).float()
        task_vectors = torch.stack([self._whole(number).float() for number in range(1, len(self.checkpoints))])
        task_vectors -= base
        if self._transposed is not None:
            merged = self.merge(task_vectors.transpose(1, 2).contiguous()).T
        else:
            merged = self.merge(task_vectors.reshape(-1, *self.stored_shape))
        return (base + merged.reshape(self.shape)).to(self.dtype)
