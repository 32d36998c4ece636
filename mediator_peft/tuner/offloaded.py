"""Tensors that accelerate keeps in other memory or on disk, fetched for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError


def fetched(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model with its numbers, wherever the hooks of ``cpu_offload`` and ``disk_offload`` keep them.

    Args:
        model: the model that has the tensor.
        name: full name in the model's state dict.
        tensor: what the state dict holds: the tensor, or one on the meta device in its place.

    Raises:
        UnsupportedError: it is on the meta device, and no hook knows its numbers.
    """
    if tensor.device.type != "meta":
        return tensor
    for owner, rest in _owners(model, name):
        for hook in _hooks(owner):
            weights = getattr(hook, "weights_map", None)
            if weights is not None and rest in weights:
                return weights[rest]
    raise UnsupportedError(
        f"{name!r} has no numbers: it lies on the meta device, and no hook of accelerate keeps them. Load the model "
        "with load_mediator(), and save that."
    )


def _owners(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """(module, name of the tensor in it) of the modules that hold a tensor, the innermost first."""
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        try:
            yield model.get_submodule(".".join(parts[:place])), ".".join(parts[place:])
        except AttributeError:
            continue


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", (hook,)))
