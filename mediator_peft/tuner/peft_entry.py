"""Where PEFT has no hook: its own entry points for saving and loading, extended for adapters of this method.

``PeftModel.save_pretrained`` writes over the files of a former save one by one, and the ``AutoPeftModel`` classes take
a relative path to a backbone as one from the working folder. These functions stand in for them, and hand everything
but Mediator adapters on to PEFT unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.auto import _BaseAutoPeftModel
from peft.config import PeftConfigMixin

from ..checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, backbone_of, find_adapter, read_raw_config
from ..checkpoints.replacing import replaced_together
from ..errors import AdapterError, UnsupportedError
from .config import MediatorConfig
from .model import MediatorModel
from .saving import writing_files
from .sharded import check_not_sharded


def extend_peft() -> None:
    """Put the functions of this file in the place of PEFT's, once."""
    if hasattr(PeftModel.save_pretrained, "__wrapped__"):
        return
    methods = {"save_pretrained": _saving, "push_to_hub": _pushing}
    for name, extended in methods.items():
        setattr(PeftModel, name, extended(getattr(PeftModel, name)))
    # What PEFT looks up at each pass, under the name of an adapter that may have been deleted.
    plain: dict[str, Callable[[], Any]] = {"active_peft_config": MediatorConfig, "has_active_enabled_adapter": bool}
    for name, otherwise in plain.items():
        setattr(PeftModel, name, property(_unless_all_deleted(getattr(PeftModel, name).fget, otherwise)))
    disabling: Callable[[Any], Any] = PeftModel.disable_adapter
    PeftModel.disable_adapter = _unless_all_deleted(disabling, nullcontext)  # type: ignore
    class_methods: dict[type, Callable[..., Any]] = {PeftConfigMixin: _reading, _BaseAutoPeftModel: _loading}
    for owner, extended in class_methods.items():
        owner.from_pretrained = classmethod(extended(owner.from_pretrained.__func__))  # type: ignore[attr-defined]


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {
            **kwargs,
            "safe_serialization": safe_serialization,
            "selected_adapters": selected_adapters,
            "save_embedding_layers": save_embedding_layers,
            "is_main_process": is_main_process,
        }
        if not isinstance(self.base_model, MediatorModel):
            return original(self, save_directory, **options)
        if not safe_serialization:
            raise UnsupportedError(
                "safe_serialization=False would write a pickle, which is not read back: leave it out, and "
                f"{WEIGHTS_FILE} is written."
            )
        check_not_sharded(self.base_model.model, "save_pretrained")
        # Embeddings belong to the backbone: changed ones are saved with it.
        options["save_embedding_layers"] = False
        if not is_main_process or os.path.isfile(save_directory):
            return original(self, save_directory, **options)
        folder = Path(save_directory)
        # No fit nor edit comes between tensors and configuration.
        with self.base_model.active.changes_wait(), writing_files(), replaced_together(folder) as fresh:
            original(self, str(fresh), **options)
            self.base_model.adapter_files.finish_saving(fresh, folder)
        return None

    return save_pretrained


def _pushing(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, MediatorModel):
            return original(self, *args, **kwargs)
        # Nobody else has the folder of this machine: the backbone goes along, unless it is on the hub itself.
        with self.base_model.adapter_files.taking_backbone_along():
            return original(self, *args, **kwargs)

    return push_to_hub


def _unless_all_deleted(original: Callable[[Any], Any], otherwise: Callable[[], Any]) -> Callable[[Any], Any]:
    """A method of ``PeftModel``; for a model whose last Mediator adapter was deleted, what ``otherwise`` gives.

    Such a model is its backbone.
    """

    @wraps(original)
    def method(self: Any) -> Any:
        is_plain = isinstance(self.base_model, MediatorModel) and not self.base_model.active.exists
        return otherwise() if is_plain else original(self)

    return method


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, subfolder: Any = None, **kwargs: Any) -> Any:
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if cls is not PeftConfig or not _is_ours(folder):
            return original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config = MediatorConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.base_model_name_or_path:
            # It is handed to from_pretrained of transformers, which counts from the working folder.
            config.base_model_name_or_path = backbone_of(folder, config.base_model_name_or_path)
        return config

    return from_pretrained


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        from .loading import load_mediator

        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        plain = adapter_name == "default" and config is None
        if not plain or cls._target_class is None or not _holds_ours(folder):
            kwargs |= {"adapter_name": adapter_name, "is_trainable": is_trainable, "config": config}
            return original(cls, pretrained_model_name_or_path, **kwargs)
        options = {key: value for key, value in kwargs.items() if key not in _FOR_PEFT}
        return load_mediator(folder, is_trainable, **options)[0]

    return from_pretrained


# Arguments of ``AutoPeftModel`` that concern hubs and PEFT, not the backbone.
_FOR_PEFT = {"subfolder", "revision", "import_allowlist", "autocast_adapter_dtype", "low_cpu_mem_usage", "torch_device"}


def _is_ours(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file() and bool(read_raw_config(folder))
    except AdapterError:
        return False


def _holds_ours(folder: Path) -> bool:
    try:
        return folder.is_dir() and _is_ours(find_adapter(folder))
    except AdapterError:
        return False
