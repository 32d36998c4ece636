"""Batches of prompts for evaluation: which prompts together, with which expert weights, on which rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.dispatch import has_native
from ..progress import Advance
from ..ranks import Ranks

AnyModel = Any
"""A Mediator model, wrapped by PEFT or not, or any causal language model of transformers."""

WeightRow = tuple[float, ...]
Batch = tuple[Tensor | None, list[int]]
"""Expert weights to set, (K,) for all rows or (B, K), None for none; and indices of prompts."""

Result = TypeVar("Result")

_FEW = 4
"""Groups of fewer rows are answered together, each row with weights of its own, where there are kernels for that."""


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are put to a model; no answer depends on the first and the last."""

    batch_size: int = 16
    """Rows at once."""

    use_template: bool = True
    """Whether prompts are rendered with the tokenizer's chat template, where it has one."""

    ranks: Ranks | None = None
    """Processes that share the batches; each must ask the same, and gets all results. None is this one alone."""


AS_USUAL = PromptSettings()


def batches_of_like_length(indices: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: what does not fit into memory fails at once."""
    ordered = sorted(indices, key=lambda index: -lengths[index])
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def repeat(advance: Advance, times: int) -> None:
    """Tell of several steps done."""
    for _ in range(times):
        advance()


def by_weights(groups: Mapping[WeightRow | None, list[int]], lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Batches of rows that share their expert weights, one group after the other, and of few rows that do not.

    Args:
        groups: expert weights → indices of prompts.
        lengths: of all prompts, in tokens.
        batch_size: rows at once.
    """
    few = {row: indices for row, indices in groups.items() if row is not None and len(indices) < _FEW}
    if len(few) < 2 or not has_native():
        few = {}
    found: list[Batch] = []
    for row, indices in groups.items():
        if row not in few:
            weights = None if row is None else torch.tensor(row)
            found += [(weights, batch) for batch in batches_of_like_length(indices, lengths, batch_size)]
    row_of = {index: row for row, indices in few.items() for index in indices}
    for batch in batches_of_like_length(list(row_of), lengths, batch_size):
        found.append((torch.tensor([row_of[index] for index in batch]), batch))
    return found


def answered(
    model: AnyModel,
    batches: Sequence[Batch],
    work: Callable[[list[int]], list[Result]],
    advance: Advance,
    ranks: Ranks | None,
) -> Iterator[tuple[list[int], list[Result]]]:
    """Indices of each batch with what ``work`` made of it, in the order of the batches.

    Ranks share whole batches, so that no result depends on how many there are. Expert weights are set once for batches
    that follow each other.
    """
    ranks = ranks or Ranks.alone()

    def mine(some: Sequence[Batch]) -> Iterator[list[Result]]:
        for _, alike in groupby(some, key=lambda batch: id(batch[0])):
            same = list(alike)
            with _using(model, same[0][0]):
                for _, indices in same:
                    yield work(indices)
                    # On the way, as if every rank were as fast as this one.
                    repeat(advance, len(indices) * ranks.count)

    found = ranks.share(batches, mine)
    return ((indices, results) for (_, indices), results in zip(batches, found, strict=True))


def _using(model: AnyModel, weights: Tensor | None) -> AbstractContextManager[Any]:
    """All that is asked inside is answered with these expert weights; set once for all batches of a group."""
    return nullcontext() if weights is None else model.use_experts(weights)
