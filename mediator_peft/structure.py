"""Finding the repeated blocks of a model and their linear layers, by structure and not by a list of architectures."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from typing import NamedTuple

from torch import nn

from .errors import ConfigError, UnsupportedError

ALL_LINEAR = "all-linear"
"""Among ``target_modules``: every linear layer of the blocks."""

OUTSIDE = -1
"""Stands for the number of a block where a matrix is in none: embeddings and ``lm_head``."""


class LinearLayer(NamedTuple):
    """One linear layer of a block; or a matrix outside of the blocks, one row a token."""

    name: str
    """Full module name, e.g. ``model.layers.0.self_attn.q_proj``."""

    block: int
    """Number of the block it stands in, or ``OUTSIDE``."""

    is_transposed: bool
    """True for ``Conv1D`` (GPT-2), which keeps its weight as (inputs, outputs)."""

    has_bias: bool


class Structure(NamedTuple):
    """Where the blocks of a model are and what linear layers they hold."""

    blocks: str
    """Name of the module list of blocks, e.g. ``model.layers``."""

    num_blocks: int
    layers: list[LinearLayer]
    outer: tuple[LinearLayer, ...] = ()
    """The token embedding and ``lm_head``; where they are tied, the embedding stands for both."""

    tied_head: str | None = None
    """Name of a ``lm_head`` whose weight is the embedding's."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one weight matrix: ``nn.Linear``, its quantised kin, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, which keeps its weight as (inputs, outputs)."""
    # There can be one only where its home has been imported.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def find_structure(model: nn.Module, tied: Container[str] = ()) -> Structure:
    """The repeated blocks of a model, every linear layer in them, and the embedding and ``lm_head`` outside.

    The blocks are the module list of equal classes that holds the most parameters.

    Args:
        model: any language model of transformers; may lie on the meta device.
        tied: names of tensors that only repeat another.

    Raises:
        UnsupportedError: there are no repeated blocks, or they hold weights with three dimensions (fused mixtures of
            experts), which would be left out of the deltas.
    """
    blocks, module_list = _blocks_of(model)
    fused = [f"{blocks}.{name}" for name, parameter in module_list.named_parameters() if parameter.ndim >= 3]
    if fused:
        raise UnsupportedError(
            f"{type(model).__name__} fuses its mixture-of-experts weights into {len(fused)} tensors with three "
            f"dimensions ({fused[0]}, ...), which is not supported. Use experts of a dense model."
        )
    layers = [
        LinearLayer(
            name=f"{blocks}.{name}",
            block=int(name.split(".")[0]),
            is_transposed=is_transposed(module),
            has_bias=getattr(module, "bias", None) is not None,
        )
        for name, module in module_list.named_modules()
        if is_linear(module)
    ]
    return Structure(blocks, len(module_list), layers, *_outer_layers(model, tied))


def _outer_layers(model: nn.Module, tied: Container[str]) -> tuple[tuple[LinearLayer, ...], str | None]:
    """The embedding and ``lm_head``, as far as the model has them; and the name of the latter where it is tied."""
    names = {id(module): name for name, module in model.named_modules()}
    found, tied_head = [], None
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        name = names.get(id(module))
        if module is None or name is None or not (is_linear(module) or isinstance(module, nn.Embedding)):
            continue
        if f"{name}.weight" in tied:
            tied_head = name
        else:
            found.append(LinearLayer(name, OUTSIDE, is_transposed(module), getattr(module, "bias", None) is not None))
    return tuple(found), tied_head


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks themselves; see :func:`find_structure`."""
    return _blocks_of(model)[1]


def _blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in candidates.items()
        if any(is_linear(child) for child in module.modules())
    }
    if not sizes:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of equal blocks with linear layers. Decoder-only language models of "
            "transformers are supported."
        )
    blocks = max(sizes, key=lambda name: sizes[name])
    return blocks, candidates[blocks]


def select_layers(structure: Structure, target_modules: Iterable[str] | str | None) -> list[LinearLayer]:
    """The matrices whose name, or its last parts, is in ``target_modules``.

    ``None`` and ``"all-linear"`` stand for every linear layer of the blocks. The embedding and ``lm_head`` must be
    named; where they are tied, either name stands for both.

    Raises:
        ConfigError: a name matches nothing.
    """
    if target_modules is None:
        return structure.layers
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names = [*wanted]
    if structure.tied_head is not None and any(_ends_with(structure.tied_head, name) for name in wanted):
        names += [layer.name for layer in structure.outer]
    unmatched = [name for name in wanted if not _matches_any(structure, name)]
    if unmatched or not wanted:
        kinds = sorted({layer.name.split(".", structure.blocks.count(".") + 2)[-1] for layer in structure.layers})
        outer = [layer.name.rpartition(".")[2] for layer in structure.outer]
        raise ConfigError(
            f"target_modules {unmatched} match no linear layer of the blocks {structure.blocks!r}; choose from "
            f"{[*kinds, ALL_LINEAR]}, and outside of the blocks {outer}."
        )
    return [
        layer
        for layer in (*structure.layers, *structure.outer)
        if (ALL_LINEAR in wanted and layer.block != OUTSIDE) or any(_ends_with(layer.name, name) for name in names)
    ]


def targets_in_blocks(structure: Structure, target_modules: list[str] | str | None) -> list[str] | str | None:
    """Targets without those that mean nothing but the embedding or ``lm_head``.

    Where PEFT sees one of these among them, it saves the whole embedding beside our deltas.
    """
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    outer = [layer.name for layer in structure.outer] + ([structure.tied_head] if structure.tied_head else [])
    if wanted is None or not any(_ends_with(name, target) for name in outer for target in wanted):
        return target_modules
    inner = [layer.name for layer in structure.layers]
    return [target for target in wanted if target == ALL_LINEAR or any(_ends_with(name, target) for name in inner)]


def _matches_any(structure: Structure, name: str) -> bool:
    known = [layer.name for layer in (*structure.layers, *structure.outer)]
    known += [] if structure.tied_head is None else [structure.tied_head]
    return name == ALL_LINEAR or any(_ends_with(other, name) for other in known)


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
