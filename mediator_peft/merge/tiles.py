"""One tensor of all checkpoints as a stream of tiles: a few rows at a time, as float32, with the backbone they give.

A tile has a fixed number of rows for a shape, so that whatever is summed over tiles does not depend on memory, workers
or the layout of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.opening import Checkpoint
from ..deferred import torch
from ..errors import CheckpointError, ConfigError
from ..kernels import build_loops as kernels
from ..methods.merging import MERGE_METHODS, TensorContext, TensorMethod
from ..methods.merging.average import average
from ..methods.merging.base import keep_base
from ..methods.merging.summing import sum_in_order
from ..methods.sparsifying.selection import Floats
from ..storage import BFLOAT16, FLOAT32, Array, FloatType, as_array, to_tensor, widened

if TYPE_CHECKING:
    from torch import Tensor


TILE_ENTRIES = 1 << 17
"""Entries of a tile that a merge method computes in torch: small enough for a core's cache."""

FUSED_TILES = 8
"""How many times as many a tile has that the kernels merge: they keep to the cache themselves."""

_SAMPLED_GROUPS = 18
_SAMPLED_ROWS = 144
_SAMPLED_ENTRIES = 16_000


class Tile(NamedTuple):
    """Some rows of one tensor. All of it lies in buffers that the next tile overwrites."""

    start: int
    stop: int
    rows: Sequence[Array]
    """K + 1 times (r, I), the base first: rounded to the storage dtype, and in it if it is bfloat16; else float32."""

    backbone: Array
    """(r, I) in the storage dtype."""

    energies: NDArray[np.float64]
    """(r,) squared norm of each row of the sum of the task vectors; not finite where a weight is not."""

    def merged(self) -> Array:
        """The backbone as :attr:`rows` are: in bfloat16, or else in float32."""
        return self.backbone if self.backbone.dtype == BFLOAT16.array else widened(self.backbone)

    def delta(self, number: int) -> Floats:
        """What a checkpoint adds to the backbone: (r, I) float32."""
        with np.errstate(invalid="ignore"):
            return widened(self.rows[number]) - widened(self.backbone)

    def task_vectors(self) -> Floats:
        """(K, r, I) float32"""
        return _task_vectors(self.rows)

    def picked(self, rows: NDArray[np.intp], stride: int) -> Tile:
        """Copies of some rows and every ``stride``-th column, as one tile; energies stay those of whole rows."""
        copies = [each[rows, ::stride] for each in self.rows]
        return Tile(0, len(rows), copies, self.backbone[rows, ::stride], self.energies[rows])


class Workspace:
    """Buffers that are used again for every tile of every tensor."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, Any], Array] = {}
        self._views: dict[tuple[str, tuple[int, ...], Any], Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """A buffer of this shape; its former content is lost."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            size = prod(shape)
            flat = self._flat.get((name, dtype))
            if flat is None or flat.size < size:
                flat = self._flat[name, dtype] = np.empty(size, dtype)
                self._views = {key: old for key, old in self._views.items() if key[0] != name}
            view = self._views[name, shape, dtype] = flat[:size].reshape(shape)
        return view


