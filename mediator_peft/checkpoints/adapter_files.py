"""The adapter's files: names of tensors, the configuration, finding the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import MediatorSettings, with_todays_names
from ..errors import AdapterError, ConfigError
from ..saved_settings import check_saved, saved_fields

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SUBFOLDER = "mediator"
BANK_ATTRIBUTE = "mediator_bank"
ROUTER_ATTRIBUTE = "mediator_router"
MODEL_PREFIX = "base_model.model."
ROUTER_PREFIX = f"base_model.{ROUTER_ATTRIBUTE}."

# Fields of a configuration that are PEFT's own.
_PEFT_FIELDS = {
    "auto_mapping": None, "inference_mode": True, "peft_type": "MEDIATOR", "revision": None, "task_type": "CAUSAL_LM",
}  # fmt: skip


def bank_key(layer: str, buffer: str) -> str:
    """Name of one tensor of the bank in the file."""
    return f"{MODEL_PREFIX}{layer}.{BANK_ATTRIBUTE}.{buffer}"


def give_usual_mode(folder: Path) -> None:
    """Let the safetensors files of a folder be read by whom the umask says; the library behind them lets nobody."""
    written = [path for path in folder.glob("*.safetensors") if not path.is_symlink()]
    if not written:
        return
    # The umask cannot be asked for without changing it, for all threads; a new file shows it.
    descriptor, name = None, folder / f".mode-{os.getpid()}"
    try:
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
    finally:
        if descriptor is not None:
            os.close(descriptor)
            name.unlink()
    for path in written:
        path.chmod(mode)


def write_config(folder: Path, config: MediatorSettings) -> None:
    """Write the configuration of an adapter that is ready for use: the bytes that PEFT's ``save_pretrained`` writes."""
    known = {**_PEFT_FIELDS, "peft_version": version("peft"), **saved_fields(asdict(config)), "inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")


def read_settings(folder: Path) -> MediatorSettings:
    """The settings of an adapter.

    Raises:
        AdapterError: they are missing, damaged or of another format.
    """
    raw: Mapping[str, Any] = read_raw_config(folder)
    own = [item.name for item in fields(MediatorSettings)]
    raw = check_saved(raw, own, {*_PEFT_FIELDS, "peft_version"})
    try:
        return MediatorSettings(**{name: raw[name] for name in own if name in raw})
    except ConfigError as fault:
        raise AdapterError(f"{folder / CONFIG_FILE} cannot be used:\n{fault}") from fault


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


def has_adapter(path: Path) -> bool:
    """Whether :func:`find_adapter` finds one."""
    return any((folder / CONFIG_FILE).is_file() for folder in (path / SUBFOLDER, path))


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
    """The fields of an adapter's configuration file under their names of today, otherwise unchecked.

    Raises:
        AdapterError: it is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:  # huge integers and deep nesting among them
        raise AdapterError(f"{path} cannot be read ({fault}). Copy or build the adapter again.") from fault
    if not isinstance(loaded, dict) or loaded.get("peft_type") != "MEDIATOR":
        raise AdapterError(f"{path} does not describe a Mediator adapter.")
    return with_todays_names(loaded)
