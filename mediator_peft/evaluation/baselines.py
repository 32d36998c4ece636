"""Baselines at work: a plain model with the weights that a baseline gives back of an expert, prompt by prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..config import MediatorSettings
from ..merge.builder import plan_merge
from ..merge.compatibility import Job
from ..merge.model_method import ModelViews
from ..methods.baselines import BASELINES, Baseline
from ..methods.merging import TensorContext

NAMED_ROUTE, ROUTER_ROUTE, RANDOM_ROUTE = "named", "router", "random"
ROUTES = (NAMED_ROUTE, ROUTER_ROUTE, RANDOM_ROUTE)
"""Who chooses the expert: the task at hand, the fitted router of the model that is evaluated, or chance."""

Tensors = Iterator[tuple[Tensor, TensorContext]]
"""Task vectors (K, *shape) float32 of each tensor, with its context, in which the base is set."""


class RestoredExperts:
    """What a baseline gives back of each expert.

    Args:
        row: of ``BASELINES``.
        tensors: called for each pass over the model.
        contexts: of the same tensors.
        experts: names, in the order of the task vectors.
        dtype: in which weights are stored.
        **parameters: of the baseline, where they are not its defaults.
    """

    def __init__(
        self,
        row: Baseline,
        tensors: Callable[[], Tensors],
        contexts: Iterable[TensorContext],
        experts: Sequence[str],
        dtype: torch.dtype,
        **parameters: Any,
    ) -> None:
        self._row, self._passes, self._dtype, self._given = row, tensors, dtype, parameters
        self._contexts = list(contexts)
        self.experts = list(experts)

    @cached_property
    def _survey(self) -> Any:
        return self._row.surveyed(self._passes(), **self._given)

    def state(self, expert: str | None) -> dict[str, Tensor]:
        """Tensor name → weights of an expert, rounded to the storage dtype; None gives the base."""
        found = {}
        number = None if expert is None else self.experts.index(expert)
        for task_vectors, context in self._passes():
            assert context.base is not None
            weight = context.base
            if number is not None:
                weight = weight + self._row.restored(task_vectors, number, context, self._survey, **self._given)
            found[context.name] = weight.to(self._dtype)
        return found

    def num_bytes(self) -> int:
        """Of the base, in its storage dtype, and of all that is stored of the experts."""
        base = self._dtype.itemsize * sum(prod(context.stored_shape) for context in self._contexts)
        own = self._row.num_bytes(self._contexts, len(self.experts), **self._given)
        # Full copies need no base beside them.
        return own + (0 if self._row is BASELINES["experts"] else base)


def restored_from_job(
    row: Baseline, job: Job, experts: Mapping[str, str | os.PathLike[str]], **parameters: Any
) -> RestoredExperts:
    """From checkpoints that belong together, of which one tensor is in memory at a time.

    Args:
        row: of ``BASELINES``.
        job: base and experts.
        experts: name → path.
        **parameters: of the baseline.
    """
    settings = MediatorSettings(experts={name: os.fspath(path) for name, path in experts.items()})
    method = plan_merge(job, settings).method

    def tensors() -> Tensors:
        for view in ModelViews(method, job):
            yield view.whole()

    return RestoredExperts(row, tensors, method.contexts.values(), sorted(experts), job.dtype, **parameters)


def parse_baseline(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAME@ROUTE`` → name and route; by default the expert is named.

    Raises:
        ValueError: the route is unknown.
    """
    name, _, route = text.partition("@")
    if (route or NAMED_ROUTE) not in ROUTES:
        raise ValueError(f"{route!r} is no route of a baseline; choose one of {', '.join(ROUTES)}.")
    return name, route or NAMED_ROUTE


def random_route(prompt: str, experts: Sequence[str], seed: int = 0) -> str:
    """An expert by chance: of prompt and seed alone, whatever else is asked.

    Args:
        prompt: text.
        experts: names.
        seed: of the draw.
    """
    return Random(f"{seed} {prompt}").choice(sorted(experts))


def by_choice(choices: Sequence[str | None]) -> dict[str | None, list[int]]:
    """Expert (None: the base) → places of the prompts that it answers, ascending."""
    groups: dict[str | None, list[int]] = {}
    for place, choice in enumerate(choices):
        groups.setdefault(choice, []).append(place)
    return groups
