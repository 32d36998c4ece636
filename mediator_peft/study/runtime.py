"""What systems take to make, and how fast they answer: every figure beside that of the plain average, by turns."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..config import MediatorSettings
from ..demo.tasks import Item
from ..evaluation.baselines import RestoredExperts
from ..evaluation.prompts import pad_left, pad_token_id, render, token_ids
from ..merge.offline import build_mediator
from ..merge.plain_merge import merge_models
from ..methods.baselines import BASELINES
from ..methods.merging import MERGE_METHODS
from ..tuner.config import MediatorConfig
from .compared_system import Comparison
from .comparison import ORDER, merge_data, why_unsuited
from .cost import cpu_seconds
from .lab import contexts_of, tensors_with_contexts
from .quantized import QUANTIZED, load_quantized
from .systems import NAMED, ROUTED_SYSTEM, load_built

AVERAGE = "average"
"""What all are compared with."""

MEDIATOR = "Mediator"
"""Its build, without the router's fit, which is timed where the model is built."""

PLAIN = "one plain model"
NUM_NEW, NUM_PROMPTS = 32, 5
"""Tokens that are generated for a prompt; prompts, one of each of the first tasks."""

_Make = Callable[[], None]


def runtime(run: Comparison, rounds: int, names: Sequence[str] = ORDER) -> dict[str, Any]:
    """Both tables.

    Args:
        run: what is measured.
        rounds: how often each system is made and asked, by turns.
        names: merges and baselines that are made, beside the average and the Mediator build.

    Returns:
        ``build``: name → ``cpu_seconds`` (median), ``ratio`` to the average (median over rounds); ``decode``: name →
        ``tokens_per_second`` (median), ``ratio`` to one plain model (median over rounds); both with the smallest and
        the largest ratio of a round.
    """
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "build": build_costs(run, rounds, names),
        "decode": decode_paces(run, rounds),
    }


def build_costs(run: Comparison, rounds: int, names: Sequence[str] = ORDER) -> dict[str, dict[str, float]]:
    """Processor seconds of every merge, of the Mediator build, and of one expert's weights of each baseline.

    Merges and the build read checkpoints and write one, with the checks of the command line but for hashing inputs.
    Statistics that a merge reads are measured before. A baseline makes its weights in memory.
    """
    taken: dict[str, list[float]] = {}
    makes = _makes(run, names)
    for _ in range(rounds):
        for name, make in makes.items():
            started = cpu_seconds()
            make()
            taken.setdefault(name, []).append(cpu_seconds() - started)
        run.bench.say(", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in taken.items()))
    return {name: _beside(seconds, taken[AVERAGE], "cpu_seconds") for name, seconds in taken.items()}


def _beside(values: Sequence[float], one: Sequence[float], label: str) -> dict[str, float]:
    """Median of a figure, and its ratio to another one of the same round: median, smallest, largest."""
    ratios = [value / other for value, other in zip(values, one, strict=True)]
    return {label: median(values), "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}


def _makes(run: Comparison, names: Sequence[str]) -> dict[str, _Make]:
    bench, lab = run.bench, run.lab
    folder = bench.folder.models / f"timed{bench.suffix}"
    paths = {task: expert.path for task, expert in bench.experts.items()}

    def merged(settings: MediatorSettings) -> _Make:
        def make() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            merge_models(bench.folder.base, paths, folder, settings, hash_inputs=False)
            shutil.rmtree(folder)

        return make

    def built() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        build_mediator(bench.folder.base, paths, folder, MediatorConfig(), hash_inputs=False)
        shutil.rmtree(folder)

    def restored(name: str) -> _Make:
        def make() -> None:
            tensors, contexts = (lambda: tensors_with_contexts(lab.base, lab.experts)), contexts_of(lab.base, paths)
            experts = sorted(lab.experts)
            RestoredExperts(BASELINES[name], tensors, contexts, experts, torch.bfloat16).state(experts[0])

        return make

    merges = [
        name for name in dict.fromkeys((*names, AVERAGE)) if name in MERGE_METHODS and not why_unsuited(run, name)
    ]
    settings = {name: MediatorSettings(merge_method=name, merge_data=merge_data(run, name)) for name in merges}
    return {
        **{name: merged(each) for name, each in settings.items()},
        MEDIATOR: built,
        **{f"{name}, one expert": restored(name) for name in names if name in BASELINES},
    }


def decode_paces(run: Comparison, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of greedy answers, one prompt at a time, routing included where there is a router."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_built(run.default)
    plain = AutoModelForCausalLM.from_pretrained(run.bench.folder.base, dtype=torch.float32).eval()
    loaded = {name: load_quantized(run, how) for name, how in QUANTIZED.items() if not how.is_expert}
    asked: dict[str, tuple[Any, bool]] = {
        PLAIN: (plain, False),
        NAMED: (model, True),
        ROUTED_SYSTEM: (model, False),
        **{name: (each[0], False) for name, each in loaded.items()},
    }
    tasks = list(run.bench.sample.known)[-NUM_PROMPTS:]
    items = [(task, run.bench.sample.tasks[task].test[0]) for task in tasks]
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, (one, is_named) in asked.items():
            seconds[name].append(
                sum(_seconds(one, tokenizer, item, task if is_named else None) for task, item in items)
            )
    paces = {name: [NUM_NEW * len(items) / value for value in values] for name, values in seconds.items()}
    return {name: _beside(values, paces[PLAIN], "tokens_per_second") for name, values in paces.items()}


def _seconds(model: Any, tokenizer: Any, item: Item, expert: str | None) -> float:
    """Of one answer of ``NUM_NEW`` tokens."""
    ids = token_ids(tokenizer, render(tokenizer, item.prompt, True))
    inputs = pad_left([ids], pad_token_id(tokenizer))
    settings: Mapping[str, Any] = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    started = perf_counter()
    if expert is None:
        model.generate(**inputs, **settings)
    else:
        with model.use_experts(expert):
            model.generate(**inputs, **settings)
    return perf_counter() - started
