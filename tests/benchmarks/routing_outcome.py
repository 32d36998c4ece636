"""Share of right answers by prompt set and by system: what routing is worth to whoever reads the answers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from routing_features import prompt_sets

from mediator_peft import load_mediator
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.demo.hard_prompts import TASKS, calibration_prompts, hard_sets
from mediator_peft.evaluation.generation import Memo, answer_prompts
from mediator_peft.evaluation.outcomes import judge_outcomes
from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.evaluation.scoring import MATCHERS
from mediator_peft.routing.background import BACKGROUND_PROMPTS
from mediator_peft.routing.gate import gate
from mediator_peft.tuner.fitting import text_features

SYSTEMS = (
    "base",
    "backbone",
    "own expert",
    "nearest expert",
    "routed, no hard negatives",
    "routed",
    "routed, answers learnt",
)
RIVALS = ("base", "backbone", "nearest expert")
ROOM = {"last_number": 160, "exact": 32, "contains": 32}
"""New tokens by way of matching: a word problem's answer is worked out before its number."""
KINDS = ("seen", "unseen", "shifted", "near", "later", "far")


def outcome(out, device, per_set, path, seeds=(11, 12), batch_size=64, skip=(), dtype="float32"):
    """Answer every judged prompt with every system; write a JSON file and print the table.

    Args:
        out: a model built from the demo's experts, with the demo's materials beside it.
        device: "cpu", "cuda", ...
        per_set: prompts a set, fewer where the material runs out.
        path: of the JSON file, with all answers.
        seeds: of the calibration prompts and of the test sets.
        batch_size: prompts generated at once.
        skip: tasks whose own sets are left out.
        dtype: of the model.
    """
    started = time.perf_counter()
    folder = out.parent / "materials"
    model, tokenizer = load_mediator(out, dtype=getattr(torch, dtype))
    model = model.to(device)
    if torch.device(device).type != "cpu":
        _unpack(model)
    rows = [
        {"set": name, "kind": kind, "prompt": prompt.messages[-1]["content"], "answer": prompt.answer,
         "match": prompt.match, "own": prompt.experts[0] if prompt.experts else None}
        for name, (kind, prompts) in prompt_sets(per_set, seeds[1], folder, 0).items()
        for prompt in prompts if prompt.answer is not None and not {*prompt.experts} & {*skip}
    ]  # fmt: skip
    texts = _texts(tokenizer, calibration_prompts(100, seeds[0], folder))
    weights = {}
    model.fit_router(texts, tokenizer, batch_size=32, hard_negatives=False)
    weights["routed, no hard negatives"], _ = _judged(model, tokenizer, rows)
    model.fit_router(texts, tokenizer, batch_size=32)
    weights["routed"], notes = _judged(model, tokenizer, rows)
    weights |= _fixed(model, rows, notes)
    found = judge_outcomes(model, tokenizer, _answered(seeds[0], folder, rows), batch_size=batch_size)
    counts = {name: len(some) for name, some in found.experts.items()}
    print(f"by their answers: {counts}, {len(found.ordinary)} ordinary, {found.num_undecided} undecided", flush=True)
    more = {task: texts[task] + _rendered(tokenizer, found.experts[task]) for task in TASKS}
    background = [*BACKGROUND_PROMPTS, *found.ordinary]
    model.fit_router(more, tokenizer, batch_size=32, background=background)
    weights["routed, answers learnt"], learnt = _judged(model, tokenizer, rows)
    notes["expert_weights, answers learnt"] = learnt["expert_weights"]
    for number, row in enumerate(rows):
        row |= {key: values[number] for key, values in notes.items()} | {"outputs": {}, "right": {}}
    memo = Memo.empty()
    for system in SYSTEMS:
        for match, room in ROOM.items():
            some = [n for n, row in enumerate(rows) if row["match"] == match]
            outputs = answer_prompts(
                model, tokenizer, [rows[n]["prompt"] for n in some], expert_weights=weights[system][some],
                max_new_tokens=room, batch_size=batch_size, memo=memo,
            )  # fmt: skip
            for n, output in zip(some, outputs, strict=True):
                rows[n]["outputs"][system] = output
                rows[n]["right"][system] = MATCHERS[match](output, rows[n]["answer"])
        print(f"{system}: {time.perf_counter() - started:.0f} s", flush=True)
    found = {"seeds": seeds, "per_set": per_set, "device": device, "sets": _by_set(rows), "prompts": rows}
    path.write_text(json.dumps(found), encoding="utf-8")
    print_outcome(found)


