"""Which layers of a model are routed: they are checked, wrapped and taken out again here."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..bank.sparse_delta import SparseDelta
from ..errors import UnsupportedError
from ..methods.rounding import ROUNDINGS
from ..structure import reads_weight_of
from .config import MediatorConfig
from .embedding import MediatorEmbedding, check_embedding
from .fused_experts import check_experts, is_expert_matrix, unwrap_experts
from .layer import MediatorLayer, routed_layers
from .quantized import are_corrected, quantization_of, quantizations_of, uncorrected_quantization
from .request_board import RequestBoard
from .sharded import check_not_split
from .tied_head import check_tie, untie_head


def check_layers(model: Any, names: Sequence[str]) -> None:
    """Refuse layers that cannot be wrapped, before anything is changed.

    Args:
        model: may have wrapped layers already.
        names: of the layers that are to be routed, matrices of fused experts among them.

    Raises:
        UnsupportedError: the model has no such layer, an embedding does more than look rows up or is tied to a head
            with a weight of its own, fused experts are quantised, or layers are split over processes.
    """
    check_not_split(model)
    modules = dict(model.named_modules())
    for name in names:
        if is_expert_matrix(modules, name):
            continue
        layer = modules.get(name)
        if layer is None:
            raise UnsupportedError(f"the adapter has deltas for {name!r}, which this model has not.")
        if isinstance(layer, nn.Embedding):
            check_embedding(layer)
            head = model.get_output_embeddings()
            if layer is model.get_input_embeddings() and isinstance(head, nn.Linear):
                check_tie(model, head, layer.weight)
    check_experts(modules, names)


def routed(target: nn.Module, parent: nn.Module, name: str, board: RequestBoard) -> MediatorLayer:
    """The routed layer for a layer: a new one around it, or itself where it is one.

    Args:
        target: ``parent``'s child.
        parent: whose forward pass calls it.
        name: of the child.
        board: of the model.
    """
    if isinstance(target, MediatorLayer):
        return target
    kind: Any = MediatorEmbedding if isinstance(target, nn.Embedding) else MediatorLayer
    layer: MediatorLayer = kind(target, board)
    owner: Any = type(parent)
    layer.weight_is_read = reads_weight_of(owner, name)
    return layer


def add_deltas(
    layer: MediatorLayer, adapter_name: str, config: MediatorConfig, deltas: Mapping[str, SparseDelta] | None
) -> None:
    """Give a routed layer the bank of one adapter.

    Args:
        layer: of the model.
        adapter_name: PEFT's name of the adapter.
        config: its settings.
        deltas: column → delta of a build in memory; None where they are loaded later.
    """
    bank = layer.add_bank(adapter_name, config.encoding)
    quantization = quantization_of(layer.base_layer)
    bank.is_corrected = quantization is not None and quantization == config.for_quantization
    for column, delta in (deltas or {}).items():
        bank.put(column, delta.to(layer.base_layer.weight.device))


def warn_of_other_quantization(layers: Iterable[MediatorLayer], config: MediatorConfig) -> None:
    """Say where a correction of quantization error was built for another quantization than the backbone's."""
    others = sorted(quantizations_of(layers) & set(ROUNDINGS) - {config.for_quantization})
    if others and config.for_quantization is not None:
        warnings.warn(
            f"the adapter's correction is for a backbone in {config.for_quantization}, this one is in "
            f"{', '.join(others)}: its layers are not corrected. Load it in {config.for_quantization}, or build "
            f"with for_quantization={others[0]!r}.",
            stacklevel=3,
        )


def warn_of_other_reading(layers: Collection[MediatorLayer], adapter_name: str, config: MediatorConfig) -> None:
    """Say where a router was fitted on weights of another quantisation than those that prompts are read with now."""
    if config.fitted_router_layer is None or are_corrected(layers, adapter_name):
        return
    fitted, now = config.fitted_quantization, uncorrected_quantization(layers, adapter_name)
    if fitted != now and {fitted, now} != {None, "int8"}:
        warnings.warn(
            f"the router was fitted on {_weights_in(fitted)}, and the backbone has {_weights_in(now)}: in-distribution "
            "prompts may go to the fallback. Fit it on the backbone as it is loaded now (fit_router, or `mediator-peft "
            "fit-router OUT --quantize ...`), or build with for_quantization, whose correction applies to routing too.",
            stacklevel=3,
        )


def _weights_in(quantization: str | None) -> str:
    return "plain weights" if quantization is None else f"weights in {quantization}"


def unwrap_layers(model: Any) -> None:
    """Put the layers themselves, with what is merged into them for good, in the place of the routed ones."""
    unwrap_experts(model)
    for name, layer in routed_layers(model).items():
        layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    untie_head(model)
