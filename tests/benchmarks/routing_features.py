"""Features of the prompt sets of docs/routing.md: mean hidden states after several depths, in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from fresh_prompts import fresh_sets, later_sets

from mediator_peft.demo.hard_prompts import TASKS, PromptSet, calibration_prompts, hard_sets
from mediator_peft.routing.augmentation import augment
from mediator_peft.routing.background import BACKGROUND_PROMPTS
from mediator_peft.routing.hard_negatives import hard_negatives

ALL_LAYERS = [0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 25, 29]
FEW_LAYERS = [2, 3, 4, 6, 8]


def prompt_sets(size: int, seed: int, folder: Path, many_seen: int) -> dict[str, PromptSet]:
    """The sets of ``hard_prompts``, the fresh ones, and ``many_seen`` prompts an expert in seen wordings.

    Chats of several turns are left out: routed on their last turn, they are the same prompts.
    """
    sets = hard_sets(size, seed, folder) | fresh_sets(size, seed, folder) | later_sets(size, seed)
    if many_seen:
        many = calibration_prompts(many_seen, seed + 1000, folder)
        for task in TASKS:
            some = [prompt for prompt in many if prompt.experts == (task,)]
            sets[f"{task}, seen wording, many"] = PromptSet("many seen", some)
    return {name: one for name, one in sets.items() if "multi-turn" not in name}


def make_features(out: Path, path: Path, seeds: tuple[int, int], layers: list[int], many_seen: int = 0) -> None:
    """Mean hidden states after each of ``layers`` blocks of all prompts' last user turns, to a file.

    Args:
        out: a model built from the demo's experts, with the demo's materials beside it.
        path: where the file goes.
        seeds: of the calibration prompts and of the test sets.
        layers: from 0, the embeddings.
        many_seen: prompts more an expert in seen wordings, for rates of a hundredth.
    """
    from mediator_peft import load_mediator
    from mediator_peft.tuner.chat_turns import turn_markers

    model, tokenizer = load_mediator(out, dtype=torch.float32)
    markers = turn_markers(tokenizer)
    backbone = model.unload().model
    backbone.layers = backbone.layers[: max(layers) + 1]

    def features(chats):
        texts = [tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True) for c in chats]
        return pooled_states(backbone, tokenizer, texts, markers, layers), texts

    folder = out.parent / "materials"
    prompts = calibration_prompts(200, seeds[0], folder)
    x, texts = features([prompt.messages for prompt in prompts])
    copies = [augment(prompt.messages[-1]["content"], 0) for prompt in prompts]
    augmented = [
        features([[{"role": "user", "content": text}] for text in way])[0] for way in zip(*copies, strict=True)
    ]
    background, _ = features([[{"role": "user", "content": text}] for text in BACKGROUND_PROMPTS])
    labels = torch.tensor([TASKS.index(prompt.experts[0]) for prompt in prompts])
    data = {"layers": layers, "x": x, "texts": texts, "labels": labels, "background": background, "sets": {}}
    data["augmented"] = torch.stack(augmented)
    requests = hard_negatives([prompt.messages[-1]["content"] for prompt in prompts], labels.tolist(), 0)
    data["hard_negatives"] = torch.stack(
        [features([[{"role": "user", "content": text}] for text in way])[0] for way in requests]
    )
    new_names = {*fresh_sets(1, seeds[1], folder), *later_sets(1, seeds[1])}
    for name, (kind, some) in prompt_sets(100, seeds[1], folder, many_seen).items():
        found, words = features([prompt.messages for prompt in some])
        fresh = torch.tensor([text not in set(texts) for text in words])
        experts = torch.tensor([TASKS.index(prompt.experts[0]) if prompt.experts else -1 for prompt in some])
        is_new = name in new_names
        data["sets"][name] = {
            "kind": "near" if kind == "later" else kind,
            "is_fresh": is_new,
            "x": found[fresh],
            "labels": experts[fresh],
        }
        print(name, len(some), int((~fresh).sum()), "also in calibration, left out", flush=True)
    torch.save(data, path)


@torch.no_grad()
def pooled_states(backbone, tokenizer, texts, markers, layers, batch_size=16):
    """(N, len(layers), H) of the texts' last user turns."""
    from mediator_peft.tuner.chat_turns import padded, user_turns

    rows = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        start, stop = user_turns(ids, markers)[-1]
        rows.append(ids[start:stop])
    found = torch.zeros(len(rows), len(layers), backbone.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for begin in range(0, len(order), batch_size):
        some = order[begin : begin + batch_size]
        ids, mask = padded([rows[row] for row in some])
        states = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        for place, layer in enumerate(layers):
            found[some, place] = (states[layer] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return found
