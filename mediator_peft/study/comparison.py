"""Systems of other papers on the study's items: compressed experts, routes to whole experts, and every merge method.

Each system is scored by itself and kept in the score book, so that a stopped run goes on, several runs can share the
list, and the result file has all that is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.replacing import write_replacing
from ..config import MediatorSettings
from ..demo.tasks import Item
from ..errors import ConfigError
from ..evaluation.baselines import (
    NAMED_ROUTE,
    ROUTER_ROUTE,
    RestoredExperts,
    by_choice,
    chosen_experts,
    parse_baseline,
)
from ..evaluation.generation import ROUTED, Memo, route_prompts
from ..evaluation.measuring import measure_statistics
from ..evaluation.report import write_json
from ..merge.plain_merge import merge_models
from ..methods.baselines import BASELINES
from ..methods.merging import MERGE_METHODS
from ..presets import PRESETS, preset_settings
from ..structure import only_looks_up
from ..tables import unknown_name
from ..tuner.config import MediatorConfig
from .compared_system import Comparison, System
from .dynamic import dynamic_parts
from .lab import (
    Lab,
    contexts_of,
    merge_states,
    read_state,
    single_model_rows,
    task_vector_norm,
    tensors_with_contexts,
)
from .quantized import QUANTIZED, quantized_system
from .scores import GENERAL, Scores
from .systems import (
    BASE,
    NAMED,
    ROUTED_SYSTEM,
    Bench,
    Part,
    Parts,
    Table,
    built_model,
    bytes_of_built,
    default_name,
    is_built,
    known_coefficient,
    load_built,
    model_key,
    score_experts,
    score_general,
    tuned_coefficient,
)
from .tables import forgets, paired_tests, system_row

DYNAMIC = "dynamic"
"""Per-layer dynamic averaging of the bank's deltas."""

ORDER = (
    *("Mediator, routed, nf4 corrected", "Mediator, routed, int8"),
    *("experts@router", "emr", "t-switch", "twin", "twin, routed", "t-switch, routed", "tall", "bitdelta"),
    *("dare_ties", "widen", "pcb", "tsv", "regmean", "fisher", "dare", "weighted", "consensus", "consensus_ties"),
    *("delta-come", DYNAMIC, "experts@random", "karcher", "opcm", "ota"),
    *("Mediator, routed, nf4", "experts, int8", "experts, nf4"),
    *("average", "task_arithmetic", "ties", "slerp", "doge"),
)
"""The most important first, the slowest last. Whole experts, named, are what all of them are compared with."""

NUM_SEQUENCES = 32
"""Calibration items of each expert on which Gram matrices and Fisher information are measured."""

DATA_ROWS = {"regmean": "gram", "fisher": "fisher", "ota": "fisher"}
"""Merge methods that need a statistic."""


def check_system(name: str) -> None:
    """Refuse a name that is no baseline with its route, preset with its router, merge method, or one of this module's.

    Raises:
        ConfigError: it is none of them.
    """
    own, _ = parse_baseline(name)
    preset, _, rest = name.partition(", ")
    is_preset = preset in PRESETS and rest == "routed"
    if not (own in BASELINES or is_preset or name in (DYNAMIC, *QUANTIZED, *MERGE_METHODS)):
        raise ConfigError(unknown_name(name, ORDER, kind="system"))


def find_system(run: Comparison, name: str) -> System:
    """A system by its name.

    Raises:
        ConfigError: see :func:`check_system`.
    """
    check_system(name)
    own, route = parse_baseline(name)
    if own in BASELINES:
        return _restored(run, own, route)
    if name in QUANTIZED:
        return quantized_system(run, name)
    if name == DYNAMIC:
        key = model_key(run.bench, MediatorConfig())
        return System(
            key,
            lambda task: dynamic_parts(run.lab, run.default, run.default_model),
            lambda: bytes_of_built(run.default),
            answers_unknown=False,
        )
    return _merged(run, name) if name in MERGE_METHODS else _preset(run, name.partition(", ")[0])


def why_unsuited(run: Comparison, name: str) -> str | None:
    """Why a system cannot be made of this number of experts; None where it can."""
    wanted = MERGE_METHODS[name].num_experts if name in MERGE_METHODS else None
    return None if wanted in (None, len(run.bench.experts)) else f"{name} merges {wanted} experts"


