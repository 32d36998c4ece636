"""Dynamic averaging: the bank's deltas mixed block by block, the more sharply the more experts conflict in a block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_files import find_adapter
from ..demo.tasks import Item
from ..evaluation.prompts import pad_left, pad_token_id, render, token_ids
from ..methods.baselines.dynamic import sharpened, sharpness
from .lab import Lab, block_of, read_state
from .systems import Part, Parts

_BATCH, _DIGITS = 25, 2


def block_conflict(folder: Path) -> list[float]:
    """Sign conflict of each block, as the build measured it."""
    report = json.loads((find_adapter(folder) / "report" / "report.json").read_text(encoding="utf-8"))
    return [float(value) for value in report["conflict"]["sign"]]


def expert_probabilities(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """The router's probability of each expert, whatever its gate makes of them: (N, K)."""
    rows = [token_ids(tokenizer, render(tokenizer, prompt, True)) for prompt in prompts]
    found = []
    for start in range(0, len(rows), _BATCH):
        with torch.no_grad():
            decided = model.route(**pad_left(rows[start : start + _BATCH], pad_token_id(tokenizer)))
        found.append(decided.scores.float().softmax(dim=1))
    return torch.cat(found)


def mixed_weights(model: Any, weights: Tensor) -> dict[str, Tensor]:
    """Routed layers' weights with every block's own mix of experts.

    Args:
        model: a loaded Mediator model.
        weights: (L, K), experts in the order of the model's.
    """
    tuner: Any = model.base_model
    adapter = tuner.active_adapters[0]
    mixed = {}
    for name, layer in tuner.routed_layers().items():
        key = f"{name}.weight"
        block, weight = block_of(key), layer.base_layer.weight.detach().float()
        bank = layer.bank(adapter)
        for expert, share in zip(tuner.expert_names, weights[0 if block is None else block].tolist(), strict=False):
            delta = bank.get(expert) if share else None
            weight = weight if delta is None else weight + share * delta.dense().float()
        mixed[key] = weight
    return mixed


def dynamic_parts(lab: Lab, folder: Path, load: Callable[[], tuple[Any, Any]]) -> Parts:
    """Items with equal weights of blocks are answered together; weights are rounded to hundredths.

    Args:
        lab: its model answers.
        folder: of a Mediator model.
        load: gives it and its tokenizer.
    """

    def parts(items: Sequence[Item]) -> Iterator[Part]:
        model, tokenizer = load()
        beta = sharpness(torch.tensor(block_conflict(folder)))
        probabilities = expert_probabilities(model, tokenizer, [item.prompt for item in items])
        groups: dict[bytes, tuple[Tensor, list[int]]] = {}
        for place, row in enumerate(probabilities):
            weights = sharpened(row, beta).mul(10**_DIGITS).round()
            groups.setdefault(weights.numpy().tobytes(), (weights / 10**_DIGITS, []))[1].append(place)
        rest = read_state(folder)
        for weights, places in groups.values():
            with lab.holding({**rest, **mixed_weights(model, weights)}) as plain:
                yield places, {"model": plain, "tokenizer": lab.tokenizer}

    return parts
