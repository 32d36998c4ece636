"""What a merge method is: a function, what it must be given, and what a reader of the table wants to know."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...deferred import torch
from ...tables import unknown_name

if TYPE_CHECKING:
    from torch import Tensor


LINEAR, EMBEDDING, HEAD, OTHER = "linear", "embedding", "head", "other"
"""Kinds of tensors: the weight of a linear layer of a block, the token embedding, ``lm_head``, all others."""

_BOUNDS = re.compile(r"([\[(])(\S+), (\S+)([\])])")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method: a number, a truth value or a choice, as its default is."""

    default: bool | int | float | str
    text: str
    """What it is, in one line."""

    bounds: str = "(-inf, inf)"
    """The interval of a number, e.g. ``"(0, 1]"``."""

    choices: tuple[str, ...] = ()
    """What a text may be."""

    is_published: bool = False
    """Whether the default is the paper's (or its authors' code's); otherwise it is our choice."""

    def fault(self, value: object) -> str | None:
        """What is wrong with a value; None where nothing is."""
        kind = type(self.default)
        if kind is bool:
            return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
        if kind is str:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}, got {value!r}"
        is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not self._is_inside(value):  # type: ignore[arg-type]
            what = "a whole number" if kind is int else "a finite number"
            return f"must be {what} in {self.bounds}, got {value!r}"
        return None

    def _is_inside(self, value: float) -> bool:
        found = _BOUNDS.fullmatch(self.bounds)
        assert found is not None, f"bounds {self.bounds!r} are not like '(0, 1]'"
        low, high = float(found[2]), float(found[3])
        above = value >= low if found[1] == "[" else value > low
        return above and (value <= high if found[4] == "]" else value < high)


@dataclass(frozen=True)
class TensorContext:
    """The tensor at hand, for merge methods that need more than its task vectors."""

    name: str
    experts: tuple[str, ...] = ()
    """In the order of the task vectors: sorted by name."""

    stored_shape: tuple[int, ...] = ()
    is_transposed: bool = False
    """The tensor is stored as (I, O) (``Conv1D``), and its tiles are rows of its transpose."""

    kind: str = OTHER
    """``LINEAR``, ``EMBEDDING``, ``HEAD`` or ``OTHER``."""

    block: int | None = None
    """The block that it lies in; None outside of the blocks."""

    num_blocks: int = 1
    seed: int = 0
    data: Any = None
    """What ``MergeMethod.open_data`` returned."""

    shared: Any = None
    """What ``MergeMethod.prepass`` returned."""

    survey: Any = None
    """What ``MergeMethod.survey`` returned."""

    base: Tensor | None = None
    """The base's weights at the place of the task vectors, float32."""

    start: int = 0
    """Number of the first row of this tile; 0 for whole tensors."""

    @property
    def is_vector(self) -> bool:
        """Whether the tensor has one dimension or none; a tile of it is (K, r, 1)."""
        return len(self.stored_shape) < 2

    def flat_indices(self, rows: int, columns: int) -> Tensor:
        """Places of a tile's entries in the stored tensor: (rows, columns) int64."""
        first = torch.arange(self.start, self.start + rows)[:, None]
        second = torch.arange(columns)[None]
        return second * self.stored_shape[-1] + first if self.is_transposed else first * columns + second


