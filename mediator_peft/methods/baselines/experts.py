"""The experts themselves: a full copy of each."""

from __future__ import annotations

from torch import Tensor

from ..merging.row import TensorContext
from .row import Baseline, Bits, whole_numbers


def keep(task_vectors: Tensor, number: int, context: TensorContext, survey: None) -> Tensor:
    """The expert's own task vector."""
    return task_vectors[number].clone()


def bits(context: TensorContext, num_experts: int) -> Bits:
    """16 an entry and expert."""
    return whole_numbers(context)


EXPERTS = Baseline(
    keep,
    bits,
    paper="none: K full models",
    text="whole experts; with the right one named it is the oracle's route",
)
