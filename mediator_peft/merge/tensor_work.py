"""The steps of one tensor: task vectors, conflict statistics, backbone, sparse deltas. Pure: no files, no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bank.packed_arrays import PackedArrays
from ..bank.sparse_delta import SparseDelta
from ..checkpoints.opening import Checkpoint
from ..config import CORRECTION, FALLBACK_EXPERT, MediatorSettings
from ..deferred import torch
from ..errors import UnsupportedError
from ..kernels import build_loops as kernels
from ..methods.conflict import CONFLICT_SCORES
from ..methods.conflict.statistics import Statistics
from ..methods.encoding.base import Precision
from ..methods.rounding import ROUNDINGS
from ..methods.sparsifying.magnitude import largest_mask
from ..methods.sparsifying.selection import TINY, Bracket, Floats, bitmap_shape, smallest_kept_of_tiles
from ..storage import Array, FloatType, to_tensor, widened
from .delta_packing import own_factors, pack_delta
from .family_packing import NO_GROUPS, Groups, pack_family, residual_density
from .model_method import ModelMethod
from .signed_selection import WIDE_SLACK, Errors, Marking, SignedSelection, errors_of, errors_of_sum
from .tiles import TensorTiles, Tile, Workspace, check_finite, check_overflow

WriteRows = Callable[[str, int, Array], None]
"""Takes rows of a backbone tensor: (tensor name, number of the first row, rows in the storage dtype)."""


MERGED, BASE, CARRIED = "merged", "base", "carried"
"""Where the backbone's tensor comes from."""


class Task(NamedTuple):
    """One tensor to be merged, with the bias that goes with it."""

    name: str
    measure: bool
    """Whether it counts for the conflict score of its block."""

    density: float | None
    """Share of its deltas that is kept; None where it gets none."""

    is_transposed: bool
    bias: str | None
    """The bias of the same layer, merged with it."""

    origin: str = MERGED
    """``MERGED``, or ``BASE`` for what is kept as the base has it, or ``CARRIED`` for what must be equal in all."""

    densities: dict[str, float] | None = None
    """Column → share of its delta that is kept, where columns differ; None where all have ``density``."""

    def density_of(self, column: str) -> float:
        """Share of one column's delta that is kept."""
        if self.densities is not None:
            return self.densities[column]
        assert self.density is not None
        return self.density