def _restored(run: Comparison, name: str, route: str) -> System:
    """A baseline: plain weights of the expert that answers."""
    lab = run.lab

    def restored() -> RestoredExperts:
        contexts = contexts_of(lab.base, lab.experts)
        return RestoredExperts(
            BASELINES[name],
            lambda: tensors_with_contexts(lab.base, lab.experts),
            contexts,
            sorted(lab.experts),
            torch.bfloat16,
        )

    def parts(task: str) -> Parts:
        def of_items(items: Sequence[Item]) -> Iterator[Part]:
            found = run.once(name, restored)
            for expert, places in by_choice(_choices(run, task, route, items)).items():
                with lab.holding(found.state(expert)) as model:
                    yield places, {"model": model, "tokenizer": lab.tokenizer}

        return of_items

    depends = [run.bench.hashes, BASELINES[name].defaults(), route]
    if route == ROUTER_ROUTE:
        depends.append(model_key(run.bench, MediatorConfig()))
    return System(depends, parts, lambda: restored().num_bytes(), route != NAMED_ROUTE)


def _choices(run: Comparison, task: str, route: str, items: Sequence[Item]) -> list[str | None]:
    """Which expert answers each item; None for the base."""
    prompts = [item.prompt for item in items]
    return chosen_experts(route, prompts, run.lab.experts, task, lambda: route_prompts(*run.default_model(), prompts))


def _preset(run: Comparison, name: str) -> System:
    """A system that is a configuration of the library, with its own router."""
    hidden = int(run.lab.model.config.hidden_size)
    # Gemma's embedding multiplies its rows, and stays that of the preset's backbone.
    outside = ["embed_tokens"] if only_looks_up(run.lab.model.get_input_embeddings()) else []
    config = MediatorConfig(**preset_settings(name, hidden), target_modules=["all-linear", *outside])
    key = f"preset {name}"

    def folder() -> Path:
        return built_model(run.bench, f"{name}-{len(run.bench.experts)}{run.bench.suffix}", config)

    def parts(task: str) -> Parts:
        def of_items(items: Sequence[Item]) -> Iterator[Part]:
            model, tokenizer = run.once(key, lambda: load_built(folder()))
            memo = run.once(f"{key} memo", Memo.empty)
            yield (
                list(range(len(items))),
                {"model": model, "tokenizer": tokenizer, "expert_weights": ROUTED, "memo": memo},
            )

        return of_items

    return System(model_key(run.bench, config), parts, lambda: bytes_of_built(folder()))


def _merged(run: Comparison, name: str) -> System:
    """One plain model by a merge method."""
    row, bench, lab = MERGE_METHODS[name], run.bench, run.lab
    parameters: dict[str, Any] = {}
    if name == "task_arithmetic":
        parameters["scale"] = tuned_coefficient(bench, lab)

    def state() -> dict[str, torch.Tensor]:
        if name in single_model_rows():
            return merge_states(lab.base, lab.experts, row, **parameters)
        folder = bench.folder.models / f"merged-{name}{bench.suffix}"
        shutil.rmtree(folder, ignore_errors=True)
        paths = {task: expert.path for task, expert in bench.experts.items()}
        settings = MediatorSettings(merge_method=name, merge_data=merge_data(run, name))
        merge_models(bench.folder.base, paths, folder, settings, hash_inputs=False)
        found = read_state(folder)
        shutil.rmtree(folder)
        return found

    def parts(task: str) -> Parts:
        def of_items(items: Sequence[Item]) -> Iterator[Part]:
            for other in [key for key in run.memory if key.startswith("merged ") and key != f"merged {name}"]:
                del run.memory[other]
            with lab.holding(run.once(f"merged {name}", state)) as model:
                yield list(range(len(items))), {"model": model, "tokenizer": lab.tokenizer}

        return of_items

    depends: list[Any] = [bench.hashes, {**row.defaults(), **parameters}]
    if row.needs_data:
        depends.append(NUM_SEQUENCES)
    return System(depends, parts, lambda: None)


def merge_data(run: Comparison, name: str) -> str | None:
    """What a merge method reads beside the weights, measured once."""
    if name == "weighted":
        return str(_equal_norms(run))
    statistic = DATA_ROWS.get(name)
    if statistic is None:
        return None
    folder = run.bench.folder.statistics / f"{statistic}{run.bench.suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    for task, expert in run.bench.experts.items():
        output = folder / f"{task}.safetensors"
        if output.exists():
            continue
        items = run.bench.sample.tasks[task].calibration[:NUM_SEQUENCES]
        prompts = folder / f"{task}.jsonl"
        lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items]
        write_replacing(prompts, "\n".join(lines) + "\n")
        report = measure_statistics(expert.path, prompts, output, statistic, answer_column="answer")
        run.bench.say(f"{statistic} of {task}: {report.cpu_seconds:.0f} s")
    return str(folder)


