"""Finding the repeated blocks of a model and their linear layers, by structure and not by a list of architectures."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from .errors import ConfigError, UnsupportedError


class LinearLayer(NamedTuple):
    """One linear layer of a block."""

    name: str
    """Full module name, e.g. ``model.layers.0.self_attn.q_proj``."""

    block: int
    """Number of the block it stands in."""

    is_transposed: bool
    """True for ``Conv1D`` (GPT-2), which keeps its weight as (inputs, outputs)."""

    has_bias: bool


class Structure(NamedTuple):
    """Where the blocks of a model are and what linear layers they hold."""

    blocks: str
    """Name of the module list of blocks, e.g. ``model.layers``."""

    num_blocks: int
    layers: list[LinearLayer]


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one weight matrix: ``nn.Linear``, its quantised kin, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, which keeps its weight as (inputs, outputs)."""
    # There can be one only where its home has been imported.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def find_structure(model: nn.Module) -> Structure:
    """The repeated blocks of a model, and every linear layer in them.

    The blocks are the module list of equal classes that holds the most parameters.

    Args:
        model: any language model of transformers; may lie on the meta device.

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
    return Structure(blocks, len(module_list), layers)


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
    """The linear layers of the blocks whose name, or its last parts, is in ``target_modules``; all for ``None``.

    Raises:
        ConfigError: a name matches no linear layer of the blocks.
    """
    if target_modules is None or target_modules == "all-linear":
        return structure.layers
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    unmatched = [name for name in wanted if not any(_ends_with(layer.name, name) for layer in structure.layers)]
    if unmatched or not wanted:
        kinds = sorted({layer.name.split(".", structure.blocks.count(".") + 2)[-1] for layer in structure.layers})
        raise ConfigError(
            f"target_modules {unmatched} match no linear layer of the blocks {structure.blocks!r}; choose from {kinds}."
        )
    return [layer for layer in structure.layers if any(_ends_with(layer.name, name) for name in wanted)]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
