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
from mediator_peft.demo.hard_prompts import TASKS, calibration_prompts
from mediator_peft.evaluation.generation import Memo, answer_prompts
from mediator_peft.evaluation.scoring import MATCHERS
from mediator_peft.routing.gate import gate
from mediator_peft.routing.novelty import trust_of
from mediator_peft.tuner.fitting import text_features

SYSTEMS = ("base", "backbone", "own expert", "nearest expert", "routed, hard threshold", "routed")
RIVALS = ("base", "backbone", "nearest expert")
ROOM = {"last_number": 160, "exact": 32, "contains": 32}
"""New tokens by way of matching: a word problem's answer is worked out before its number."""
KINDS = ("seen", "unseen", "shifted", "near", "far")


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
    _fit(model, tokenizer, calibration_prompts(100, seeds[0], folder))
    weights, notes = _expert_weights(model, tokenizer, rows)
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


def _fit(model, tokenizer, prompts):
    texts = {task: [] for task in TASKS}
    for prompt in prompts:
        chat = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        texts[prompt.experts[0]].append(chat)
    model.fit_router(texts, tokenizer, batch_size=32)


@torch.no_grad()
def _expert_weights(model, tokenizer, rows):
    """System → (N, K + 1) expert weights, the base's column last, and what the gate said of each prompt."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    router, settings = model.router.to("cpu"), model._gate_settings
    x = text_features(model, tokenizer, texts, 32, 2048, None, False)
    scores, novelty, distance = router.calibrated(x), router.novelty(x), router.distance(x)
    judged = (scores, novelty, distance, router.known)
    nearest = scores.argmax(dim=1)
    width = len(model.expert_names)
    own = torch.tensor([TASKS.index(row["own"]) if row["own"] else -1 for row in rows])
    found = trust_of(novelty, distance, nearest, router.known, settings.ood_alpha)

    def one_hot(columns):
        return F.one_hot(torch.as_tensor(columns).expand(len(rows)), width).float()

    weights = {
        "base": one_hot(torch.tensor(width - 1)),
        "backbone": torch.zeros(len(rows), width),
        "own expert": one_hot(torch.where(own < 0, nearest, own)),
        "nearest expert": one_hot(nearest),
        "routed, hard threshold": one_hot(torch.where(found.is_ood, width - 1, nearest)),
        "routed": gate(*judged, settings).expert_weights,
    }
    notes = {
        "nearest": [TASKS[number] for number in nearest.tolist()],
        "novelty": novelty.tolist(),
        "distance": distance.tolist(),
        "scores": scores.tolist(),
        "trust": found.trust.tolist(),
        "is_ood": found.is_ood.tolist(),
        "expert_weights": weights["routed"].tolist(),
    }
    return weights, notes


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
    """Shares by set; a star where routing loses more than a point to the best of its rivals."""
    print(f"\n| set | n | {' | '.join(SYSTEMS)} |\n|{'---|' * (len(SYSTEMS) + 2)}")
    totals = {}
    for name, one in found["sets"].items():
        share = {system: one["right"][system] / one["n"] for system in SYSTEMS}
        loses = share["routed"] < max(share[system] for system in RIVALS) - 0.01
        if one["kind"] in ("near", "far"):
            cells = ["" if system == "own expert" else f"{share[system]:.3f}" for system in SYSTEMS]
        else:
            cells = [f"{share[system]:.3f}" for system in SYSTEMS]
        print(f"| {name} ({one['kind']}) | {one['n']} | {' | '.join(cells)}{' *' if loses else ''} |")
        totals.setdefault(one["kind"], []).append(share)
    for kind in KINDS:
        if kind in totals:
            means = [sum(share[system] for share in totals[kind]) / len(totals[kind]) for system in SYSTEMS]
            print(f"| mean of {kind} | | {' | '.join(f'{mean:.3f}' for mean in means)} |")
