"""Baselines at work: a plain model with the weights that a baseline gives back of an expert, prompt by prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..config import MediatorSettings
from ..errors import ConfigError
from ..merge.builder import plan_merge
from ..merge.compatibility import Job
from ..merge.model_method import ModelViews
from ..merge.offline import open_job
from ..merge.plain_merge import merge_models
from ..methods.baselines import BASELINES, Baseline
from ..methods.merging import MERGE_METHODS, TensorContext
from ..tables import unknown_name
from .generation import Route
from .runner import AnsweredItem, EvalTask, Scoring, SystemScore, score_tasks, task_score

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

    return RestoredExperts(row, tensors, method.contexts.values(), sorted(experts), job.dtype.torch, **parameters)


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


def chosen_experts(
    route: str,
    prompts: Sequence[str],
    experts: Iterable[str],
    named: str | None,
    routes: Callable[[], Sequence[Route]],
) -> list[str | None]:
    """Which expert answers each prompt; None for the base.

    Args:
        route: one of ``ROUTES``.
        prompts: of one task.
        experts: names.
        named: the task's own expert.
        routes: gives where a fitted router sends each prompt; called for ``ROUTER_ROUTE`` alone.
    """
    known = set(experts)
    if route == NAMED_ROUTE:
        return [named] * len(prompts)
    if route == RANDOM_ROUTE:
        return [random_route(prompt, sorted(known)) for prompt in prompts]
    return [found.expert if found.expert in known else None for found in routes()]


def by_choice(choices: Sequence[str | None]) -> dict[str | None, list[int]]:
    """Expert (None: the base) → places of the prompts that it answers, ascending."""
    groups: dict[str | None, list[int]] = {}
    for place, choice in enumerate(choices):
        groups.setdefault(choice, []).append(place)
    return groups


def check_names(texts: Sequence[str]) -> None:
    """Refuse what is neither a baseline nor a merge method that needs no data.

    Args:
        texts: ``NAME`` or ``NAME@ROUTE``.

    Raises:
        ConfigError: one is unknown; all such faults are listed.
    """
    faults = []
    for text in texts:
        try:
            name, route = parse_baseline(text)
        except ValueError as fault:
            faults.append(str(fault))
            continue
        if name in MERGE_METHODS:
            if route != NAMED_ROUTE:
                faults.append(f"{text!r}: a merge method gives one model, which no route chooses from.")
            elif MERGE_METHODS[name].needs_data:
                faults.append(f"{name!r} needs data: run `mediator-peft merge`, and give {name}=FOLDER.")
        elif name not in BASELINES:
            faults.append(unknown_name(name, [*BASELINES, *MERGE_METHODS], "baseline"))
    if faults:
        raise ConfigError("\n".join(faults))


class PublishedSystems:
    """Baselines by name, made from the base and the experts that a model was built from.

    Args:
        config: of a built model; it says where base and experts lie.
        load_plain: path → plain model and tokenizer.
    """

    def __init__(self, config: MediatorSettings, load_plain: Callable[[str], tuple[Any, Any]]) -> None:
        found = config.provenance or {}
        self._base: Any = found.get("base")
        self._experts: dict[str, str] = dict(found.get("experts") or {})
        self._load_plain = load_plain
        self._opened: tuple[Job, Any, Any] | None = None
        # With what was found out in a pass over the whole model, which all routes share.
        self._restored: dict[str, RestoredExperts] = {}

    def score(
        self, text: str, tasks: Sequence[EvalTask], routes: Mapping[str, Sequence[Route]], scoring: Scoring
    ) -> SystemScore:
        """Scores of one system.

        Args:
            text: ``NAME`` or ``NAME@ROUTE``.
            tasks: what is answered; without a route, those with an expert.
            routes: task → where the evaluated model's router sends each prompt.
            scoring: how.

        Raises:
            ConfigError: the model does not say what it was built from.
            CheckpointError: that is not there any more.
        """
        name, route = parse_baseline(text)
        if name in MERGE_METHODS:
            return self._score_merged(name, tasks, scoring)
        restored = self._restored_experts(name)
        _, model, tokenizer = self._open()
        asked = [task for task in tasks if task.expert is not None] if route == NAMED_ROUTE else list(tasks)
        choices = {task.name: self._choices(task, route, routes.get(task.name, ())) for task in asked}

        def hold(expert: str | None) -> Any:
            model.load_state_dict(restored.state(expert), strict=False)
            return model

        return score_by_choice(text, hold, tokenizer, asked, choices, scoring)

    def num_bytes(self, text: str) -> int | None:
        """Of all weights of a baseline, the base among them; None for a merge method."""
        name, _ = parse_baseline(text)
        if name in MERGE_METHODS:
            return None
        return self._restored_experts(name).num_bytes()

    def _restored_experts(self, name: str) -> RestoredExperts:
        if name not in self._restored:
            self._restored[name] = restored_from_job(BASELINES[name], self._open()[0], self._experts)
        return self._restored[name]

    def _choices(self, task: EvalTask, route: str, routes: Sequence[Route]) -> list[str | None]:
        return chosen_experts(route, [item.prompt for item in task.items], self._experts, task.expert, lambda: routes)

    def _open(self) -> tuple[Job, Any, Any]:
        if self._opened is None:
            self._check()
            job = open_job(self._base, MediatorSettings(experts=self._experts))
            model, tokenizer = self._load_plain(self._base)
            self._opened = job, model.eval(), tokenizer
        return self._opened

    def _check(self) -> None:
        if not self._base or not self._experts:
            raise ConfigError(
                "baselines by name need the base and the experts, and this model does not say what it was built from. "
                "Give checkpoints: --baseline NAME=CHECKPOINT."
            )

    def _score_merged(self, name: str, tasks: Sequence[EvalTask], scoring: Scoring) -> SystemScore:
        self._check()
        with TemporaryDirectory() as folder:
            output = Path(folder, "merged")
            settings = MediatorSettings(merge_method=name)
            merge_models(self._base, self._experts, output, settings, hash_inputs=False)
            model, tokenizer = self._load_plain(str(output))
            return score_tasks(name, model, tokenizer, tasks, scoring)


def score_by_choice(
    name: str,
    hold: Callable[[str | None], Any],
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    choices: Mapping[str, Sequence[str | None]],
    scoring: Scoring,
) -> SystemScore:
    """Let each item be answered by the weights that were chosen for it.

    Args:
        name: what reports call the system.
        hold: expert, or None for the base → the model with its weights.
        tokenizer: of the model.
        tasks: what to answer.
        choices: task → expert of each item.
        scoring: how.
    """
    found: dict[str, dict[int, AnsweredItem]] = {task.name: {} for task in tasks}
    seconds = dict.fromkeys(found, 0.0)
    groups = {task.name: by_choice(choices[task.name]) for task in tasks}
    for expert in dict.fromkeys(choice for group in groups.values() for choice in group):
        parts = [
            replace(task, items=[task.items[place] for place in groups[task.name][expert]])
            for task in tasks
            if expert in groups[task.name]
        ]
        scores = score_tasks(name, hold(expert), tokenizer, parts, scoring)
        for task_name, score in scores.tasks.items():
            found[task_name].update(zip(groups[task_name][expert], score.items, strict=True))
            seconds[task_name] += score.seconds
    return SystemScore(
        name,
        {task: task_score([items[place] for place in sorted(items)], seconds[task]) for task, items in found.items()},
    )
