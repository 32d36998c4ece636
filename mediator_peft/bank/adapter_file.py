"""The adapter's files: names of tensors, writing them without a model, finding the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import MediatorConfig
from ..errors import AdapterError
from .layer_bank import LayerBank, to_disk
from .sparse_delta import SparseDelta

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SUBFOLDER = "mediator"
BANK_ATTRIBUTE = "mediator_bank"
ROUTER_ATTRIBUTE = "mediator_router"
MODEL_PREFIX = "base_model.model."
ROUTER_PREFIX = f"base_model.{ROUTER_ATTRIBUTE}."


def bank_key(layer: str, buffer: str) -> str:
    """Name of one tensor of the bank in the file."""
    return f"{MODEL_PREFIX}{layer}.{BANK_ATTRIBUTE}.{buffer}"


def write_adapter(
    folder: Path, config: MediatorConfig, deltas: Mapping[str, Mapping[str, SparseDelta]], router: Mapping[str, Tensor]
) -> None:
    """Write configuration and weights of an adapter, exactly as ``save_pretrained`` does.

    Args:
        folder: where to; it must exist.
        config: a built configuration.
        deltas: layer name → column → delta.
        router: state of a fitted router; empty for one that is not.
    """
    tensors: dict[str, Tensor] = {}
    for layer, columns in deltas.items():
        first = next(iter(columns.values()))
        bank = LayerBank(first.shape, first.coding, first.bias is not None)
        for column, delta in columns.items():
            bank.put(column, delta)
        for buffer, tensor in bank.state_dict().items():
            tensors[bank_key(layer, buffer)] = to_disk(buffer, tensor).contiguous()
    for name, tensor in router.items():
        tensors[f"{ROUTER_PREFIX}{name}"] = tensor.flatten().contiguous()
    if not tensors:  # nothing routed, no router yet; PEFT wants a file all the same
        tensors["empty"] = torch.zeros(0)
    partial = folder / f".{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS_FILE)
    write_config(folder, config)


def write_config(folder: Path, config: MediatorConfig) -> None:
    """Write the configuration of an adapter that is ready for use."""
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode


def find_adapter(path: Path) -> Path:
    """The folder of the adapter in or under ``path``.

    Raises:
        AdapterError: there is none.
    """
    for folder in (path / SUBFOLDER, path):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise AdapterError(
        f"no Mediator adapter in {str(path)!r}: neither {SUBFOLDER}/{CONFIG_FILE} nor {CONFIG_FILE} is there. Give "
        "the folder that build_mediator() or save_pretrained() wrote."
    )


def backbone_of(folder: Path, reference: str | None) -> str:
    """Where an adapter's backbone lies: a relative path counts from the adapter's folder.

    Raises:
        AdapterError: the adapter names no backbone.
    """
    if not reference:
        raise AdapterError(
            f"the adapter in {str(folder)!r} does not say which backbone it belongs to. Load the backbone yourself "
            "and use PeftModel.from_pretrained(backbone, folder)."
        )
    beside = folder / reference
    return str(beside.resolve()) if beside.is_dir() else reference


def read_raw_config(folder: Path) -> dict[str, object]:
    """The fields of an adapter's configuration file, unchecked.

    Raises:
        AdapterError: it is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise AdapterError(f"{path} cannot be read ({fault}). Copy or build the adapter again.") from fault
    if not isinstance(loaded, dict) or loaded.get("peft_type") != "MEDIATOR":
        raise AdapterError(f"{path} does not describe a Mediator adapter.")
    return loaded
