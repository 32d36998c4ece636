"""Bootstrap intervals and paired tests for systems that answered the same items. Plain arrays, fixed seeds."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import MediatorError
from .scoring import Interval

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then lie on 50 resamples each."""

_MOST_EXACT = 12
"""Up to so many differences that are not zero, all sign flips are tried."""


class StatisticsError(MediatorError, ValueError):
    """Figures cannot be compared: numbers of items differ, or there are none."""


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """Both ends."""
        return Interval(self.low, self.high)


class Kept(NamedTuple):
    """How much of the references' accuracy a system keeps."""

    mean: Estimate
    """Mean accuracy of the system over mean accuracy of the references, each task counting the same."""

    worst: Estimate
    """Smallest accuracy / reference accuracy of a task. A minimum over noisy ratios: it is biased downwards."""

    worst_task: str

    by_task: dict[str, Estimate]
    """Accuracy / reference accuracy of each task."""


def bootstrap_mean(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of a sample with its percentile bootstrap interval.

    B. Efron, *Bootstrap methods*, Ann. Statist. 7 (1979); ends are the 2.5 and 97.5 percentiles.

    Args:
        values: (N,) one number an item.
        seed: of the resampling.
        resamples: how many.

    Raises:
        StatisticsError: there are no values.
    """
    sample = np.asarray(values, np.float64)
    if not sample.size:
        raise StatisticsError("a bootstrap interval needs one value at least.")
    means = sample[_indices(sample.size, np.random.default_rng(seed), resamples)].mean(axis=1)
    return _estimate(float(sample.mean()), means)


def bootstrap_kept(
    system: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Kept | None:
    """Share of the reference accuracies that a system keeps: mean, worst task and each task, with intervals.

    Items are resampled within each task, the same for system and reference, so that an item that is hard for both
    counts on both sides. A resample in which a reference has nothing right is left out of that task's ratio.

    Args:
        system: task → (N,) bool or 0/1, right or wrong.
        reference: the same of what the system is measured by: each task's own expert.

    Returns:
        None where no task is in both, or a reference has nothing right in a task: such a ratio says nothing.

    Raises:
        StatisticsError: the number of items of a task differs.
    """
    tasks = sorted(set(system) & set(reference))
    pairs = {task: _paired(system[task], reference[task], task) for task in tasks}
    if not tasks or any(ours.size == 0 or theirs.sum() == 0 for ours, theirs in pairs.values()):
        return None
    drawn: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for place, task in enumerate(tasks):
        ours, theirs = pairs[task]
        indices = _indices(ours.size, np.random.default_rng([seed, place]), resamples)
        drawn[task] = ours[indices].mean(axis=1), theirs[indices].mean(axis=1)
    ratios = {
        task: np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=theirs > 0)
        for task, (ours, theirs) in drawn.items()
    }
    observed = {task: float(ours.mean() / theirs.mean()) for task, (ours, theirs) in pairs.items()}
    worst_task = min(observed, key=lambda task: observed[task])
    mean = sum(float(ours.mean()) for ours, _ in pairs.values()) / sum(
        float(theirs.mean()) for _, theirs in pairs.values()
    )
    means = sum(ours for ours, _ in drawn.values()) / np.maximum(sum(theirs for _, theirs in drawn.values()), 1e-12)
    return Kept(
        _estimate(mean, np.asarray(means)),
        _estimate(observed[worst_task], np.nanmin(np.stack(list(ratios.values())), axis=0)),
        worst_task,
        {task: _estimate(observed[task], ratios[task]) for task in tasks},
    )


def sign_test(first: ArrayLike, second: ArrayLike) -> float:
    r"""Two-sided p-value of the exact sign test on pairs; on right/wrong it is McNemar's exact test.

    .. math:: p = \min(1, 2 \sum_{i \le \min(n_+, n_-)} \binom{n}{i} 2^{-n}), \quad n = n_+ + n_-

    with :math:`n_\pm` the pairs in which the first is larger or smaller; equal pairs have no say. Q. McNemar,
    Psychometrika 12 (1947).

    Raises:
        StatisticsError: the numbers of items differ.
    """
    ours, theirs = _paired(first, second)
    more, less = int((ours > theirs).sum()), int((ours < theirs).sum())
    num = more + less
    tail = sum(comb(num, count) for count in range(min(more, less) + 1))
    return min(1.0, 2 * tail / 2**num)


def permutation_test(first: ArrayLike, second: ArrayLike, seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided p-value of the mean difference of pairs under random sign flips.

    R. A. Fisher, *The Design of Experiments* (1935), §21. All flips are counted where 12 differences or fewer are not
    zero; otherwise ``resamples`` are drawn, and the observed one counts among them.

    Raises:
        StatisticsError: the numbers of items differ.
    """
    ours, theirs = _paired(first, second)
    differences = (ours - theirs)[ours != theirs]
    if not differences.size:
        return 1.0
    observed = abs(float(differences.sum()))
    # Sums in another order differ in the last digits.
    bound = observed * (1 - 1e-12)
    if differences.size <= _MOST_EXACT:
        numbers = np.arange(2**differences.size)[:, None] >> np.arange(differences.size)
        sums = np.abs((1 - 2 * (numbers & 1)) @ differences)
        return float((sums >= bound).mean())
    rng = np.random.default_rng(seed)
    num_as_large = 1
    for start in range(0, resamples, 1000):
        signs = 1 - 2 * rng.integers(0, 2, (min(1000, resamples - start), differences.size))
        num_as_large += int((np.abs(signs @ differences) >= bound).sum())
    return num_as_large / (resamples + 1)


def _indices(num_items: int, rng: np.random.Generator, resamples: int) -> NDArray[np.int64]:
    return rng.integers(0, num_items, (resamples, num_items))


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _paired(first: ArrayLike, second: ArrayLike, what: str = "") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ours, theirs = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if ours.shape != theirs.shape:
        where = f" of {what!r}" if what else ""
        raise StatisticsError(
            f"the two systems answered {ours.size} and {theirs.size} items{where}. Paired figures need the same items."
        )
    return ours, theirs
