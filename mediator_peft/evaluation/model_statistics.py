"""Statistics of one model over sequences: Gram matrices of layer inputs, their norms, diagonal Fisher information."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..structure import Structure


class TokenSequence(NamedTuple):
    """Token ids of one prompt, with its answer where there is one."""

    ids: tuple[int, ...]
    start: int
    """First position whose next token is predicted in the Fisher information: 0, or the prompt's last token."""


class Statistic(ABC):
    """One kind of statistic: what is summed up, for which tensors."""

    name: str
    dtype: torch.dtype
    """In which sums are kept."""

    bytes_per_entry: int
    """Memory for an entry while it is summed up."""

    def __init__(self, model: PreTrainedModel, structure: Structure, seed: int) -> None:
        self.model, self.structure, self.seed = model, structure, seed

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape of its statistic, for all tensors that have one."""

    @abstractmethod
    def add(self, sums: Mapping[str, Tensor], sequence: TokenSequence, number: int) -> None:
        """Add what one sequence gives to the sums of some tensors."""

    @abstractmethod
    def finish(self, total: Tensor, num_sequences: int, num_tokens: int) -> Tensor:
        """The statistic, float32, from its sum."""


class _OfInputs(Statistic):
    """What is summed up over the inputs of linear layers."""

    dtype, bytes_per_entry = torch.float64, 8

    def __init__(self, model: PreTrainedModel, structure: Structure, seed: int) -> None:
        super().__init__(model, structure, seed)
        # Fused experts read their inputs within one module.
        layers = [layer for layer in (*structure.layers, *structure.gate_layers) if layer.part is None]
        self.layers = {f"{layer.name}.weight": model.get_submodule(layer.name) for layer in layers}
        self.widths = {
            f"{layer.name}.weight": _width(model.get_submodule(layer.name), layer.is_transposed) for layer in layers
        }

    @abstractmethod
    def of(self, inputs: Tensor) -> Tensor:
        """The share of some inputs (N, I), float32."""

    def add(self, sums: Mapping[str, Tensor], sequence: TokenSequence, number: int) -> None:
        def take(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                sums[name].add_(self.of(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()))

            return hook

        handles = [self.layers[name].register_forward_pre_hook(take(name)) for name in sums]
        try:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([sequence.ids]), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()

    def holders(self, sequence: TokenSequence) -> dict[str, str]:
        """Layer → the first layer that reads the same input, e.g. q_proj for k_proj; layers that share none are left
        out."""
        seen: dict[int, tuple[str, Tensor]] = {}
        found: dict[str, str] = {}

        def take(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                # The tensor is kept, so that no later one can have its id.
                holder, _kept = seen.setdefault(id(inputs[0]), (name, inputs[0]))
                if holder != name:
                    found[name] = holder

            return hook

        handles = [layer.register_forward_pre_hook(take(name)) for name, layer in self.layers.items()]
        try:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([sequence.ids]), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return found


class Gram(_OfInputs):
    r"""Gram matrix of each linear layer's inputs, :math:`X^T X / N` over N tokens: (I, I)."""

    name = "gram"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (width, width) for name, width in self.widths.items()}

    def of(self, inputs: Tensor) -> Tensor:
        return inputs.T @ inputs

    def finish(self, total: Tensor, num_sequences: int, num_tokens: int) -> Tensor:
        return (total / num_tokens).float()


class Norms(_OfInputs):
    r"""Root mean square of each input of each linear layer, :math:`\sqrt{\sum_n x_{n,i}^2 / N}`: (I,)."""

    name = "norms"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (width,) for name, width in self.widths.items()}

    def of(self, inputs: Tensor) -> Tensor:
        return inputs.square().sum(dim=0)

    def finish(self, total: Tensor, num_sequences: int, num_tokens: int) -> Tensor:
        return (total / num_tokens).sqrt().float()


class Fisher(Statistic):
    r"""Diagonal Fisher information of each weight, with labels that the model draws itself.

    .. math:: F = \frac1S \sum_s \Big( \nabla_\theta \sum_t \log p(y_{s,t} \mid x_{s,\le t}) \Big)^2, \qquad
        y_{s,t} \sim p(\cdot \mid x_{s,\le t})

    One sequence at a time, as the definition in https://arxiv.org/abs/2111.09832 asks for. Positions of a language
    model are left open there. Here one label is drawn at each position, of the answer alone where there is one (our
    choice); labels of different positions are independent given the text, so that products of their gradients vanish
    in expectation.
    """

    name = "fisher"
    dtype, bytes_per_entry = torch.float32, 8  # the sum and the gradient

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def add(self, sums: Mapping[str, Tensor], sequence: TokenSequence, number: int) -> None:
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in sums)
            parameter.grad = None
        ids = torch.tensor([sequence.ids])
        kept = ids.shape[1] - sequence.start
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, -kept:].float()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).flatten()
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for name, total in sums.items():
            gradient = parameters[name].grad
            if gradient is not None:  # e.g. a matrix of a mixture that no token was sent to
                total.addcmul_(gradient, gradient)
            parameters[name].grad = None

    def finish(self, total: Tensor, num_sequences: int, num_tokens: int) -> Tensor:
        return total / num_sequences


def _width(module: nn.Module, is_transposed: bool) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if is_transposed else 1])


STATISTICS: dict[str, type[Statistic]] = {"gram": Gram, "fisher": Fisher, "norms": Norms}


def shared_inputs(statistic: Statistic, sequences: Sequence[TokenSequence]) -> dict[str, str]:
    """Tensor → tensor that has the same statistic, since their layers read the same input."""
    return statistic.holders(sequences[0]) if isinstance(statistic, _OfInputs) else {}
