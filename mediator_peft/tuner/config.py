"""The settings as PEFT takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig

from ..checkpoints.adapter_files import CONFIG_FILE, read_raw_config
from ..checkpoints.checksums import FileCheck
from ..checkpoints.replacing import finish_replacing
from ..config import FALLBACK_EXPERT, FORMAT_VERSION, MediatorSettings
from ..errors import AdapterError, ConfigError
from ..registration import peft_type
from ..saved_settings import check_saved, saved_fields
from ..setting_checks import expert_name_faults

__all__ = ["FALLBACK_EXPERT", "FORMAT_VERSION", "FitSettings", "MediatorConfig", "expert_name_faults"]


class FitSettings(NamedTuple):
    """What fitting a router writes into its configuration: it belongs to that router alone."""

    turn_markers: list[list[int]] | None
    prompt_form: dict[str, list[int]] | None
    fitted_router_layer: int | None
    fitted_router: str | None = None
    fitted_quantization: str | None = None

    @classmethod
    def of(cls, config: MediatorSettings) -> FitSettings:
        """Those of a configuration."""
        return cls(*(getattr(config, name) for name in cls._fields))

    def write_to(self, config: MediatorSettings) -> None:
        """Put them into a configuration."""
        for name, value in self._asdict().items():
            setattr(config, name, value)


@dataclass(init=False)
class MediatorConfig(MediatorSettings, PeftConfig):
    """What to merge, how to thin out the deltas, and how to route: :class:`MediatorSettings` as a ``PeftConfig``.

    Raises:
        ConfigError: a field is unknown, out of range or contradicts another; all such faults are listed at once.
    """

    def __post_init__(self) -> None:
        self.task_type = self.task_type or "CAUSAL_LM"
        PeftConfig.__post_init__(self)
        self.peft_type = peft_type()
        MediatorSettings.__post_init__(self)

    def bind(self, on_save: Callable[[Path, MediatorConfig], None]) -> None:
        """Call ``on_save(folder, config)`` before this configuration is written: the model saves what else belongs."""
        self._on_save = on_save

    @property
    def was_built_here(self) -> bool:
        """Whether a model in memory was built by this configuration, and not by a file that it came from."""
        return bool(self.__dict__.get("_was_built_here"))

    def note_build(self, built: MediatorSettings) -> None:
        """Take over what a build in memory found out."""
        self._as_given = {item.name: getattr(self, item.name) for item in fields(self)}
        for item in fields(self):
            setattr(self, item.name, getattr(built, item.name))
        self._was_built_here = True

    def to_be_built(self) -> MediatorConfig:
        """The configuration as it was before it was built."""
        given = self.__dict__.get("_as_given", {})
        return MediatorConfig(**{**given, "base_model_name_or_path": self.base_model_name_or_path})

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the configuration is not a copy of the model behind it.
        return {key: value for key, value in self.__dict__.items() if key != "_on_save"}

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT; fields of newer versions are left out where they are not set."""
        return saved_fields(super().to_dict())

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; for a model's own configuration, also its card and, if need be, backbone."""
        reference = self.base_model_name_or_path
        on_save = getattr(self, "_on_save", None)
        if on_save is not None:
            on_save(Path(save_directory), self)
        here = (self.max_resident_experts, self.pinned_experts, self.expert_folder)
        self.max_resident_experts = self.pinned_experts = self.expert_folder = None
        super().save_pretrained(save_directory, **kwargs)
        self.max_resident_experts, self.pinned_experts, self.expert_folder = here
        self.base_model_name_or_path = reference

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, verify_files: bool = True, **kwargs: Any
    ) -> Any:
        """Read a saved configuration, as PEFT does before it loads an adapter.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            subfolder: in it.
            verify_files: compare the adapter's files with their checksums, where the folder is at hand.
            **kwargs: as PEFT takes them.

        Raises:
            AdapterError: the file is damaged or of a newer format, or the adapter's files are not what was written.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not (folder / CONFIG_FILE).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        finish_replacing(folder)
        read_raw_config(folder)
        if verify_files:
            FileCheck(folder, None).finish()
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ConfigError, ValueError, TypeError) as fault:
            if isinstance(fault, AdapterError):
                raise
            raise AdapterError(f"{folder / CONFIG_FILE} cannot be used: {fault}") from fault

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse a saved configuration that this version cannot read (called by PEFT with the raw file).

        Raises:
            AdapterError: a newer format, or fields that are not known.
        """
        own = {item.name for item in fields(MediatorSettings)}
        return check_saved(kwargs, own, {item.name for item in fields(cls)} - own)
