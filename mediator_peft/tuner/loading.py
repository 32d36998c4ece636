"""Wrapping and loading: the functions most users call first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoints.adapter_files import WEIGHTS_FILE, backbone_of, find_adapter, read_raw_config
from ..errors import AdapterError
from .config import MediatorConfig


def get_mediator_model(model: nn.Module, config: MediatorConfig, adapter_name: str = "default") -> PeftModel:
    """Merge ``config.experts`` around a loaded base model and wrap it.

    The model's weights become the backbone's, in place.

    Args:
        model: the base, a causal language model of transformers.
        config: with ``experts`` set.
        adapter_name: PEFT's name for the adapter.

    Returns:
        A ``PeftModel``; the methods of :class:`MediatorModel` can be called on it.

    Raises:
        ConfigError, CheckpointError, CheckpointMismatchError: as ``build_mediator``.
    """
    return get_peft_model(model, config, adapter_name=adapter_name)


def load_mediator(
    path: str | os.PathLike[str],
    is_trainable: bool = False,
    *,
    max_resident_experts: int | None = None,
    expert_folder: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[PeftModel, Any]:
    """Load what ``build_mediator`` or ``save_pretrained`` wrote.

    Args:
        path: the output folder, its ``mediator`` folder, a saved adapter, or a hub id of one of these.
        is_trainable: let the router train.
        max_resident_experts: hold at most so many experts' deltas in memory, the last used (``"base"`` counts as one);
            the others lie in mapped files. None holds all.
        expert_folder: where these files go; None takes the system's temporary folder.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``, ``device_map``,
            ``quantization_config``.

    Returns:
        The model, in evaluation mode, and its tokenizer; None where the backbone has no tokenizer files.

    Raises:
        AdapterError: the adapter is missing, damaged or of a newer format.
        BackboneMismatchError: the backbone is not the one the adapter was built on.
    """
    from transformers import AutoModelForCausalLM

    folder = find_adapter(_local(path))
    check_weights_file(folder)
    read_raw_config(folder)
    config = MediatorConfig.from_pretrained(str(folder))
    backbone_path = backbone_of(folder, config.base_model_name_or_path)
    try:
        backbone = AutoModelForCausalLM.from_pretrained(backbone_path, **kwargs)
    except (OSError, SafetensorError) as fault:
        raise AdapterError(f"the backbone {backbone_path!r} cannot be loaded: {fault}") from fault
    config.inference_mode = not is_trainable
    config.max_resident_experts = max_resident_experts
    config.expert_folder = None if expert_folder is None else os.fspath(expert_folder)
    config.check()
    # An offloaded backbone is in its places already; PEFT would try to find new ones.
    placement = backbone.__dict__.pop("hf_device_map", None)
    model = PeftModel.from_pretrained(backbone, str(folder), is_trainable=is_trainable, config=config)
    if placement is not None:
        backbone.hf_device_map = placement
    model.peft_config["default"].base_model_name_or_path = backbone_path
    model.set_backbone(backbone_path)
    return model.eval(), _tokenizer(backbone_path)


def check_weights_file(folder: Path) -> None:
    """Refuse an adapter whose weights are missing or cut short, before anything large is loaded.

    Raises:
        AdapterError: they are.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"no {WEIGHTS_FILE} in {str(folder)!r}. Copy or build the adapter again.")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{path} is damaged or cut short ({fault}). Copy or build the adapter again.") from fault


def _local(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise AdapterError(f"no folder {name!r}. Give what build_mediator() wrote, or a hub id such as 'org/model'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, OSError) as fault:
        raise AdapterError(f"{name!r} is no folder, and the hub did not give it: {fault}") from fault


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None
