"""Finding the repeated blocks of a model and their linear layers, by structure and not by a list of architectures."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .deferred import nn, torch
from .errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

ALL_LINEAR = "all-linear"
"""Among ``target_modules``: every linear layer of the blocks."""

OUTSIDE = -1
"""Stands for the number of a block where a matrix is in none: embeddings and ``lm_head``."""


class FusedPart(NamedTuple):
    """One matrix of a tensor (E, O, I) or (E, I, O) that holds those of all experts of a mixture of experts."""

    tensor: str
    """Full name, e.g. ``model.layers.0.mlp.experts.gate_up_proj``."""

    number: int
    """Of the expert, from 0."""

    bias: str | None
    """Tensor (E, O) with the biases; None without."""

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


class LinearLayer(NamedTuple):
    """One linear layer of a block; or a matrix outside of the blocks, one row a token."""

    name: str
    """Full module name, e.g. ``model.layers.0.self_attn.q_proj``; of a fused part, tensor name and number."""

    block: int
    """Number of the block it stands in, or ``OUTSIDE``."""

    is_transposed: bool
    """True for ``Conv1D`` (GPT-2), which keeps its weight as (inputs, outputs)."""

    has_bias: bool
    part: FusedPart | None = None
    """Where the matrix is only a part of a tensor of the model."""


class Structure(NamedTuple):
    """Where the blocks of a model are and what linear layers they hold."""

    blocks: str
    """Name of the module list of blocks, e.g. ``model.layers``."""

    num_blocks: int
    layers: list[LinearLayer]
    """Those of the blocks; each matrix of a fused tensor is one, where it can be wrapped."""

    outer: tuple[LinearLayer, ...] = ()
    """The token embedding and ``lm_head``; where they are tied, the embedding stands for both."""

    tied_head: str | None = None
    """Name of a ``lm_head`` whose weight is the embedding's."""

    fused: tuple[str, ...] = ()
    """Tensors that hold one matrix for each expert of a mixture of experts, (E, O, I) or (E, I, O)."""

    gates: frozenset[str] = frozenset()
    """Tensors of the gates that choose among the experts of a mixture of experts."""

    gate_layers: tuple[LinearLayer, ...] = ()
    """Those of the gates that are linear layers; they are not among ``layers``."""

    scaled_embedding: tuple[str, str] | None = None
    """Name and class of a token embedding that does more than look rows up, and so cannot be routed."""

    towers: frozenset[str] = frozenset()
    """Tensors outside of the language model of a multimodal model: vision and audio encoders, projectors."""

    @property
    def unsplit(self) -> list[str]:
        """Fused tensors whose matrices are not among ``layers``: their module is of a kind that is not wrapped."""
        split = {layer.part.tensor for layer in self.layers if layer.part is not None}
        return [name for name in self.fused if name not in split]


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one weight matrix: ``nn.Linear``, its quantised kin, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def only_looks_up(embedding: nn.Embedding) -> bool:
    """Whether an embedding's ``forward`` is torch's, without renormalising rows."""
    return type(embedding).forward is nn.Embedding.forward and embedding.max_norm is None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, which keeps its weight as (inputs, outputs)."""
    # There can be one only where its home has been imported.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def find_structure(model: nn.Module, tied: Container[str] = ()) -> Structure:
    """The repeated blocks of a model, every linear layer in them, and the embedding and ``lm_head`` outside.

    The blocks are the module list that holds the most parameters; of a multimodal model, within its language model.
    What is no linear layer (norms, convolutions, states) is in no list of layers, and neither is a linear layer whose
    weight another block repeats. Fused experts are as many linear layers as they have matrices.

    Args:
        model: any language model of transformers; may lie on the meta device.
        tied: names of tensors that only repeat another.

    Raises:
        UnsupportedError: there are no repeated blocks with linear layers.
    """
    blocks, module_list = _blocks_of(model)
    modules = dict(module_list.named_modules())
    fused, gates = _mixtures_of(modules)
    owners = Counter(id(module.weight) for module in modules.values() if is_linear(module))
    linear = [
        LinearLayer(
            name=f"{blocks}.{name}",
            block=int(name.split(".")[0]),
            is_transposed=is_transposed(module),
            has_bias=getattr(module, "bias", None) is not None,
        )
        for name, module in modules.items()
        if is_linear(module) and owners[id(module.weight)] == 1 and _only_multiplies(module)
    ]
    gate_names = frozenset(f"{blocks}.{name}" for name in gates)
    layers = [layer for layer in linear if f"{layer.name}.weight" not in gate_names]
    layers += [part for name in fused for part in _parts_of(modules, name, blocks)]
    if not layers:
        raise UnsupportedError(
            f"the blocks {blocks!r} of {type(model).__name__} have no linear layers that could be routed."
        )
    outer, tied_head = _outer_layers(model, tied)
    return Structure(
        blocks,
        len(module_list),
        layers,
        outer,
        tied_head,
        tuple(f"{blocks}.{name}" for name in fused),
        gate_names,
        tuple(layer for layer in linear if f"{layer.name}.weight" in gate_names),
        _scaled_embedding(model),
        _towers_of(model),
    )


def _only_multiplies(module: nn.Module) -> bool:
    """Whether a linear layer computes ``W x + b``: some models have kinds of it that do more; these are tried out."""
    kind: type[nn.Module] = type(module)
    if not kind.__module__.startswith("transformers.models") or kind.forward is nn.Linear.forward:
        return True
    probe, inputs = copy(module), torch.tensor([[1.0, -2.0], [0.5, 3.0]], device="cpu")
    weight = torch.tensor([[1.0, 4.0], [-3.0, 2.0], [5.0, 0.5]], device="cpu")
    bias = torch.tensor([1.0, -1.0, 7.0], device="cpu") if getattr(module, "bias", None) is not None else None
    probe.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)
    }  # fmt: skip
    try:
        return torch.allclose(probe(inputs), nn.functional.linear(inputs, weight, bias))
    except Exception:  # whatever such a layer may need beside its inputs
        return False


@lru_cache(maxsize=4096)
def reads_weight_of(owner: Any, child: str) -> bool:
    """Whether the code of a module computes with the weight of a child, past the child's own forward pass.

    Mamba's kernels, for one, take the weights of some linear layers as they are.
    """
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return False
    described = "dtype|device|shape|size|ndim|numel|data_ptr"
    return re.search(rf"self\.{re.escape(child)}\.weight\b(?!\.({described})\b)", source) is not None


def _mixtures_of(modules: dict[str, nn.Module]) -> tuple[list[str], set[str]]:
    """Fused expert tensors of mixtures of experts, and tensors of their gates.

    Fused are tensors with three dimensions, E of the first, that are no convolution's. A gate is what stands beside
    the experts and has one row for each of them.

    Args:
        modules: name → module, all of the blocks'; the names count from the blocks.
    """
    matrices: dict[str, list[str]] = {}
    experts: dict[str, int] = {}
    for name, module in modules.items():
        own = [(key, value) for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
        if own and not isinstance(module, nn.modules.conv._ConvNd) and min(own[0][1].shape) > 1:
            matrices[name] = [f"{name}.{key}" for key, _ in own]
            experts[name] = own[0][1].shape[0]
        elif isinstance(module, nn.ModuleList) and len(module) > 1 and name.rpartition(".")[2] == "experts":
            experts[name] = len(module)
    fused: list[str] = []
    gates: set[str] = set()
    for name, number in experts.items():
        parent = name.rpartition(".")[0]
        # A sparse layer of its own within the block, e.g. layers.0.mlp.experts; its experts may lie side by side.
        if not parent or parent.isdigit():
            continue
        found = {
            f"{inner}.{key}"
            for inner, module in modules.items()
            if (inner == parent or (inner.startswith(f"{parent}.") and not _lies_in(inner, experts)))
            and not isinstance(module, nn.modules.conv._ConvNd)
            for key in (*module._parameters, *module._buffers)
            if _has_rows(getattr(module, key), number)
        }
        gates |= found
        fused += matrices.get(name, []) if found else []
    return fused, gates


def _parts_of(modules: dict[str, nn.Module], name: str, blocks: str) -> Iterator[LinearLayer]:
    """The matrices of one fused tensor; none where its module does not follow transformers' interface for experts.

    Only there is it known which dimension is which, and that the module gets all tokens in their order.
    """
    owner, _, key = name.rpartition(".")
    module = modules[owner]
    if not follows_interface(module):
        return
    bias = f"{key}_bias" if getattr(module, f"{key}_bias", None) is not None else None
    for number in range(len(getattr(module, key))):
        part = FusedPart(f"{blocks}.{name}", number, None if bias is None else f"{blocks}.{owner}.{bias}")
        yield LinearLayer(
            f"{part.tensor}.{number}", int(name.split(".")[0]), bool(module.is_transposed), bias is not None, part
        )


def follows_interface(module: nn.Module) -> bool:
    """Whether a module with fused experts is called as ``experts(tokens (N, H), expert ids (N, k), weights (N, k))``.

    So are those with transformers' ``use_experts_implementation``, which notes the layout of their tensors.
    """
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _lies_in(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _has_rows(tensor: Tensor | None, number: int) -> bool:
    return tensor is not None and tensor.ndim in (1, 2) and tensor.shape[0] == number


def _towers_of(model: nn.Module) -> frozenset[str]:
    """Tensors of a multimodal model that belong neither to its language model nor to its ``lm_head``."""
    decoder, config = _decoder_of(model), getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = _other_senses(model)
    if decoder is not model and config is not None and config.get_text_config() is not config:
        inside = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
        outside |= {id(module) for module in model.modules()} - inside
    return frozenset(
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if id(module) in outside
        for key in (*module._parameters, *(module._buffers.keys() - module._non_persistent_buffers_set))
        if getattr(module, key) is not None
    )


def _other_senses(model: nn.Module) -> set[int]:
    """Modules (their ids) of inner models that read images or sound, not tokens, or have another configuration."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    of_text = {type(config), type(config.get_text_config())}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    inner = [module for module in model.modules() if hasattr(module, "main_input_name") and module is not model]
    others = [
        module
        for module in inner
        if (module.main_input_name != "input_ids" or type(module.config) not in of_text)
        # What embeds the tokens is no encoder of something else, whatever it says.
        and not any(part is embedding for part in module.modules())
    ]
    return {id(module) for other in others for module in other.modules()}


