"""MAP: quadratic surrogates of the tasks' metrics, and their Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.replacing import write_figure
from ...errors import ConfigError
from ...progress import Progress, no_progress
from .expert_merging import Found
from .merged_model import MergedModel
from .objective import Example, task_losses

Floats = NDArray[np.float64]
MOST_EXPERTS = 4


def pareto(
    merged: MergedModel,
    examples: Sequence[Example],
    *,
    num_samples: int | None = None,
    grid: int = 21,
    preference: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Found:
    r"""One coefficient for each expert, from quadratic surrogates of each task's loss.

    .. math:: M_j(c) \approx \sum_i a_i c_i^2 + \sum_{i<l} b_{il} c_i c_l + \sum_i d_i c_i + e

    *MAP*, https://arxiv.org/abs/2406.07529, with linear activation, since the metric is the negative loss, and not an
    accuracy. Sampled are 0, each expert alone, the mean, and uniform draws from [0, 1]^K. In place of its genetic
    algorithm with bounds of [-3, 3], the front is taken from a grid over the box that was sampled (our choice).

    Args:
        merged: base and experts.
        examples: of all experts.
        num_samples: merged models that are tried; by default twice the (K+1)(K+2)/2 numbers of a surrogate.
        grid: points on each axis.
        preference: expert → weight of its task; equal by default. The point of the front with the best weighted sum,
            each metric scaled to [0, 1] over the front, is chosen.
        seed: of the draws.
        progress: told of each sample.

    Raises:
        ConfigError: more than four experts, or fewer samples than numbers to fit.
    """
    num_experts = len(merged.experts)
    if num_experts > MOST_EXPERTS:
        raise ConfigError(f"a Pareto front is searched for {MOST_EXPERTS} experts at most, got {num_experts}.")
    needed = (num_experts + 1) * (num_experts + 2) // 2
    count = 2 * needed if num_samples is None else num_samples
    if count < needed or grid < 2:
        raise ConfigError(f"{num_experts} experts need {needed} samples at least and a grid of 2, got {count}, {grid}.")
    places = sampled_places(num_experts, count, seed)
    values = np.empty((count, num_experts))
    with progress("sampling", count) as advance:
        for number, place in enumerate(places):
            merged.set(torch.tensor(place, dtype=torch.float32))
            losses = task_losses(merged, examples)
            values[number] = [-losses[expert] for expert in merged.experts]
            advance()
    surrogate, errors = fit_surrogates(places, values)
    axis = np.linspace(0, 1, grid)
    candidates = np.array(list(product(axis, repeat=num_experts)))
    predicted = surrogate(candidates)
    front = front_of(predicted)
    weights = np.array([1.0 if preference is None else preference.get(expert, 0.0) for expert in merged.experts])
    chosen = front[int(np.argmax(scaled(predicted[front]) @ weights))]
    about = {
        "metric": "negative mean loss",
        "samples": [{"coefficients": list(map(float, c)), "metrics": list(map(float, v))}
                    for c, v in zip(places, values, strict=True)],
        "surrogate_rms_error": dict(zip(merged.experts, map(float, errors), strict=True)),
        "front": [{"coefficients": candidates[i].tolist(), "metrics": predicted[i].tolist()} for i in front],
        "chosen_metrics": predicted[chosen].tolist(),
    }  # fmt: skip
    return Found({"experts": dict(zip(merged.experts, candidates[chosen].tolist(), strict=True))}, about)


def sampled_places(num_experts: int, count: int, seed: int) -> Floats:
    """Coefficients that are tried: (count, K) in [0, 1]."""
    fixed = [np.zeros(num_experts), *np.eye(num_experts), np.full(num_experts, 1 / num_experts)]
    drawn = np.random.default_rng(seed).random((count, num_experts))
    return np.vstack([fixed, drawn])[:count]


def terms(places: Floats) -> Floats:
    """Squares, products, coefficients and 1 of each place: (N, (K+1)(K+2)/2)."""
    number = places.shape[1]
    products = [places[:, i] * places[:, j] for i, j in combinations(range(number), 2)]
    return np.column_stack([places**2, *products, places, np.ones(len(places))])


def fit_surrogates(places: Floats, values: Floats) -> tuple[Callable[[Floats], Floats], Floats]:
    """Least squares: (a function (N, K) → (N, tasks), root mean square error of each task)."""
    fitted, *_ = np.linalg.lstsq(terms(places), values, rcond=None)
    errors = np.sqrt(((terms(places) @ fitted - values) ** 2).mean(axis=0))
    return (lambda other: terms(other) @ fitted), errors


def front_of(metrics: Floats) -> list[int]:
    """Numbers of the rows that no other row beats: none is as good in all metrics and better in one."""
    order = np.lexsort(metrics.T[::-1])[::-1]  # a row is only beaten by an earlier one
    kept: list[int] = []
    for number in order.tolist():
        best = metrics[kept]
        value = metrics[number]
        if not ((best >= value - 1e-12).all(axis=1) & (best > value + 1e-12).any(axis=1)).any():
            kept.append(number)
    return sorted(kept)


def scaled(metrics: Floats) -> Floats:
    """Each column from 0 to 1."""
    low, high = metrics.min(axis=0), metrics.max(axis=0)
    scaled_metrics: Floats = (metrics - low) / np.where(high > low, high - low, 1.0)
    return scaled_metrics


def draw_front(found: Found, experts: Sequence[str], path: Path) -> None:
    """The front and the samples in a figure, one panel for each pair of tasks.

    Raises:
        MissingPackageError: matplotlib is missing.
    """
    from ...errors import MissingPackageError

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("figures need matplotlib: pip install 'mediator_peft[plot]'") from None
    pairs = list(combinations(range(len(experts)), 2)) or [(0, 0)]
    figure = Figure(figsize=(4.2 * len(pairs), 3.8), layout="constrained")
    for number, (i, j) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), number + 1)
        for key, label, marker in (("samples", "evaluated", "o"), ("front", "front of the surrogates", ".")):
            points = np.array([entry["metrics"] for entry in found.about[key]])
            axes.plot(points[:, i], points[:, j], marker, label=label, alpha=0.7)
        axes.plot(*[found.about["chosen_metrics"][place] for place in (i, j)], "k*", label="chosen", markersize=11)
        axes.set_xlabel(f"negative loss of {experts[i]}")
        axes.set_ylabel(f"negative loss of {experts[j]}")
        axes.legend(fontsize="small")
    write_figure(path, figure, dpi=100)
