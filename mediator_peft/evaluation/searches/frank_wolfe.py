"""FW-Merging: Frank-Wolfe steps towards the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ...progress import Progress, no_progress
from ...tables import unknown_name
from .expert_merging import Found
from .merged_model import MergedModel
from .objective import Example, loss_of, task_losses

INNER, COSINE = "inner", "cosine"


def frank_wolfe(
    merged: MergedModel,
    examples: Sequence[Example],
    *,
    steps: int = 10,
    rate: float = 1.0,
    start: float = 0.3,
    direction: str = INNER,
    progress: Progress = no_progress,
) -> Found:
    r"""Move to the expert against which the gradient of the mean task loss points, a little less each time.

    .. math:: k = \arg\min_j \langle g, \theta_j \rangle, \qquad
        \theta \leftarrow \theta + \eta \frac{2}{t + 2} (\theta_k - \theta)

    *FW-Merging*, https://arxiv.org/abs/2503.12649, with task arithmetic inside: start is the base plus ``start`` times
    the sum of the task vectors, and is a candidate too. θ stays a combination of experts and start, so that K numbers
    are all that is kept. The published code takes cosines of whole weights, summed over tensors
    (``direction="cosine"``), and a step of 0.03; the textbook's inner product and η = 1 with the best of all points
    kept are our defaults.

    Args:
        merged: base and experts.
        examples: of all experts.
        steps: of the algorithm.
        rate: η; at 1 the first step goes all the way to an expert.
        start: λ.
        direction: ``"inner"`` or ``"cosine"``.
        progress: told of each step.

    Raises:
        ConfigError: the direction is unknown.
    """
    if direction not in (INNER, COSINE):
        raise ConfigError(unknown_name(direction, (INNER, COSINE), "direction"))
    number = len(merged.experts)
    candidates = torch.cat([torch.eye(number), torch.full((1, number), start)]).double()
    place, picks = candidates[-1].clone(), []
    best, losses = place, [_mean_loss(merged, examples, place)]
    with progress("frank-wolfe", steps) as advance:
        for step in range(steps):
            scores = _scores(merged, examples, place, candidates, direction)
            picked = int(scores.argmin())
            place = place + rate * 2 / (step + 2) * (candidates[picked] - place)
            picks.append([*merged.experts, "start"][picked])
            losses.append(_mean_loss(merged, examples, place))
            best = place if losses[-1] == min(losses) else best
            advance()
    about = {"picked": picks, "mean_losses": losses, "best_step": losses.index(min(losses))}
    return Found({"experts": dict(zip(merged.experts, best.tolist(), strict=True))}, about)


def candidate_scores(
    gradient: Tensor, candidates: Tensor, base: Tensor, task_vectors: Tensor, direction: str
) -> Tensor:
    """Inner products, or cosines, of one tensor's gradient and the candidates' weights: (K + 1,) float64."""
    of_vectors = (task_vectors * gradient).flatten(1).double().sum(dim=1)
    inner = (base * gradient).double().sum() + candidates @ of_vectors
    if direction == INNER:
        return inner
    norms = torch.stack(
        [(base + torch.tensordot(row.float(), task_vectors, dims=1)).double().norm() for row in candidates]
    )
    lengths = norms * gradient.double().norm()
    return torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 0.0)


def _scores(
    merged: MergedModel, examples: Sequence[Example], place: Tensor, candidates: Tensor, direction: str
) -> Tensor:
    merged.watch(merged.names)
    merged.set(place.float())
    shares = _shares(examples)
    for example in examples:
        torch.autograd.backward(loss_of(merged, example) * shares[example.expert])
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for name, gradient in merged.gradients():
        vectors = merged.task_vectors[name]
        total += candidate_scores(gradient, candidates, merged.base[name], vectors, direction)
    merged.watch([])
    return total


def _shares(examples: Sequence[Example]) -> dict[str, float]:
    """Weight of an example in the mean over tasks of the mean over examples."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.expert] = counts.get(example.expert, 0) + 1
    return {expert: 1 / (count * len(counts)) for expert, count in counts.items()}


def _mean_loss(merged: MergedModel, examples: Sequence[Example], place: Tensor) -> float:
    merged.set(place.float())
    losses = task_losses(merged, examples)
    return sum(losses.values()) / len(losses)