def _decoder_of(model: nn.Module) -> nn.Module:
    """The language model within a multimodal one; of others the model itself or its body."""
    decoder = getattr(model, "get_decoder", lambda: model)()
    is_whole = decoder is not None and any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    return decoder if is_whole else model  # some models call a part of their head so


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


def _scaled_embedding(model: nn.Module) -> tuple[str, str] | None:
    """Name and class of a token embedding that does more than look rows up."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding) or only_looks_up(embedding):
        return None
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    return None if name is None else (name, type(embedding).__name__)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks themselves; see :func:`find_structure`."""
    return _blocks_of(model)[1]


def _blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    inside = {id(module) for module in _decoder_of(model).modules()} - _other_senses(model)
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and id(module) in inside
        and any(is_linear(child) for child in module.modules())
    }
    if not sizes:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of blocks with linear layers. Decoder-only language models of "
            "transformers are supported."
        )
    blocks = max(sizes, key=lambda name: sizes[name])
    found = model.get_submodule(blocks)
    assert isinstance(found, nn.ModuleList)
    return blocks, found


def select_layers(structure: Structure, target_modules: Iterable[str] | str | None) -> list[LinearLayer]:
    """The matrices whose name, or its last parts, is in ``target_modules``.

    ``None`` and ``"all-linear"`` stand for every linear layer of the blocks. The embedding and ``lm_head`` must be
    named; where they are tied, either name stands for both.

    Raises:
        ConfigError: a name matches nothing.
        UnsupportedError: one is an embedding that does more than look rows up.
    """
    if target_modules is None:
        return structure.layers
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names = [*wanted]
    if structure.tied_head is not None and any(_ends_with(structure.tied_head, name) for name in wanted):
        names += [layer.name for layer in structure.outer]
    unmatched = [name for name in wanted if not _matches_any(structure, name) and not gates_named(structure, [name])]
    if unmatched or not wanted:
        known = {layer.name if layer.part is None else layer.part.tensor for layer in structure.layers}
        kinds = sorted({name.split(".", structure.blocks.count(".") + 2)[-1] for name in known})
        outer = [layer.name.rpartition(".")[2] for layer in structure.outer]
        raise ConfigError(
            f"target_modules {unmatched} match no linear layer of the blocks {structure.blocks!r}; choose from "
            f"{[*kinds, ALL_LINEAR]}, and outside of the blocks {outer}."
        )
    in_blocks = {id(layer) for layer in structure.layers}
    selected = [
        layer
        for layer in (*structure.layers, *structure.gate_layers, *structure.outer)
        if (ALL_LINEAR in wanted and id(layer) in in_blocks) or any(_is_called(layer, name) for name in names)
    ]
    if structure.scaled_embedding is not None and structure.scaled_embedding[0] in {layer.name for layer in selected}:
        raise UnsupportedError(unroutable(structure.scaled_embedding[1]))
    return selected


