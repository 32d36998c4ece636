"""Wrapping and loading: the functions most users call first."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, backbone_of, find_adapter
from ..checkpoints.checksums import FileCheck, damage_message, saved_at
from ..checkpoints.folders import INDEX_FILE
from ..checkpoints.headers import read_json
from ..checkpoints.replacing import finish_replacing
from ..checkpoints.tensor_inventory import auto_class, is_known
from ..errors import AdapterError, MediatorError, UnsupportedError
from ..saved_settings import shortened
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


def bitsandbytes_settings(kind: str, compute_dtype: torch.dtype) -> Any:
    """``quantization_config`` of a load by transformers.

    Args:
        kind: ``int8``, or ``nf4`` or ``fp4``.
        compute_dtype: of the multiplications by 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute_dtype)


def load_mediator(
    path: str | os.PathLike[str],
    is_trainable: bool = False,
    *,
    verify_files: bool = True,
    max_resident_experts: int | None = None,
    pinned_experts: Sequence[str] | None = None,
    expert_folder: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[PeftModel, Any]:
    """Load what ``build_mediator`` or ``save_pretrained`` wrote.

    Args:
        path: the output folder, its ``mediator`` folder, a saved adapter, or a hub id of one of these.
        is_trainable: let the router train.
        verify_files: compare every file that is read with its checksum, large ones in threads while weights load.
            A file that was edited on purpose is accepted with ``mediator-peft verify PATH --accept``.
        max_resident_experts: hold at most so many experts' deltas in memory, the last used (``"base"`` counts as one);
            the others lie in mapped files. None holds all.
        pinned_experts: names of those that never leave memory; they count towards ``max_resident_experts``.
        expert_folder: where these files go; None takes the system's temporary folder.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``, ``device_map``,
            ``quantization_config``.

    Returns:
        The model, in evaluation mode, and its tokenizer; None where the backbone has no tokenizer files.

    Raises:
        AdapterError: a file is missing, damaged, of a newer format, or not what was written; the backbone lacks
            weights of the model that its config.json describes.
        BackboneMismatchError: the backbone is not the one the adapter was built on.
    """
    folder = find_adapter(_local(path))
    options: dict[str, Any] = {"max_resident_experts": max_resident_experts, "expert_folder": expert_folder}
    options["pinned_experts"] = None if pinned_experts is None else list(pinned_experts)
    while True:
        finish_replacing(folder)
        before = saved_at(folder)
        try:
            return _load_once(folder, is_trainable, verify_files, options, kwargs)
        except AdapterError:
            # Where another process has saved meanwhile, old and new files were read.
            if saved_at(folder) == before:
                raise


def _load_once(
    folder: Path, is_trainable: bool, verify_files: bool, options: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PeftModel, Any]:
    check_weights_file(folder)
    config = MediatorConfig.from_pretrained(str(folder), verify_files=False)
    backbone_path = backbone_of(folder, config.base_model_name_or_path)
    place = Path(backbone_path) if Path(backbone_path).is_dir() else None
    check = FileCheck(folder, place) if verify_files else None
    try:
        model, tokenizer = _read(folder, config, backbone_path, is_trainable, options, kwargs)
    except Exception as fault:
        problems = check.problems() if check is not None else []
        if problems:
            first = f"{fault}\n" if isinstance(fault, MediatorError) else ""
            raise AdapterError(first + damage_message(folder, problems)) from fault
        if isinstance(fault, _NO_DAMAGE) or (check is not None and check.covers_all):
            raise
        raise AdapterError(f"{str(folder)!r} or its backbone cannot be loaded: {_reason(fault)}") from fault
    if check is not None:
        check.finish()
        if not check.covers_all:
            _check_finite(model.get_base_model())
        tuner: Any = model.base_model
        tuner.adapter_files.know_backbone(backbone_path, check.known)
    return model, tokenizer


def _check_finite(backbone: Any) -> None:
    """Refuse NaN and infinity in a backbone whose files have no checksums.

    Raises:
        AdapterError: a tensor holds one.
    """
    for name, tensor in backbone.named_parameters():
        values = tensor.detach()
        if not values.is_floating_point() or values.device.type == "meta":
            continue
        # A finite sum means finite values, and is much cheaper to ask for. Finite values may have a sum that overflows.
        if not bool(values.sum(dtype=torch.float32).isfinite()) and not bool(values.isfinite().all()):
            raise AdapterError(
                f"tensor {name.replace('.base_layer', '')!r} of the backbone holds NaN or infinite values: its file is "
                "damaged. Copy or build the folder again."
            )


# Passed on as it is, also where not all files are known to be whole.
_NO_DAMAGE = (MediatorError, ImportError, torch.OutOfMemoryError)


def _read(
    folder: Path,
    config: MediatorConfig,
    backbone_path: str,
    is_trainable: bool,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PeftModel, Any]:
    backbone = load_backbone(backbone_path, config, kwargs)
    config.inference_mode = not is_trainable
    where = options["expert_folder"]
    config.max_resident_experts = options["max_resident_experts"]
    config.pinned_experts = options["pinned_experts"]
    config.expert_folder = None if where is None else os.fspath(where)
    config.check()
    # An offloaded backbone is in its places already; PEFT would try to find new ones.
    placement = backbone.__dict__.pop("hf_device_map", None)
    model = PeftModel.from_pretrained(backbone, str(folder), is_trainable=is_trainable, config=config)
    if placement is not None:
        backbone.hf_device_map = placement
    model.peft_config["default"].base_model_name_or_path = backbone_path
    model.set_backbone(backbone_path)
    return model.eval(), _tokenizer(backbone_path, kwargs.get("trust_remote_code", False))


def load_backbone(path: str, config: MediatorConfig, kwargs: dict[str, Any]) -> Any:
    """The dense model of an adapter, with all of its weights from its files.

    Args:
        path: folder or hub id.
        config: of the adapter.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        AdapterError: a file cannot be read, or its tensors are not those of the model that config.json describes.
        UnsupportedError: it cannot be quantised as ``quantization_config`` says.
    """
    if not Path(path).is_dir() and (path.startswith((".", "~")) or Path(path).is_absolute()):
        raise AdapterError(
            f"the backbone's folder {path!r} is not there. Move it back, or write where it lies as "
            f"base_model_name_or_path into {CONFIG_FILE}."
        )
    _check_settings(Path(path))
    _check_depth(Path(path), config)
    wanted = {**kwargs, "output_loading_info": True}
    try:
        loaded: Any = _backbone_class(path).from_pretrained(path, **wanted)
    except (OSError, SafetensorError) as fault:
        raise AdapterError(f"the backbone {path!r} cannot be loaded: {_reason(fault)}") from fault
    except Exception as fault:  # whatever a library that quantises may raise, half installed as it may be
        if "mismatch" not in str(fault):
            if kwargs.get("quantization_config") is None or isinstance(fault, torch.OutOfMemoryError):
                raise
            raise UnsupportedError(_not_quantized(kwargs["quantization_config"], fault)) from fault
        raise AdapterError(
            f"tensors of the backbone {path!r} do not have the shapes that its config.json says: {_reason(fault)}"
        ) from fault
    backbone, report = loaded
    check_loading_report(report, path)
    _align(backbone)
    return backbone


def _align(model: nn.Module) -> None:
    """Copy weights that lie at odd addresses in a mapped file: its header may have any length, kernels need words."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % parameter.element_size():
            parameter.data = parameter.data.clone()


def check_loading_report(report: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose weights are not all from its files, and files with weights that the model has no place for.

    transformers fills in what is missing with random numbers and goes on.

    Args:
        report: what ``from_pretrained(..., output_loading_info=True)`` gives besides the model.
        where: what the message calls the backbone.

    Raises:
        AdapterError: it lists the tensors.
    """
    faults = []
    for kind, what in (
        ("missing_keys", "lacks tensors"),
        ("unexpected_keys", "has tensors that the model has no place for"),
        ("mismatched_keys", "has tensors of other shapes"),
        ("error_msgs", "could not be loaded"),
    ):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report.get(kind) or ())
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            faults.append(f"{what}: {', '.join(names[:_LISTED])}{more}")
    if faults:
        raise AdapterError(
            f"the backbone {where!r} does not fit its config.json: it {'; it '.join(faults)}. Copy or build it again."
        )


