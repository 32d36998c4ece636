"""Building into a model that is already loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..checkpoints.adapter_files import BANK_ATTRIBUTE
from ..checkpoints.opening import Checkpoint, ModelCheckpoint, open_checkpoint, open_checkpoints
from ..checkpoints.tensor_inventory import auto_class
from ..errors import CheckpointError, UnsupportedError
from ..merge.always_on import with_always
from ..merge.builder import Bank, checkpoints_by_name, label_checkpoints, merge_in_memory, require_experts
from ..merge.compatibility import check_job
from ..merge.locks import check_locks
from .config import MediatorConfig
from .quantized import fill_quantized, quantization_of


def build_in_memory(model: Any, config: MediatorConfig, check: Callable[[Sequence[str]], None]) -> Bank:
    """Merge ``config.experts`` around the weights of ``model``, which become the backbone's.

    Nothing is written to the model before all is computed: a fault leaves it as it was. ``config`` gets what the build
    found out.

    Args:
        model: to be wrapped.
        config: not built yet.
        check: called with the names of the routed layers before anything is written; refuses what cannot be wrapped.

    Raises:
        UnsupportedError: the model is a classifier, an encoder or an encoder-decoder.
    """
    require_experts(config)
    _check_continues_text(model)
    experts = open_checkpoints(label_checkpoints(None, config.experts))
    # Another adapter may wrap the layers already.
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if f".{BANK_ATTRIBUTE}." not in name
    }
    modules = model.named_modules()
    quantized = {name.removesuffix(".base_layer"): layer for name, layer in modules if _is_quantized(layer)}
    unreadable = [name for name, layer in quantized.items() if quantization_of(layer) == "other"]
    if unreadable:
        raise UnsupportedError(
            f"the base has {len(unreadable)} layers that are offloaded or quantised in a way whose codes cannot be "
            f"written ({unreadable[0]}, ...). Build with build_mediator() from checkpoints, and use load_mediator() "
            "with this quantization."
        )
    plain: Any = SimpleNamespace(
        config=model.config, state_dict=lambda: state, name_or_path=getattr(model, "name_or_path", "")
    )
    base = _base_on_disk(model) if quantized else ModelCheckpoint(plain)
    job = check_job(base, checkpoints_by_name(experts, config.experts))
    check_locks(job)
    job = with_always(job, config)
    bank, backbone, built, _ = merge_in_memory(job, config)
    check(built.routed_modules or ())
    for name, tensor in backbone.items():
        layer = quantized.get(name.removesuffix(".weight"))
        if layer is None:
            state[name].copy_(tensor)
        else:
            # Where it is quantised, Conv1D becomes a linear layer that knows what it was.
            fill_quantized(layer, tensor.T if getattr(layer, "source_cls", None) is Conv1D else tensor)
    config.note_build(built)
    return bank


def _is_quantized(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and quantization_of(layer) is not None


def _base_on_disk(model: nn.Module) -> Checkpoint:
    """What a quantised model was loaded from: its codes no longer tell the weights.

    Raises:
        CheckpointError: the model does not know, or there is nothing there.
    """
    path = str(getattr(model, "name_or_path", "") or "")
    if not path:
        raise CheckpointError(
            "the base is quantised, and it does not say where its full-precision weights are. Load it with "
            "from_pretrained(), or build with build_mediator() from checkpoints and use load_mediator()."
        )
    return open_checkpoint(path, "base")


def _check_continues_text(model: Any) -> None:
    """Refuse by name what a checkpoint of it would be refused for; a model in memory need not say what it is."""
    if isinstance(getattr(model, "config", None), PretrainedConfig):
        named = copy(model.config)
        named.architectures = [type(model).__name__]
        auto_class(named)