def unroutable(kind: str) -> str:
    """What is said of an embedding that does more than look rows up."""
    return (
        f"an embedding of type {kind} does more than look rows up, so it cannot be routed. Leave it out of "
        "target_modules and build again."
    )


def gates_named(structure: Structure, target_modules: Iterable[str] | str | None) -> set[str]:
    """Tensors of gates whose module's name, or its last parts, is in ``target_modules``; others stay the base's."""
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    return {
        gate for gate in structure.gates if any(_ends_with(gate.rpartition(".")[0], name) for name in wanted)
    }  # fmt: skip


def targets_in_blocks(structure: Structure, target_modules: list[str] | str | None) -> list[str] | str | None:
    """Targets without those that mean nothing but the embedding or ``lm_head``.

    Where PEFT sees one of these among them, it saves the whole embedding beside our deltas.
    """
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    outer = [layer.name for layer in structure.outer] + ([structure.tied_head] if structure.tied_head else [])
    if wanted is None or not any(_ends_with(name, target) for name in outer for target in wanted):
        return target_modules
    inner = (*structure.layers, *structure.gate_layers)
    return [target for target in wanted if target == ALL_LINEAR or any(_is_called(layer, target) for layer in inner)]


def _matches_any(structure: Structure, name: str) -> bool:
    is_head = structure.tied_head is not None and _ends_with(structure.tied_head, name)
    layers = (*structure.layers, *structure.outer)
    return name == ALL_LINEAR or is_head or any(_is_called(layer, name) for layer in layers)


def _is_called(layer: LinearLayer, name: str) -> bool:
    """Whether a target means a layer; all parts of a fused tensor by its name or by that of its module."""
    names = [layer.name] if layer.part is None else [layer.name, layer.part.tensor, layer.part.module]
    return any(_ends_with(other, name) for other in names)


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