class TensorView(Protocol):
    """One tensor of all checkpoints, as a pre-pass over the model sees it."""

    context: TensorContext

    def tiles(self) -> Iterator[tuple[Tensor, TensorContext]]:
        """Task vectors (K, r, I) of some rows at a time, with the context of the rows."""

    def whole(self) -> tuple[Tensor, TensorContext]:
        """Task vectors as a method that is not entrywise gets them."""


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge task vectors; a row of ``MERGE_METHODS``."""

    merge: Callable[..., Tensor]
    """Task vectors (K, *shape), float32 → merged task vector (*shape), a new tensor. Parameters are keyword arguments.
    With ``takes_context``, a :class:`TensorContext` follows the task vectors."""

    is_entrywise: bool = False
    """Whether an entry of the result depends on that entry of the task vectors alone (and on the context): then a large
    tensor is merged a few rows at a time, as (K, r, I); otherwise whole tensors are held in memory."""

    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Keyword argument of ``merge`` → what it may be."""

    takes_context: bool = False
    """Whether ``merge`` is given the context."""

    is_oriented: bool = False
    """Whether matrices must be (outputs, inputs) even where they are stored the other way (``Conv1D``)."""

    survey: Callable[..., Any] | None = None
    """First pass of a method with two passes: (iterator of (task vectors (K, r, I), context) of the tensor's tiles,
    context, **parameters) → statistics, ``context.survey`` in ``merge``. It must add up row by row: tiles may have any
    number of rows."""

    prepass: Callable[..., Any] | None = None
    """A pass over the whole model before any tensor is merged: (list of :class:`TensorView`, **parameters) → numbers,
    ``context.shared`` in ``merge``."""

    open_data: Callable[[Path, Mapping[str, TensorContext]], Any] | None = None
    """Opens and checks what ``merge_data`` names: (path, tensor name → context) → ``context.data``. Raises
    ``ConfigError`` with all faults. None where the method reads no data."""

    needs_data: bool = False
    """Whether it cannot do without ``merge_data``."""

    needs_base: bool = False
    """Whether it needs a real base: against the mean of the experts, task vectors add up to zero."""

    num_experts: int | None = None
    """How many experts it merges; None for any number."""

    scale_of_sum: Callable[..., float] | None = None
    """Where the result is the sum of the task vectors times one number: (K, **parameters) → that number."""

    is_costly: bool = False
    """Whether samples of a matrix must not be merged with it: they are then taken around the average."""

    work: Callable[[int, int, int], float] | None = None
    """(K, rows, columns) → float32 numbers that merging a matrix holds at most beside task vectors and base, measured
    on large matrices; for predictions of memory. None: a copy of the task vectors and some more."""

    works_on_linear_alone: bool = False
    """Whether ``work`` holds for weights of linear layers only; all other tensors are averaged."""

    is_order_free: bool = True
    """Whether the names of the experts change nothing."""

    paper: str = ""
    """Title or short name, and arXiv number or address."""

    data: str = "none"
    """What it needs beside the checkpoints, for the table of methods."""

    cost: str = "one pass"
    good_for: str = ""

    def __call__(self, task_vectors: Tensor, context: TensorContext | None = None, **given: Any) -> Tensor:
        """``merge`` with its default parameters, but for those given."""
        settings = {**self.defaults(), **given}
        if self.takes_context:
            return self.merge(
                task_vectors, context or TensorContext("", stored_shape=task_vectors.shape[1:]), **settings
            )
        return self.merge(task_vectors, **settings)

    def work_numbers(self, num_experts: int, rows: int, columns: int, is_linear: bool) -> float:
        """Float32 numbers that merging a tensor holds at most, beside task vectors and base; 0 for tiles."""
        if self.work is not None and (is_linear or not self.works_on_linear_alone):
            return self.work(num_experts, rows, columns)
        return 0.0 if self.is_entrywise else (2 + 1.25 * num_experts) * rows * columns

    def defaults(self) -> dict[str, Any]:
        """Parameter → default."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def faults(self, given: Mapping[str, object], method: str) -> Iterator[str]:
        """What is wrong with given parameters, one message each.

        Args:
            given: name → value.
            method: name of this row.
        """
        for name, value in given.items():
            if name not in self.parameters:
                known = unknown_name(name, self.parameters, f"parameter of merge_method {method!r}")
                yield known if self.parameters else f"merge_method {method!r} has no parameters, got {name!r}."
                continue
            fault = self.parameters[name].fault(value)
            if fault is not None:
                yield f"merge_parameters[{name!r}] of {method!r} {fault}."

    @property
    def is_sampled(self) -> bool:
        """Whether it can merge a sample of a matrix by itself, without the model around it."""
        return not (self.is_costly or self.takes_context)


@dataclass(frozen=True)
class TensorMethod:
    """A merge method at work on one tensor."""

    row: MergeMethod
    context: TensorContext
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Those that are no defaults."""

    factor: float = 1.0
    """The merged task vector is multiplied by it (``depth_scaling``)."""

    def __call__(self, task_vectors: Tensor, base: Tensor, start: int = 0) -> Tensor:
        """The merged task vector of a tile or of a whole tensor, a new tensor."""
        if self.row.takes_context:
            merged = self.row(task_vectors, self.at(base, start), **self.parameters)
        else:
            merged = self.row(task_vectors, **self.parameters)
        return merged if self.factor == 1.0 else merged.mul_(self.factor)

    def at(self, base: Tensor, start: int) -> TensorContext:
        """The context of some rows."""
        return replace(self.context, base=base, start=start)

    def surveyed(self, tiles: Iterable[tuple[Tensor, TensorContext]]) -> TensorMethod:
        """The same after its first pass."""
        assert self.row.survey is not None
        settings = {**self.row.defaults(), **self.parameters}
        return replace(self, context=replace(self.context, survey=self.row.survey(tiles, self.context, **settings)))