class TensorTiles:
    """One tensor of base and experts, seen as a matrix (O, I): the first dimension by all others.

    Args:
        name: of the tensor.
        checkpoints: the base, then the experts.
        dtype: storage dtype; weights are rounded to it before anything else.
        merge_method: a key of ``MERGE_METHODS``, which then works with its defaults and without context; or one that
            knows this tensor.
        workspace: buffers.
        is_transposed: the tensor is stored as (I, O), as ``Conv1D`` does.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Sequence[Checkpoint],
        dtype: FloatType,
        merge_method: str | TensorMethod,
        workspace: Workspace,
        is_transposed: bool = False,
    ) -> None:
        self.name = name
        self.checkpoints = checkpoints
        self.dtype = dtype
        self.stored_shape = checkpoints[0].tensors[name].shape
        if isinstance(merge_method, str):
            context = TensorContext(name, stored_shape=self.stored_shape, is_transposed=is_transposed)
            merge_method = TensorMethod(MERGE_METHODS[merge_method], context)
        self.merge = merge_method
        rows = self.stored_shape[0] if self.stored_shape else 1
        columns = prod(self.stored_shape[1:])
        self.shape = (columns, rows) if is_transposed else (rows, columns)
        self._is_fused = is_fused(self.merge)
        tile_entries = TILE_ENTRIES * (FUSED_TILES if self._is_fused else 1)
        self.rows_per_tile = max(1, tile_entries // max(1, self.shape[1]))
        self._space = workspace
        self._transposed = self._whole_transposed() if is_transposed else None
        self._whole_backbone: Array | None = None
        self._held: Tile | None = None
        self._is_ready = False

    def __iter__(self) -> Iterator[Tile]:
        if self._held is not None:
            yield self._held
            return
        self._make_ready()
        for start, stop, rows in self._row_groups():
            backbone = None if self._whole_backbone is None else self._whole_backbone[start:stop]
            yield self._tile(start, stop, rows, backbone)

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Read a tensor of one tile only once, for its sample and every pass within the block.

        Nothing else may be read from the checkpoints meanwhile, nor another tile be made in the workspace.
        """
        if self._is_fused and 0 < self.shape[0] <= self.rows_per_tile:
            self._held = next(iter(self))
        try:
            yield
        finally:
            self._held = None

    def task_vectors(self) -> Iterator[tuple[Tensor, TensorContext]]:
        """(K, r, I) float32 of some rows at a time, with the context of these rows."""
        for start, _, rows in self._row_groups():
            yield to_tensor(_task_vectors(rows)), self.merge.at(_floats(rows[0]), start)

    def whole_task_vectors(self) -> tuple[Tensor, TensorContext]:
        """As a method gets them that must see the whole tensor: (K, *stored shape), or (K, O, I) where it is oriented;
        with the context."""
        base = _floats(self._whole(0))
        task_vectors = torch.stack([_floats(self._whole(number)) for number in range(1, len(self.checkpoints))])
        task_vectors -= base
        if self._transposed is None:
            base, task_vectors = base.reshape(self.stored_shape), task_vectors.reshape(-1, *self.stored_shape)
        elif not self.merge.row.is_oriented:
            base, task_vectors = base.T, task_vectors.transpose(1, 2).contiguous()
        return task_vectors, self.merge.at(base, 0)

    def l1_norms(self) -> tuple[float, float]:
        """Sum of the magnitudes of the sum of the task vectors, and of the merged task vector."""
        self._make_ready(with_backbone=False)
        if not self.merge.row.is_entrywise:
            task_vectors, context = self.whole_task_vectors()
            return _l1(sum_in_order(task_vectors)), _l1(self._merged_whole(task_vectors, context))
        totals = np.zeros(2)
        for task_vectors, context in self.task_vectors():
            assert context.base is not None
            merged = self.merge(task_vectors, context.base, context.start)
            totals += _l1(sum_in_order(task_vectors)), _l1(merged)
        return float(totals[0]), float(totals[1])

    def sample(self) -> Tile:
        """Some rows from all over the tensor, and some of their columns, as one tile."""
        self._make_ready()
        rows, columns = self.shape
        ranges = [(0, rows)]
        if rows > _SAMPLED_ROWS:
            group = _SAMPLED_ROWS // _SAMPLED_GROUPS
            starts = (rows * number // _SAMPLED_GROUPS for number in range(_SAMPLED_GROUPS))
            ranges = [(start, start + group) for start in starts]
        num_rows = sum(stop - start for start, stop in ranges)
        stride = max(1, num_rows * columns // _SAMPLED_ENTRIES)
        if self._held is not None:
            return self._held.picked(np.concatenate([np.arange(*each) for each in ranges]), stride)
        # Cloned: reading one checkpoint may read another, and take its buffer.
        sampled = [self._rows(number, ranges)[:, ::stride].copy() for number in range(len(self.checkpoints))]
        backbone = None
        if self._whole_backbone is not None:
            backbone = np.concatenate([self._whole_backbone[start:stop, ::stride] for start, stop in ranges])
        elif self.merge.row.takes_context:
            # Such a method is told which rows these are, and sees all of their columns.
            backbone = np.concatenate(
                [self._backbone(start, self._all_rows(start, stop))[:, ::stride] for start, stop in ranges]
            )
        return self._tile(0, num_rows, sampled, backbone)

    def _make_ready(self, with_backbone: bool = True) -> None:
        """What must be known of the whole tensor before the first tile: once."""
        if self.merge.row.survey is not None and self.merge.context.survey is None:
            self.merge = self.merge.surveyed(self.task_vectors())
        if with_backbone and not self._is_ready and not self.merge.row.is_entrywise:
            task_vectors, context = self.whole_task_vectors()
            merged = self._merged_whole(task_vectors, context)
            whole = (_floats(self._whole(0)) + merged).to(self.dtype.torch)
            self._whole_backbone = as_array(whole.contiguous())
        self._is_ready = self._is_ready or with_backbone

    def _row_groups(self) -> Iterator[tuple[int, int, list[Array]]]:
        for start in range(0, self.shape[0], self.rows_per_tile):
            stop = min(start + self.rows_per_tile, self.shape[0])
            yield start, stop, self._all_rows(start, stop)

    def _all_rows(self, start: int, stop: int) -> list[Array]:
        # Each stays where it is until the next rows of its checkpoint are read.
        return [self._rows(number, [(start, stop)]) for number in range(len(self.checkpoints))]

    def _backbone(self, start: int, rows: Sequence[Array]) -> Array:
        """By the merge method itself, in torch."""
        base = _floats(rows[0])
        merged = self.merge(to_tensor(_task_vectors(rows)), base, start)
        return as_array(merged.add_(base).to(self.dtype.torch))

    def _tile(self, start: int, stop: int, rows: Sequence[Array], backbone: Array | None) -> Tile:
        # A kernel that looks at each entry once: the common merges, and energies for all.
        merged, energies = self._space.take("backbone", rows[0].shape, rows[0].dtype), np.empty(len(rows[0]))
        kernels.merge_tile(rows, self.merge.row.merge is average, merged, energies)
        if backbone is None:
            backbone = kernels.rounded(merged, self.dtype) if self._is_fused else self._backbone(start, rows)
        return Tile(start, stop, rows, backbone, energies)

    def _rows(self, number: int, groups: Sequence[tuple[int, int]]) -> Array:
        """Groups of rows of one checkpoint, without gaps, as :attr:`Tile.rows` are."""
        if self._transposed is not None:
            rows = np.concatenate([self._transposed[number][start:stop] for start, stop in groups])
        else:
            num_rows = sum(stop - start for start, stop in groups)
            rows = kernels.rounded(self._read(number, groups).reshape(num_rows, self.shape[1]), self.dtype)
        return np.ascontiguousarray(rows if self.dtype == BFLOAT16 else kernels.rounded(rows, FLOAT32))

    def _read(self, number: int, groups: Sequence[tuple[int, int]]) -> Array:
        checkpoint = self.checkpoints[number]
        try:
            return checkpoint.read_groups(self.name, groups)
        except (OSError, RuntimeError) as fault:
            raise CheckpointError(
                f"{checkpoint.label} ({checkpoint.source}): cannot read {self.name!r}: {fault}"
            ) from fault

    def _whole(self, number: int) -> Array:
        """One checkpoint's whole tensor in the storage dtype, as (O, I)."""
        if self._transposed is not None:
            return self._transposed[number]
        checkpoint = self.checkpoints[number]
        return kernels.rounded(checkpoint.read(self.name), self.dtype).reshape(self.shape)

    def _whole_transposed(self) -> list[Array]:
        columns, rows = self.shape
        return [
            np.ascontiguousarray(kernels.rounded(checkpoint.read(self.name), self.dtype).reshape(rows, columns).T)
            for checkpoint in self.checkpoints
        ]

    def _merged_whole(self, task_vectors: Tensor, context: TensorContext) -> Tensor:
        """The merged task vector by a method that must see the whole tensor: (O, I)."""
        assert context.base is not None
        if not bool(task_vectors.isfinite().all()):
            # It may not bear what it cannot use. The tiles are looked at, and the fault gets its name there.
            return torch.zeros(self.shape)
        merged = self.merge(task_vectors, context.base)
        if self._transposed is not None and not self.merge.row.is_oriented:
            merged = merged.T
        return merged.reshape(self.shape)


def is_fused(method: TensorMethod) -> bool:
    """Whether the kernels compute a merge method in the pass that they make for all methods."""
    return method.row.merge in (average, keep_base) and method.factor == 1.0


def check_finite(name: str, tile: Tile, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: there is one; the checkpoint and their number are named.
    """
    if np.isfinite(tile.energies).all():
        return
    # What is summed up may overflow for all that: each term is looked at.
    for checkpoint, weight in zip(checkpoints, tile.rows, strict=True):
        refuse_not_finite(checkpoint, name, int((~np.isfinite(widened(weight))).sum()), tile.start, tile.stop)


def refuse_not_finite(checkpoint: Checkpoint, name: str, num_bad: int, start: int, stop: int) -> None:
    """Say which tensor of which checkpoint holds NaN or infinity.

    Args:
        checkpoint: that was read.
        name: of the tensor.
        num_bad: how many entries of the rows are NaN or infinite; 0 is no fault.
        start: first of the rows.
        stop: the row after the last.

    Raises:
        CheckpointError: there is one.
    """
    if num_bad:
        raise CheckpointError(
            f"{checkpoint.label} ({checkpoint.source}): tensor {name!r} holds NaN or infinite values, {num_bad} of "
            f"them in rows {start} to {stop - 1}. Its fine-tuning diverged or the file is damaged; leave this expert "
            "out or save it again."
        )


def check_overflow(name: str, tile: Tile, method: TensorMethod, dtype: FloatType) -> None:
    """Refuse a merge of finite numbers that has left the range of its dtype.

    Raises:
        ConfigError: it has.
    """
    # A mean, and the base itself, stay within the range of what they are made of.
    if is_fused(method) or np.isfinite(widened(tile.backbone)).all():
        return
    raise ConfigError(
        f"merging {name!r} gives numbers beyond the range of {dtype.name}, in rows {tile.start} to {tile.stop - 1}: "
        "coefficients or settings of the merge method are too large. Give smaller ones."
    )


def _floats(rows: Array) -> Tensor:
    """Rows in float32, for a merge method."""
    return to_tensor(widened(rows))


def _task_vectors(rows: Sequence[Array]) -> Floats:
    base = widened(rows[0])
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack([widened(row) - base for row in rows[1:]])


def _l1(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64))
