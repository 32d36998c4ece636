"""What a baseline is: how one expert comes back from what a compression stores of it, and how many bits that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ..merging.row import LINEAR, Parameter, TensorContext

NUMBER_BITS = 16
"""Of a number that is stored as it is."""


class Bits(NamedTuple):
    """What a baseline stores of one tensor beside the base."""

    shared: float
    """Once, for all experts."""

    each: float
    """For every expert."""


@dataclass(frozen=True)
class Baseline:
    """One published way to keep several experts of one base; a row of ``BASELINES``."""

    restore: Callable[..., Tensor]
    """(task vectors (K, *shape) float32, number of the expert, context, survey, **parameters) → what comes back of that
    expert's task vector, (*shape), a new tensor."""

    bits: Callable[..., Bits]
    """(context, number of experts, **parameters) → bits of one tensor."""

    paper: str
    """Short name, and arXiv number."""

    text: str
    """How it works, in one line."""

    survey: Callable[..., Any] | None = None
    """A pass over the whole model beforehand: (iterable of (task vectors, context), **parameters) → numbers for
    ``restore``."""

    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def defaults(self) -> dict[str, Any]:
        """Parameter → default."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def surveyed(self, tensors: Iterable[tuple[Tensor, TensorContext]], **given: Any) -> Any:
        """The numbers of the whole model; None where none are needed."""
        return None if self.survey is None else self.survey(tensors, **{**self.defaults(), **given})

    def restored(
        self, task_vectors: Tensor, number: int, context: TensorContext, survey: Any = None, **given: Any
    ) -> Tensor:
        """``restore`` with its default parameters, but for those given."""
        return self.restore(task_vectors, number, context, survey, **{**self.defaults(), **given})

    def num_bytes(self, contexts: Iterable[TensorContext], num_experts: int, **given: Any) -> int:
        """Bytes of all experts together, without the base."""
        found = [self.bits(context, num_experts, **{**self.defaults(), **given}) for context in contexts]
        return round(sum(bits.shared + num_experts * bits.each for bits in found) / 8)


def num_entries(context: TensorContext) -> int:
    """Of the whole tensor."""
    return prod(context.stored_shape)


def whole_numbers(context: TensorContext) -> Bits:
    """What is stored as it is, of every expert."""
    return Bits(0.0, float(NUMBER_BITS * num_entries(context)))


def is_linear(context: TensorContext) -> bool:
    """Whether the tensor is the weight of a linear layer of a block: all that some baselines compress."""
    return context.kind == LINEAR and len(context.stored_shape) == 2