@dataclass
class TensorResult:
    """What one tensor became, but for the backbone, which was written on the way."""

    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Conflict score name → counts; empty where conflict is not measured."""

    deltas: dict[str, PackedArrays] = field(default_factory=dict)
    """Column → delta."""

    errors: dict[str, Errors] = field(default_factory=dict)
    """Column → how good the delta is."""


class TensorWork:
    """Merges one tensor after the other; holds what they have in common.

    Args:
        base: the base.
        experts: name → checkpoint. They are taken in the order of their names, so that their given order changes
            nothing.
        config: what to do.
        dtype: storage dtype; differences are taken between weights rounded to it.
        write: takes the backbone as it is made.
        method: the merge method with what it knows of this model; by default the configuration's without any.
        groups: experts that share deltas.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        config: MediatorSettings,
        dtype: FloatType,
        write: WriteRows,
        method: ModelMethod | None = None,
        groups: Groups = NO_GROUPS,
    ) -> None:
        self.config = config
        self.method = method or ModelMethod(config)
        self.dtype = dtype
        self.write = write
        self.experts = sorted(experts)
        self.checkpoints = [base, *(experts[name] for name in self.experts)]
        self.groups = groups
        self.columns = [
            name for name in deltas_needed(config) if name not in groups.members and name not in groups.aliases
        ]
        self._space = Workspace()

    def __call__(self, task: Task) -> TensorResult:
        """Merge one tensor.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinity.
        """
        result = TensorResult()
        if task.origin != MERGED:
            self._keep_base(task)
            return result
        biases: dict[str, Floats] = {}
        if task.bias is not None:
            biases = self._bias_deltas(task.bias, want_deltas=task.density is not None)
        tiles = self._tiles(task.name, task.is_transposed)
        is_fast = is_one_pass(self.config)
        with tiles.read_once():
            one_pass = _OnePass(self, tiles, task, with_deltas=is_fast and task.density is not None)
            one_pass.run()
        if task.measure:
            statistics = one_pass.statistics()
            result.counts = {name: score.counts(statistics) for name, score in CONFLICT_SCORES.items()}
        if task.density is not None:
            for number, column in enumerate(self.columns):
                if is_fast:
                    delta, errors = one_pass.signs(number, biases.get(column))
                else:
                    delta, errors = self._any_delta(tiles, task, column, biases.get(column))
                result.deltas[column], result.errors[column] = delta, errors
            for shared in self.groups.families:
                self._add_family(result, tiles, task, shared, biases)
            if self.config.for_quantization is not None:
                result.deltas[CORRECTION] = self._correction(tiles, task)
        return result

    def weight_number(self, column: str) -> int:
        """Where a column's own weights stand among the checkpoints."""
        return 0 if column == FALLBACK_EXPERT else 1 + self.experts.index(column)

    def _keep_base(self, task: Task) -> None:
        """Write a tensor as the base has it; what is to be carried over must be the same in all checkpoints.

        Raises:
            UnsupportedError: it is not.
        """
        tiles = TensorTiles(task.name, self.checkpoints, self.dtype, "base", self._space)
        for tile in tiles:
            check_finite(task.name, tile, self.checkpoints)
            for checkpoint, rows in zip(self.checkpoints, tile.rows, strict=True):
                if task.origin == CARRIED and not np.array_equal(rows, tile.rows[0]):
                    raise UnsupportedError(
                        f"{checkpoint.label} ({checkpoint.source}) has another {task.name!r} than the base. Outside of "
                        "the language model (vision and audio encoders, projectors) nothing is merged or routed, so it "
                        "must be the same in all. Freeze it when fine-tuning, or put the base's tensor there."
                    )
            self.write(task.name, tile.start, tile.backbone.reshape(-1, *tiles.stored_shape[1:]))

    def _tiles(self, name: str, is_transposed: bool) -> TensorTiles:
        method = self.method.of_tensor(name, is_transposed)
        return TensorTiles(name, self.checkpoints, self.dtype, method, self._space, is_transposed)

    def _bias_deltas(self, name: str, want_deltas: bool) -> dict[str, Floats]:
        """Merge a bias; what each column adds to it, whole."""
        columns = [*self.columns, *sorted(self.groups.members)]
        deltas: dict[str, list[Floats]] = {column: [] for column in columns}
        tiles = self._tiles(name, is_transposed=False)
        for tile in tiles:
            check_finite(name, tile, self.checkpoints)
            check_overflow(name, tile, tiles.merge, self.dtype)
            self.write(name, tile.start, tile.backbone.reshape(-1))
            for column in columns if want_deltas else ():
                deltas[column].append(tile.delta(self.weight_number(column)).reshape(-1))
        return {column: np.concatenate(parts) for column, parts in deltas.items() if parts}

    def _any_delta(
        self, tiles: TensorTiles, task: Task, column: str, bias: Floats | None
    ) -> tuple[PackedArrays, Errors]:
        """One column's delta by any sparsifier and coding, as a whole matrix: slow and clear."""
        number = self.weight_number(column)
        delta = to_tensor(np.concatenate([tile.delta(number) for tile in tiles]))
        added = None if bias is None else to_tensor(bias)
        factors = own_factors(self.config, self.checkpoints[number], task.name, task.is_transposed)
        if factors is not None:
            packed = SparseDelta.from_factors(*factors, added)
        else:
            density = task.density_of(column)
            packed = pack_delta(self.config, f"{task.name}/{column}", delta, density, self.dtype, added)
        return PackedArrays.of(packed), errors_of(delta, packed)

    def _add_family(
        self, result: TensorResult, tiles: TensorTiles, task: Task, shared: str, biases: Mapping[str, Floats]
    ) -> None:
        """The shared delta of a family and its residuals, as whole matrices."""
        assert task.density is not None
        members = self.groups.families[shared]
        deltas = {
            name: to_tensor(np.concatenate([tile.delta(self.weight_number(name)) for tile in tiles]))
            for name in members
        }
        own = {name: to_tensor(biases[name]) for name in members if name in biases}
        densities = (task.density, residual_density(task.density))
        packed = pack_family(self.config, task.name, shared, deltas, own, densities, self.dtype)
        result.deltas |= {name: PackedArrays.of(delta) for name, delta in packed.items()}
        for name in members:
            result.errors[name] = errors_of_sum(deltas[name], (packed[shared], packed[name]))

    def _correction(self, tiles: TensorTiles, task: Task) -> PackedArrays:
        """What quantising takes from the backbone, as far as the correction's density reaches.

        Errors of rounding are alike in size: the mean of what is kept is nearest to them.
        """
        assert self.config.for_quantization is not None
        # A tile lies in buffers that the next one uses.
        backbone = to_tensor(np.concatenate([tile.backbone.copy() for tile in tiles]))
        lost = backbone.float() - ROUNDINGS[self.config.for_quantization](backbone)
        kept = largest_mask(lost, self.config.correction_density)
        # Biases are not quantised.
        bias = None if task.bias is None else torch.zeros(len(lost))
        packed = SparseDelta.from_dense(lost, kept, self.config.encoding, Precision(self.dtype.torch, "mean"), bias)
        return PackedArrays.of(packed)


