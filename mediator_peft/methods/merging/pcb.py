"""PCB-Merging: entries weighted by competition within and between task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...deferred import torch
from .row import MergeMethod, Parameter
from .summing import sum_in_order

if TYPE_CHECKING:
    from torch import Tensor


DENSITY, EDGE, SCALE = 0.1, 0.01, 1.0


def pcb(task_vectors: Tensor, density: float = DENSITY, edge: float = EDGE, scale: float = SCALE) -> Tensor:
    r"""Mean of the task vectors weighted by scores of each entry; entries of low score are dropped.

    *Parameter Competition Balancing*, https://arxiv.org/abs/2410.02396, as the authors' code has it. With
    :math:`A_k = |\tau_k|` clipped to its own quantiles e and 1 - e, :math:`c_k = \operatorname{sgn}(\tau_k) A_k`, and
    N the scaling of an expert's entries to [0, 1]:

    .. math:: B_k = e^{K N(A_k)^2} \tanh\Bigl(\tau_k \sum_j \tau_j\Bigr), \qquad s_k = N(\max(B_k, q_{1-r}(B_k))),
        \qquad \tau = \lambda \frac{\sum_k s_k c_k}{\sum_k s_k}

    and 0 where no score is above the quantile. The paper does so over a whole model; here each tensor is scored by
    itself, as in ``ties``. Where all entries of an expert are the same, N is 0.

    Args:
        task_vectors: (K, *shape)
        density: r, share of the entries that is kept.
        edge: e, share of the entries that is clipped at either end; 0 for none.
        scale: λ

    Returns:
        (*shape)
    """
    vectors = task_vectors.flatten(1)
    total = sum_in_order(vectors)
    weighted, weights = torch.zeros_like(total), torch.zeros_like(total)
    for vector in vectors:
        magnitude = _clipped(vector.abs(), edge) if edge else vector.abs()
        balance = torch.exp(len(vectors) * _scaled(magnitude).square_()).mul_(torch.tanh(vector * total))
        score = _scaled(balance.clamp_(min=_ranked(balance, int(balance.numel() * (1 - density)))))
        weighted += score * vector.sign() * magnitude
        weights += score
    return (scale * weighted / weights.clamp_(min=1e-12)).reshape(task_vectors.shape[1:])


def _clipped(values: Tensor, edge: float) -> Tensor:
    """Values (n,) within their own quantiles; the places are those of the authors' code."""
    number = len(values)
    low, high = _ranked(values, int(number * edge)), _ranked(values, int(number * (1 - edge) - 1))
    return values.clamp(min=low, max=high)


def _ranked(values: Tensor, place: int) -> float:
    """The value at a place in ascending order."""
    place = min(max(place, 0), len(values) - 1)
    return float(values.kthvalue(place + 1).values)


def _scaled(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


PCB = MergeMethod(
    pcb,
    parameters={
        "density": Parameter(DENSITY, "share r of each task vector that is kept", "(0, 1]", is_published=True),
        "edge": Parameter(EDGE, "share e that is clipped at either end", "[0, 0.5)", is_published=True),
        "scale": Parameter(SCALE, "factor λ of the result; published: 0.8 to 2.2 by validation", "(0, inf)"),
    },
    needs_base=True,
    is_costly=True,
    work=lambda experts, rows, columns: 10.5 * rows * columns,
    paper="PCB-Merging, arXiv 2410.02396",
    cost="three selections for each tensor and expert",
    good_for="merged models of experts that compete for the same entries",
)
