"""Hard cases: several experts of one task, large steps, a LoRA expert, prompts of two tasks, later turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_files import find_adapter
from ..checkpoints.adapter_sizes import read_adapter_info
from ..demo.tasks import Task
from ..demo.training import TrainedExpert
from ..evaluation.batching import AS_USUAL
from ..evaluation.generation import ROUTED, Memo, Route, route_prompts, route_token_rows
from ..evaluation.prompts import pad_token_id
from ..routing.gate import smallest_sufficient_set
from ..tuner.config import FALLBACK_EXPERT, MediatorConfig
from .dynamic import expert_probabilities
from .experts import load_tasks, trained_experts, training_items
from .lab import Lab
from .scores import Scores, Sizes
from .systems import MARKER, Bench, Sample, built_model, load_built, routing_shares
from .tables import system_row

EXTRA = ("spelling-other", "spelling-large-step", "wordnet-lora")
"""Experts that share their task with another one."""

FAMILY_ANSWERS, FAMILY_LOSSES = 100, 20
"""Test items of each expert that shares its task."""

NUM_PAIRS = 3
"""Prompts of two tasks, and chats of two turns, for each ordered pair of tasks."""

NUM_GATED = 25
"""Test prompts a task for each variant of the gate."""


def hard_cases(bench: Bench, lab: Lab, default: Path, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """All of them.

    Args:
        bench: of the main experts.
        lab: their weights.
        default: the Mediator model of the main experts.
        save: takes what there is after each part, so that a stopped run has it.

    Returns:
        ``family``: see :func:`related_experts`; ``two_tasks``, ``turns``: shares of prompts by where they were sent;
        ``gates``: variant → mean weight of the right expert on known prompts and of the base on unknown ones.
    """
    model, tokenizer = load_built(default)
    found: dict[str, Any] = {
        "two_tasks": two_tasks(bench, model, tokenizer),
        "turns": later_turns(bench, model, tokenizer),
        "gates": gates(bench, model, tokenizer),
    }
    save(found)
    found["family"] = related_experts(bench, lab)
    save(found)
    return found


def related_experts(bench: Bench, lab: Lab) -> dict[str, Any]:
    """One model of the main experts and those of :data:`EXTRA` that have been trained.

    An extra expert is calibrated on prompts that it was trained on, and measured on the test items of its task.

    Returns:
        ``own``, ``named``, ``routed``: as rows of the table of systems, over all experts of tasks with several;
        ``routing``: where their test prompts were sent.
    """
    wide = with_extra(bench)
    folder = built_model(wide, f"hard-{len(wide.experts)}", MediatorConfig())
    shared = {bench.settings.experts[name].task for name in wide.experts if name not in bench.experts}
    names = [name for name in wide.experts if bench.settings.experts[name].task in shared]
    own = {
        name: _own_scores(bench if name in bench.experts else wide, lab, name).first(wide.sample.sizes[name])
        for name in names
    }
    found: dict[str, dict[str, Scores]] = {"own": own, "named": {}, "routed": {}}
    loaded, memo = load_built(folder), Memo.empty()
    key = [wide.hashes, (folder / MARKER).read_text(encoding="utf-8")]
    for name in names:
        for kind, weights in (("named", name), ("routed", ROUTED)):
            arguments = {"model": loaded[0], "tokenizer": loaded[1], "expert_weights": weights, "memo": memo}
            ready = partial(dict[str, Any], arguments)
            found[kind][name] = wide.scored(f"hard, {kind}", name, wide.sample.sizes[name], key, ready)
    info = read_adapter_info(find_adapter(folder))
    size = (info.backbone_bytes or 0) + info.adapter_bytes
    shares = routing_shares(wide, folder)
    rows = {kind: system_row(names, scores, own, size) for kind, scores in found.items()}
    return {**rows, "names": names, "routing": {name: shares[name] for name in names}}


def with_extra(bench: Bench) -> Bench:
    """The bench with the experts of :data:`EXTRA` as tasks of their own."""
    trained = trained_experts(bench.settings, bench.folder)
    raw = load_tasks(bench.settings, bench.folder)
    tasks, sizes, experts = dict(bench.sample.tasks), dict(bench.sample.sizes), dict(bench.experts)
    for name in EXTRA:
        if name not in trained or bench.settings.experts[name].task not in bench.experts:
            bench.say(f"left out, not trained: {name}")
            continue
        of = bench.settings.experts[name].task
        own = training_items(bench.settings.experts[name], raw, bench.folder)
        parent = tasks[of]
        tasks[name] = Task(own, own[: bench.settings.num_calibration], parent.test, parent.match)
        experts[name] = trained[name]
        for each in (of, name):
            sizes[each] = Sizes(min(FAMILY_ANSWERS, sizes[of].answers), min(FAMILY_LOSSES, sizes[of].losses))
    known = list(experts)
    ordered = {name: tasks[name] for name in [*known, *(name for name in tasks if name not in experts)]}
    return replace(bench, experts=experts, sample=Sample(ordered, known, sizes))


def _own_scores(bench: Bench, lab: Lab, name: str) -> Scores:
    """Of an expert as it was trained."""
    expert = bench.experts[name]

    def ready() -> dict[str, Any]:
        if name in lab.experts:
            with lab.holding(lab.experts[name]) as model:
                return {"model": model, "tokenizer": lab.tokenizer}
        return {"model": _plain_model(bench.folder.base, expert), "tokenizer": lab.tokenizer}

    return bench.scored(f"expert {name}", name, bench.sample.sizes[name], expert.path.name, ready)


def _plain_model(base: Path, expert: TrainedExpert) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (expert.path / "model.safetensors").exists():
        return AutoModelForCausalLM.from_pretrained(expert.path, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, expert.path).merge_and_unload().eval()


def two_tasks(bench: Bench, model: Any, tokenizer: Any) -> dict[str, float]:
    """Prompts that ask for two things, one after the other."""
    pairs = _pairs(bench)
    prompts = [f"{first.prompt.strip()} {second.prompt.strip()}" for _, _, first, second in pairs]
    return _shares([(one, two) for one, two, _, _ in pairs], route_prompts(model, tokenizer, prompts))


def later_turns(bench: Bench, model: Any, tokenizer: Any) -> dict[str, float] | None:
    """Chats whose second user turn is of another task than the first; None without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    pairs = _pairs(bench)
    rows = []
    for _, _, first, second in pairs:
        turns = [("user", first.prompt), ("assistant", first.answer), ("user", second.prompt)]
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    routes = route_token_rows(model, rows, pad_token_id(tokenizer), AS_USUAL)
    return _shares([(one, two) for one, two, _, _ in pairs], routes)