def _rendered(tokenizer, prompts):
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def _texts(tokenizer, prompts):
    texts = {task: [] for task in TASKS}
    for prompt in prompts:
        texts[prompt.experts[0]] += _rendered(tokenizer, [prompt.messages[-1]["content"]])
    return texts


def _answered(seed, folder, rows):
    """Items of the unknown kinds that a gate may be developed on, none of whose prompts or words is judged."""
    words = {row["answer"] for row in rows if row["own"] is None and row["match"] != "last_number"}
    taken = {row["prompt"] for row in rows} | words
    return [
        TaskItem(prompt.messages[-1]["content"], prompt.answer, prompt.match)
        for kind, prompts in hard_sets(100, seed, folder).values()
        for prompt in prompts
        if kind in ("near", "far") and prompt.answer is not None
        if not {prompt.messages[-1]["content"], prompt.answer} & taken
    ]


@torch.no_grad()
def _judged(model, tokenizer, rows):
    """Expert weights (N, K + 1), the base's column last, and what the gate said of each prompt."""
    router, settings = model.router.to("cpu"), model.prompt_router.gate_settings
    texts = _rendered(tokenizer, [row["prompt"] for row in rows])
    x = text_features(model.prompt_router, tokenizer, texts, 32, 2048, None, False)
    scores, ood_score, distance = router.calibrated(x), router.background_log_odds(x), router.distance(x)
    routed = gate(scores, ood_score, distance, router.known, settings)
    notes = {
        "nearest": [TASKS[number] for number in scores.argmax(dim=1).tolist()],
        "ood_score": ood_score.tolist(),
        "distance": distance.tolist(),
        "scores": scores.tolist(),
        "is_ood": routed.is_ood.tolist(),
        "expert_weights": routed.expert_weights.tolist(),
    }
    return routed.expert_weights, notes


def _fixed(model, rows, notes):
    """Weights of the systems that do not fall back."""
    width = len(model.expert_names)
    nearest = torch.tensor([TASKS.index(name) for name in notes["nearest"]])
    own = torch.tensor([TASKS.index(row["own"]) if row["own"] else -1 for row in rows])

    def one_hot(columns):
        return F.one_hot(columns, width).float()

    return {
        "base": one_hot(torch.full((len(rows),), width - 1)),
        "backbone": torch.zeros(len(rows), width),
        "own expert": one_hot(torch.where(own < 0, nearest, own)),
        "nearest expert": one_hot(nearest),
    }


@dataclass(frozen=True)
class _Unpacked(SparseDelta):
    """A delta whose plain matrix is kept: four of them fit on a GPU, and unpacking at every step is the dear part."""

    matrix: torch.Tensor = None

    def dense(self):
        return self.matrix


def _unpack(model):
    """Keep all deltas as plain matrices, so that mixed batches cost one product a column."""
    for layer in model.routed_layers().values():
        bank = layer.bank(model.active_adapters[0])
        kept = {}
        for name in bank.names:
            delta = bank.get(name)
            kept[name] = _Unpacked(delta.shape, delta.coding, delta.mask, delta.parts, delta.bias, delta.dense())
        bank.get = kept.get
    model.set_execution("sparse")


def _by_set(rows):
    sets = {}
    for row in rows:
        one = sets.setdefault(row["set"], {"kind": row["kind"], "n": 0, "right": dict.fromkeys(SYSTEMS, 0)})
        one["n"] += 1
        for system in SYSTEMS:
            one["right"][system] += row["right"][system]
    return sets


def print_outcome(found):
    """Shares by set; a star where a way of routing loses more than a point to the best of its rivals."""
    print(f"\n| set | n | {' | '.join(SYSTEMS)} |\n|{'---|' * (len(SYSTEMS) + 2)}")
    totals = {}
    for name, one in found["sets"].items():
        share = {system: one["right"][system] / one["n"] for system in SYSTEMS}
        least = max(share[system] for system in RIVALS) - 0.01
        cells = [
            f"{share[system]:.3f}{' *' if system.startswith('routed') and share[system] < least else ''}"
            for system in SYSTEMS
        ]
        print(f"| {name} ({one['kind']}) | {one['n']} | {' | '.join(cells)} |")
        totals.setdefault(one["kind"], []).append(share)
    for kind in KINDS:
        if kind in totals:
            means = [sum(share[system] for share in totals[kind]) / len(totals[kind]) for system in SYSTEMS]
            print(f"| mean of {kind} | | {' | '.join(f'{mean:.3f}' for mean in means)} |")