def _equal_norms(run: Comparison) -> Path:
    """Coefficients that give every task vector the same norm: the tuned coefficient times mean norm over own norm."""
    norms = {name: task_vector_norm(run.lab.base, state) for name, state in run.lab.experts.items()}
    scale = tuned_coefficient(run.bench, run.lab) * sum(norms.values()) / len(norms)
    path = run.bench.folder.scores / f"equal-norms{run.bench.suffix}.json"
    coefficients = {name: scale / norm for name, norm in norms.items()}
    write_json({"coefficients_version": 1, "experts": coefficients, "about": {"norms": norms}}, path)
    return path


def score_system(run: Comparison, name: str) -> dict[str, Scores]:
    """Task → scores of one system, measured or found."""
    system = find_system(run, name)
    return {
        task: _known(run, name, task, system.depends)
        or run.bench.scored_in_parts(name, task, run.sizes(task), system.depends, system.parts(task))
        for task in _tasks(run, system)
    }


def known_scores(run: Comparison, name: str) -> dict[str, Scores] | None:
    """Those of earlier runs; None where a task is missing. Nothing is measured for it."""
    if name == "task_arithmetic" and known_coefficient(run.bench) is None:
        return None
    system = find_system(run, name)
    found = {}
    for task in _tasks(run, system):
        scores = _known(run, name, task, system.depends)
        if scores is None:
            return None
        found[task] = scores
    return found


def _known(run: Comparison, name: str, task: str, depends: object) -> Scores | None:
    """Scores of the wanted items, or the first ones of those of all items."""
    for sizes in dict.fromkeys((run.sizes(task), run.bench.sample.sizes[task])):
        scores = run.bench.book.find(name, task, run.bench.key(task, sizes, depends))
        if scores is not None:
            return scores.first(run.sizes(task))
    return None


def _tasks(run: Comparison, system: System) -> list[str]:
    return list(run.bench.sample.tasks if system.answers_unknown else run.bench.sample.known)


def score_merges(bench: Bench, lab: Lab) -> Table:
    """The single-model merges of the table of systems."""
    run = Comparison(bench, lab)
    return {name: score_system(run, name) for name in bench.settings.answered_merges}


def compare(run: Comparison, names: Sequence[str]) -> dict[str, Any]:
    """Score systems, and gather all that have been scored.

    Args:
        run: what is measured.
        names: those to score, in this order.

    Returns:
        ``systems``: name → accuracy, loss, shares kept, what is forgotten, bytes, p-values against the whole experts;
        ``left_out``: name → why; ``experts_forget``: expert → what it forgets on its own.

    Raises:
        ConfigError: a name is unknown; nothing has been scored then.
    """
    for name in names:
        check_system(name)
    bench = run.bench
    known, left_out, table = bench.sample.known, {}, {}
    alone = score_experts(bench, run.lab)
    own = {task: alone[f"expert {task}"][task].first(run.sizes(task)) for task in known}
    general = score_general(bench, run.lab)
    one = sum(path.stat().st_size for path in bench.folder.base.glob("*.safetensors"))
    for name in dict.fromkeys([*names, *ORDER]):
        reason = why_unsuited(run, name)
        found = None
        if reason is None:
            found = score_system(run, name) if name in names else known_scores(run, name)
        if found is None:
            left_out[name] = reason or "not scored"
            continue
        table[name] = _row(run, found, own, general, find_system(run, name).num_bytes() or one)
    for name, (found, num_bytes) in _mediator_scores(run).items():
        table[name] = _row(run, found, own, general, num_bytes)
    return {
        "tasks": list(known),
        "num_items": {task: asdict(run.sizes(task)) for task in known},
        "systems": table,
        "left_out": left_out,
        "experts_forget": {name: forgets(scores, general[BASE]) for name, scores in general.items() if name != BASE},
        "bytes_of_one_model": one,
    }


def _row(
    run: Comparison, found: dict[str, Scores], own: dict[str, Scores], general: dict[str, Scores], num_bytes: int
) -> dict[str, Any]:
    row = system_row(run.bench.sample.known, found, own, num_bytes)
    row["against_experts"] = paired_tests(own, found)
    if GENERAL in found and general:
        row["forgets"] = forgets(found[GENERAL], general[BASE])
    return row


def _mediator_scores(run: Comparison) -> dict[str, tuple[dict[str, Scores], int]]:
    """System → scores and bytes of the Mediator model, where the table of systems has been measured."""
    depends = model_key(run.bench, MediatorConfig())
    folder = run.bench.folder.models / default_name(run.bench)
    rows = {}
    for name in (NAMED, ROUTED_SYSTEM):
        scores = {task: _known(run, name, task, depends) for task in run.bench.sample.tasks}
        found = {task: each for task, each in scores.items() if each is not None}
        if set(found) >= set(run.bench.sample.known) and is_built(folder, depends):
            rows[name] = found, bytes_of_built(folder)
    return rows
