"""Models whose parameters FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps in shards and gathers for a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP gathers weights for a block at a time: what is written into them would be dropped, and no address
    nor numpy view of them may be held, since their memory is freed and taken anew.

    Raises:
        UnsupportedError: FSDP of the first version wraps a part of the model.
    """
    # Asked at every step, and going through all modules takes a millisecond: FSDP needs a process group.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise UnsupportedError(
            "FullyShardedDataParallel replaces a layer's weight by views of one flat parameter. Use FSDP2 instead: "
            "torch.distributed.fsdp.fully_shard (in accelerate: fsdp_version: 2)."
        )
    # fully_shard makes a subclass of each module's class, with this prefix.
    return any(kind.startswith("FSDP") for kind in kinds)


def is_gathered(model: nn.Module) -> bool:
    """Whether the parameters outside of the blocks are at hand: so it is within a forward pass of FSDP's root."""
    weight: Any = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return not _is_shard(weight)


def check_root(model: nn.Module) -> None:
    """Refuse a generation that does not begin with a forward pass of FSDP's root.

    Raises:
        UnsupportedError: a module around the model is the root, and its parameters have not been gathered.
    """
    if not type(model).__name__.startswith("FSDP") and not is_gathered(model):
        raise UnsupportedError(
            "fully_shard() was called on the model with its adapter, and generate() does not go through that. Call "
            "torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate') once, or shard "
            "model.get_base_model() instead."
        )


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Refuse what reads or writes whole weights.

    Raises:
        UnsupportedError: they are sharded.
    """
    if is_sharded(model):
        raise UnsupportedError(f"{what} needs whole weights, and these are sharded. Do it before fully_shard().")


def check_not_split(model: nn.Module) -> None:
    """Refuse tensor parallelism.

    Raises:
        UnsupportedError: each process computes a part of each layer's outputs.
    """
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedError(
            "tensor parallelism (tp_plan=) splits the layers' outputs over processes, and a delta is of a whole layer. "
            "Load the model without it; device_map= and torch.distributed.fsdp.fully_shard() spread memory too."
        )


def check_router(router: nn.Module) -> None:
    """Refuse a router that cannot judge now.

    Raises:
        UnsupportedError: its parameters are in shards.
    """
    if any(_is_shard(parameter) for parameter in router.parameters()):
        raise UnsupportedError(
            "the router's parameters are sharded, and this is no forward pass of the sharded model. Shard "
            "model.get_base_model() and leave the router whole."
        )


def _is_shard(tensor: object) -> bool:
    return type(tensor).__name__ == "DTensor"