class _OnePass:
    """All that is learnt of one tensor in one pass over its tiles."""

    def __init__(self, work: TensorWork, tiles: TensorTiles, task: Task, with_deltas: bool) -> None:
        self.work = work
        self.tiles = tiles
        self.task = task
        self.selections: list[SignedSelection] = []
        """Of the experts' task vectors where these are measured, then of the columns' deltas."""
        self._num_trims = 0
        self._energies = np.empty(tiles.shape[0])
        self._numbers = [work.weight_number(column) for column in work.columns] if with_deltas else []
        if task.measure or with_deltas:
            self._open()

    def _open(self) -> None:
        """Guess from a sample where the smallest kept entries lie."""
        sample = self.tiles.sample()
        shape, task = self.tiles.shape, self.task
        wanted = []
        if task.measure:
            wanted = [(self.work.config.conflict_density, vector) for vector in sample.task_vectors()]
        self._num_trims = len(wanted)
        for column, number in zip(self.work.columns, self._numbers, strict=False):
            wanted.append((task.density_of(column), sample.delta(number)))
        # Fresh memory for each tensor would cost as much as the marking.
        bitmaps = self.work._space.take("bitmaps", (len(wanted), 3, *bitmap_shape(shape)), np.uint8)
        for (density, values), place in zip(wanted, bitmaps, strict=True):
            self.selections.append(SignedSelection(shape, density, values, place))

    def run(self) -> None:
        """The pass; a second one for any selection whose bracket missed."""
        task, work = self.task, self.work
        held: list[Array] = []
        marking = Marking(self.selections, work._space)
        for tile in self.tiles:
            check_finite(task.name, tile, work.checkpoints)
            check_overflow(task.name, tile, self.tiles.merge, work.dtype)
            self._energies[tile.start : tile.stop] = tile.energies
            if task.is_transposed:
                held.append(tile.backbone.copy())
            else:
                rest = self.tiles.stored_shape[1:]
                work.write(task.name, tile.start, tile.backbone.reshape(-1, *rest))
            if self.selections:
                marking.add(tile.start, self._pairs(tile))
        if held:
            work.write(task.name, 0, np.ascontiguousarray(np.concatenate(held).T))
        for place, signed in enumerate(self.selections):
            if not signed.settle():
                self._mend(signed, place)

    def _pairs(self, tile: Tile) -> list[tuple[Array, Array]]:
        """What the selections look at: task vectors, and differences of checkpoints and backbone."""
        merged = tile.merged()
        pairs = [(tile.rows[1 + number], tile.rows[0]) for number in range(self._num_trims)]
        return pairs + [(tile.rows[number], merged) for number in self._numbers]

    def _mend(self, signed: SignedSelection, place: int) -> None:
        """Settle a selection whose bracket missed: it gets another one, in the end an exact one, and all rows again."""
        for bracket in (signed.bracket(WIDE_SLACK), None):
            signed.restart(bracket or self._exact_bracket(place, signed.num_kept))
            marking = Marking([signed], self.work._space)
            for tile in self.tiles:
                marking.add(tile.start, [self._pairs(tile)[place]])
            if signed.settle():
                return
        raise AssertionError("an exact bracket cannot miss")

    def _exact_bracket(self, place: int, num_kept: int) -> Bracket:
        def magnitudes() -> Iterator[NDArray[np.float32]]:
            for tile in self.tiles:
                minuend, subtrahend = self._pairs(tile)[place]
                yield np.abs(widened(minuend) - widened(subtrahend)).reshape(-1)

        edge = max(smallest_kept_of_tiles(magnitudes, num_kept), TINY)
        return Bracket(edge, edge)

    def statistics(self) -> Statistics:
        """For the conflict scores."""
        trims = self.selections[: self._num_trims]
        kept, negative = [trim.settled.kept for trim in trims], [trim.negative for trim in trims]
        energies = np.array([trim.squared_norm for trim in trims])
        return Statistics(kept, negative, energies, float(self._energies.sum()), kernels.count_ones)

    def signs(self, number: int, bias: Floats | None) -> tuple[PackedArrays, Errors]:
        """One column's delta, coded as signs and scales; the twin of ``ENCODINGS["sign"].encode``."""
        return self.selections[self._num_trims + number].encode(bias, self.work.config.rescale)


def is_one_pass(config: MediatorSettings) -> bool:
    """Whether the deltas can be made in the pass over the tiles; otherwise each is made as a whole matrix."""
    return config.sparsifier == "magnitude" and config.encoding == "sign"


def deltas_stored(config: MediatorSettings) -> list[str]:
    """Names of all deltas in the files: the columns', and the correction's."""
    columns = deltas_needed(config) if config.column_map is None else config.column_map
    return [*columns, *([CORRECTION] if config.for_quantization is not None else [])]


def deltas_needed(config: MediatorSettings) -> Sequence[str]:
    """Columns that have a delta: the base has none where the backbone is the base."""
    if config.merge_method == "base":
        return [name for name in config.columns if name != FALLBACK_EXPERT]
    return config.columns
