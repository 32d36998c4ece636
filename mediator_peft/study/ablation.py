"""Which blocks to route: answer losses with deltas in some blocks only, under different rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuner.config import MediatorConfig
from .conflict import rankings
from .lab import Lab, block_of, read_state
from .scores import Scores, Sizes
from .systems import Bench, model_key

SHARES = (0.25, 0.5)
"""Shares of blocks that are routed, beside none and all."""


def block_sets(table: Sequence[Mapping[str, object]], num_blocks: int) -> dict[str, dict[int, list[int]]]:
    """Ranking → number of blocks → their numbers, ascending."""
    return {
        name: {count: sorted(order[:count]) for count in sorted({round(share * num_blocks) for share in SHARES})}
        for name, order in rankings(table).items()
    }


def named_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Weights of a Mediator model's backbone, and expert → routed layer → backbone plus delta, all float32."""
    from ..tuner.loading import load_mediator

    model, _ = load_mediator(folder, dtype=torch.float32)
    tuner: Any = model.base_model
    adapter = tuner.active_adapters[0]
    backbone: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {name: {} for name in tuner.expert_names}
    for name, layer in tuner.routed_layers().items():
        weight = layer.base_layer.weight.detach().float()
        backbone[f"{name}.weight"] = weight.clone()
        bank = layer.bank(adapter)
        for expert in experts:
            delta = bank.get(expert)
            experts[expert][f"{name}.weight"] = weight if delta is None else weight + delta.dense().float()
    return backbone, experts


def score_block_sets(bench: Bench, lab: Lab, folder: Path, table: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Losses of each task's own expert with deltas in a set of blocks.

    Args:
        bench: what is measured.
        lab: the model; its other weights come from the folder.
        folder: of a Mediator model with the library's defaults, whose blocks are all routed.
        table: conflict per block, of the same experts.

    Returns:
        ``curves``: ranking → number of blocks → mean loss over tasks, and each task's; ``none`` and ``all``: the same.
    """
    backbone, experts = named_weights(folder)
    rest = read_state(folder)
    depends = model_key(bench, MediatorConfig())
    num_blocks = 1 + max(block for name in backbone if (block := block_of(name)) is not None)
    sets = block_sets(table, num_blocks)

    num_losses = {task: 3 if task == "maths" else 10 for task in bench.sample.known}

    def losses(blocks: Sequence[int]) -> dict[str, Scores]:
        found = {}
        for task in bench.sample.known:

            def ready(task: str = task) -> dict[str, Any]:
                chosen = {
                    name: experts[task][name] if block_of(name) in set(blocks) else weight
                    for name, weight in backbone.items()
                }
                with lab.holding({**rest, **chosen}) as model:
                    return {"model": model, "tokenizer": lab.tokenizer}

            sizes = Sizes(0, num_losses[task])
            system = "blocks " + ",".join(map(str, blocks)) if len(blocks) < num_blocks else "all blocks"
            found[task] = bench.scored(system[:60], task, sizes, [depends, list(blocks)], ready)
        return found

    none, whole = _mean(losses([])), _mean(losses(range(num_blocks)))
    curves = {
        ranking: {str(count): _mean(losses(blocks)) for count, blocks in chosen.items()}
        for ranking, chosen in sets.items()
    }
    return {"num_losses": num_losses, "num_blocks": num_blocks, "none": none, "all": whole, "curves": curves}


def _mean(scores: Mapping[str, Scores]) -> dict[str, Any]:
    by_task = {task: score.loss for task, score in scores.items()}
    return {"mean": sum(by_task.values()) / len(by_task), "by_task": by_task}