def _pairs(bench: Bench) -> list[tuple[str, str, Any, Any]]:
    """(first task, second task, item of the first, item of the second)"""
    return [
        (one, two, first, second)
        for one, two in permutations(bench.sample.known, 2)
        for first, second in zip(
            bench.sample.tasks[one].test[:NUM_PAIRS], bench.sample.tasks[two].test[-NUM_PAIRS:], strict=True
        )
    ]


def _shares(pairs: Sequence[tuple[str, str]], routes: Sequence[Route]) -> dict[str, float]:
    """Where prompts of two tasks were sent: the first's expert, the second's, another, the base."""
    kinds = ("first", "second", "other expert", "base")

    def kind(route: Route, first: str, second: str) -> str:
        if route.expert == first:
            return kinds[0]
        if route.expert == second:
            return kinds[1]
        return kinds[3] if route.expert in (FALLBACK_EXPERT, "backbone") else kinds[2]

    sent = [kind(route, *pair) for pair, route in zip(pairs, routes, strict=True)]
    flagged = sum(route.is_ood for route in routes) / len(routes)
    return {"prompts": len(sent), **{each: sent.count(each) / len(sent) for each in kinds}, "flagged": flagged}


def gates(bench: Bench, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Variant of the gate → mean weight of the right expert on known prompts, of the base on unknown ones.

    All are computed from one pass: the router's probabilities and the share t that the gate gives to experts.
    """
    probabilities, trust, labels = _routed(bench, model, tokenizer)
    top_p = model.peft_config[model.active_adapter].routing_top_p
    one = torch.ones_like(trust)
    best = torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).float()
    chosen = smallest_sufficient_set(probabilities, top_p)
    variants: Mapping[str, tuple[Tensor, Tensor]] = {
        "default": (trust, chosen),
        "likeliest expert alone": (trust, best),
        "all experts by probability": (trust, probabilities),
        "no base": (one, chosen),
        "no base, all experts by probability": (one, probabilities),
    }
    known = labels >= 0
    found = {}
    for name, (share, mix) in variants.items():
        right = (share[:, None] * mix)[known].gather(1, labels[known][:, None])
        to_base = (1 - share)[~known]
        found[name] = {
            "right expert": float(right.mean()),
            "smallest": float(right.min()),
            "base, unknown": float(to_base.mean()) if len(to_base) else float("nan"),
        }
    return found


def _routed(bench: Bench, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (N, K), what the gate gives to experts (N,), and numbers of the right experts (N,), -1 for none."""
    names = [name for name in model.expert_names if name != FALLBACK_EXPERT]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for task, content in bench.sample.tasks.items():
        prompts = [item.prompt for item in content.test[:NUM_GATED]]
        routes = route_prompts(model, tokenizer, prompts)
        given = torch.tensor([sum(route.expert_weights[name] for name in names) for route in routes])
        label = names.index(task) if task in names else -1
        found.append((expert_probabilities(model, tokenizer, prompts), given, torch.full((len(prompts),), label)))
    probabilities, trust, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return probabilities, trust, labels