_LISTED = 5
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX_FILE)


def _check_settings(folder: Path) -> None:
    """Refuse settings that are no JSON; transformers passes over some of them in silence."""
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as fault:
            raise AdapterError(f"{path} cannot be read ({_reason(fault)}). Copy or build it again.") from fault
        if not isinstance(content, dict):
            raise AdapterError(f"{path} holds no JSON object. Copy or build it again.")


_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _check_depth(folder: Path, config: MediatorConfig) -> None:
    """Refuse a number of layers far beyond the adapter's before transformers makes room for them."""
    raw = read_json(folder / "config.json")
    inner = raw.get("text_config")
    for part in (raw, inner if isinstance(inner, dict) else {}):
        for name in _DEPTH_NAMES:
            depth = part.get(name)
            if isinstance(depth, int) and config.num_blocks is not None and depth > 8 * config.num_blocks + 64:
                raise AdapterError(
                    f"{folder / 'config.json'} says {name} = {shortened(depth)}, the adapter was built for "
                    f"{config.num_blocks} blocks. Copy or build it again."
                )


def _not_quantized(settings: Any, fault: Exception) -> str:
    """What to say where a backbone cannot be quantised as it is loaded."""
    return (
        f"the backbone cannot be loaded with {type(settings).__name__} here: {_reason(fault).rstrip('.')}. Install "
        "what it needs, load with another quantization_config (BitsAndBytesConfig, TorchAoConfig, QuantoConfig), or "
        "quantise a loaded model by the library itself and put the adapter around it: PeftModel.from_pretrained(model, "
        "'OUTPUT/mediator')."
    )


def _reason(fault: BaseException) -> str:
    return " ".join(shortened(fault, 400).split()) or type(fault).__name__


def _backbone_class(path: str) -> Any:
    """The class of transformers that loads a backbone; the usual one where its ``config.json`` is not at hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_known(read_json(Path(path) / "config.json")):
        return AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return AutoModelForCausalLM  # it says itself what is wrong
    return auto_class(config)


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
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise AdapterError(
            f"give the folder that build_mediator() wrote, or a hub id such as 'org/model', not {path!r}."
        )
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


# A folder without any of these has no tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)


def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as fault:  # whatever a damaged tokenizer may raise
        if isinstance(fault, OSError) and not folder.is_dir():
            return None
        raise AdapterError(
            f"the tokenizer in {path!r} cannot be loaded ({type(fault).__name__}: {_reason(fault)}). Put the base's "
            "tokenizer there, or install what it needs; a folder without tokenizer files loads without a tokenizer."
        ) from fault
