"""How good a router is: calibration of its probabilities, and how well uncertainty tells known from unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ReliabilityBins(NamedTuple):
    """Confidence against accuracy; bins without prompts hold zeros."""

    confidence: Tensor
    """(M,) mean largest probability of each bin."""

    accuracy: Tensor
    """(M,) share of right guesses."""

    counts: Tensor
    """(M,)"""


def reliability_bins(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Group prompts by their largest probability into equally wide bins.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,)
        num_bins: M
    """
    confidence, guess = probabilities.double().max(dim=1)
    right = (guess == labels).double()
    place = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    counts = torch.bincount(place, minlength=num_bins)
    filled = counts.clamp(min=1)
    return ReliabilityBins(
        torch.bincount(place, weights=confidence, minlength=num_bins) / filled,
        torch.bincount(place, weights=right, minlength=num_bins) / filled,
        counts,
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""Mean gap between confidence and accuracy, :math:`\sum_m \frac{n_m}{N} |\mathrm{acc}_m - \mathrm{conf}_m|`.

    Guo et al. 2017, On Calibration of Modern Neural Networks, eq. (3) (https://arxiv.org/abs/1706.04599).
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    gap = (bins.accuracy - bins.confidence).abs()
    return float((gap * bins.counts).sum() / bins.counts.sum().clamp(min=1))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    r"""Mean squared error of the probabilities, :math:`\frac1N \sum_n \|p_n - e_{y_n}\|^2`, in [0, 2]; 0 is best.

    Brier 1950, the form that sums over classes.
    """
    truth = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return float((probabilities.double() - truth).square().sum(dim=1).mean())


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Chance that an unknown prompt's uncertainty is above a known one's, ties counting half.

    Args:
        known: (N,) uncertainty, larger is less sure.
        unknown: (M,)
    """
    difference = unknown.double().unsqueeze(1) - known.double().unsqueeze(0)
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def false_positive_rate(known: Tensor, unknown: Tensor, recall: float = 0.95) -> float:
    """Share of known prompts taken for unknown at the threshold that finds a share ``recall`` of the unknown ones.

    Args:
        known: (N,) uncertainty, larger is less sure.
        unknown: (M,)
        recall: in (0, 1]
    """
    num_found = max(1, -int(-recall * len(unknown) // 1))
    threshold = unknown.double().sort(descending=True).values[num_found - 1]
    return float((known.double() >= threshold).double().mean())


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    r"""The :math:`T` for which ``softmax(scores / T)`` fits held-out labels best, by cross-entropy.

    Temperature scaling, Guo et al. 2017 (https://arxiv.org/abs/1706.04599), every class weighing the same. Where all
    held-out prompts are right, the likelihood has no maximum; so the targets are those of Platt 1999: a class with n
    prompts is taken for certain to :math:`(n + 1) / (n + 2)` only, and the rest is shared by the others. With K instead
    of 2, many experts of few prompts would be mixed although each prompt is clear.

    Args:
        scores: (N, K) of prompts the router was not fitted on.
        labels: (N,)

    Returns:
        In [1e-2, 1e4].
    """
    scores, labels = scores.detach().double(), labels.long()
    num_classes = scores.shape[1]
    if num_classes == 1:
        return 1.0
    counts = torch.bincount(labels, minlength=num_classes).double()
    certainty = ((counts + 1) / (counts + 2))[labels].unsqueeze(1)
    truth = torch.nn.functional.one_hot(labels, num_classes).double()
    targets = truth * certainty + (1 - truth) * (1 - certainty) / (num_classes - 1)
    balance = (1 / counts.clamp(min=1))[labels]

    def loss(log_temperature: float) -> float:
        log_probabilities = (scores / 10**log_temperature).log_softmax(dim=1)
        return float(-((targets * log_probabilities).sum(dim=1) * balance).sum())

    return float(10 ** _golden_section(loss, -2.0, 4.0))


def _golden_section(function: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Where a function of one number with one valley is smallest."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2
