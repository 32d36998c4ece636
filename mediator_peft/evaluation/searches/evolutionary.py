"""Evolutionary search over two coefficients for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import MissingPackageError
from ...progress import Progress, no_progress
from .expert_merging import Found
from .merged_model import MergedModel
from .objective import Example, task_losses


def evolution(
    merged: MergedModel,
    examples: Sequence[Example],
    *,
    evaluations: int = 100,
    most: float = 1.5,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Found:
    """Differential evolution over coefficients of the first and of the last block, linear in between (our choice).

    A search for coefficients by scores alone, as in Evo-Merging, https://arxiv.org/abs/2509.12951, and evolutionary
    merging by layer, https://arxiv.org/abs/2410.13699, with 2 K numbers and some 100 evaluations. Tensors before the
    blocks have the numbers of the first block, those behind them too. The optimiser is SciPy's.

    Args:
        merged: base and experts.
        examples: of all experts; the mean of the tasks' losses is made small.
        evaluations: merged models that are tried, at most.
        most: largest coefficient; the smallest is 0.
        seed: of the optimiser.
        progress: told of each evaluation.

    Raises:
        MissingPackageError: SciPy is missing.
    """
    try:
        from scipy.optimize import differential_evolution
    except ImportError:
        raise MissingPackageError("the search 'evolution' needs SciPy: pip install 'mediator_peft[search]'") from None
    number = len(merged.experts)
    tried: list[tuple[float, list[float]]] = []

    with progress("evolution", evaluations) as advance:

        def cost(numbers: Any) -> float:
            if len(tried) >= evaluations:
                return float("inf")
            merged.set(by_depth(merged, np.asarray(numbers).reshape(2, number)))
            losses = task_losses(merged, examples)
            tried.append((sum(losses.values()) / len(losses), list(map(float, numbers))))
            advance()
            return tried[-1][0]

        differential_evolution(
            cost,
            [(0.0, most)] * (2 * number),
            x0=np.full(2 * number, 1 / number),
            popsize=max(5, 20 // (2 * number)),
            maxiter=max(1, evaluations),
            polish=False,
            rng=np.random.default_rng(seed),
            callback=lambda *_, **__: len(tried) >= evaluations,
        )
    loss, numbers = min(tried)
    found = by_depth(merged, np.array(numbers).reshape(2, number))
    blocks = {
        str(block): dict(zip(merged.experts, found[name].tolist(), strict=True))
        for name, block in merged.blocks.items()
        if block is not None
    }
    outside = dict(zip(merged.experts, numbers[:number], strict=True))
    about = {"evaluations": len(tried), "mean_loss": loss, "mean_loss_of_the_average": tried[0][0]}
    return Found({"experts": outside, "blocks": blocks}, about)


def by_depth(merged: MergedModel, ends: Any) -> dict[str, torch.Tensor]:
    """Tensor → (K,) coefficients, from those of the first and the last block, (2, K)."""
    last = max(1, merged.num_blocks - 1)
    shares = {name: (block or 0) / last for name, block in merged.blocks.items()}
    return {
        name: torch.tensor((1 - share) * ends[0] + share * ends[1], dtype=torch.float32)
        for name, share in shares.items()
    }
