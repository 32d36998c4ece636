"""Saving and loading through PEFT's hooks: strict keys, compact tensors, a backbone that can be found again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ..bank.expert_store import ExpertStore, padded_size
from ..bank.layer_bank import check_parts, from_disk, num_bytes_in_memory
from ..bank.packed_arrays import all_to_disk, written
from ..checkpoints.adapter_files import (
    BANK_ATTRIBUTE,
    CONFIG_FILE,
    MODEL_PREFIX,
    ROUTER_ATTRIBUTE,
    ROUTER_PREFIX,
    backbone_of,
    give_usual_mode,
)
from ..checkpoints.backbone_files import BackboneFiles
from ..checkpoints.checksums import CARD, Checksums, adapter_checksums, backbone_checksums, put_checksums
from ..checkpoints.fingerprint import (
    check_fingerprint,
    difference_from_files,
    difference_from_sample,
    fingerprint_of,
    holds_numbers,
)
from ..checkpoints.output_folder import copy_side_files, write_model_config
from ..checkpoints.replacing import final_place, replaced_together
from ..checkpoints.tensor_inventory import outline_like, tied_names
from ..errors import AdapterError, UnsupportedError
from ..merge.model_card import model_card
from ..merge.tensor_work import deltas_stored
from ..methods.encoding.bitmaps import count_bits
from ..routing.routers import Router
from ..storage import FLOAT32, FLOAT_TYPES, Array, FloatType, as_array, to_tensor
from .config import FitSettings, MediatorConfig
from .layer import MediatorLayer, reading_weights, routed_layers
from .merged_weight import is_plain
from .offloaded import fetched
from .quantized import device_of, lay_out_plainly

BACKBONE_FOLDER = "backbone"
_SETTINGS_KEY = f"{ROUTER_PREFIX}fit_settings"
_WRITES_FILES: ContextVar[bool] = ContextVar("writes_files", default=False)
_LISTED = 5


@contextmanager
def writing_files() -> Iterator[None]:
    """Tensors of adapters that are taken inside the block are for files, with the configuration beside them."""
    token = _WRITES_FILES.set(True)
    try:
        yield
    finally:
        _WRITES_FILES.reset(token)


class AdapterFiles:
    """What PEFT saves and loads of a model's adapters, and where their backbone lies.

    Args:
        model: the wrapped model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.backbone_path: str | None = None
        """Folder or hub id of the backbone; None until it is known or written."""
        self._known_checksums: Checksums | None = None
        """Of the backbone's files, where they are known."""
        self._saved_checksums: Checksums | None = None
        """Of the backbone that the save at hand has written."""
        self._takes_along = False
        self._hook = model.register_state_dict_pre_hook(_before_saving)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    @staticmethod
    def saved_tensors(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, settings: FitSettings
    ) -> dict[str, Tensor]:
        """One adapter's tensors of a model's state dict, in the form of an adapter file.

        Args:
            model: the model; what accelerate has offloaded is fetched from its hooks.
            state_dict: of the model.
            adapter_name: PEFT's name of the adapter.
            settings: of its router. They go along as a tensor, but not into files: these have the configuration beside.

        Raises:
            UnsupportedError: a tensor is offloaded in another way.
        """
        wanted = (f".{BANK_ATTRIBUTE}.{adapter_name}.", f"{ROUTER_ATTRIBUTE}.{adapter_name}.")
        found: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Array]] = {}
        for key, tensor in state_dict.items():
            if wanted[0] in key:
                layer, _, buffer = key.partition(wanted[0])
                layers.setdefault(layer, {})[buffer] = as_array(fetched(model, key, tensor).cpu())
                found[key] = tensor
            elif wanted[1] in key:
                found[key] = fetched(model, key, tensor).detach().flatten()
        for layer, buffers in layers.items():
            found |= {f"{layer}{wanted[0]}{key}": to_tensor(array) for key, array in all_to_disk(buffers).items()}
        if not _WRITES_FILES.get():
            found[_SETTINGS_KEY] = torch.tensor(list(json.dumps(settings._asdict()).encode()), dtype=torch.uint8)
        return found or {f"empty.{adapter_name}": torch.zeros(0)}

    @staticmethod
    def fit_settings(state_dict: dict[str, Tensor]) -> FitSettings | None:
        """What :meth:`saved_tensors` added for the router, taken out of the tensors; None for those of a file.

        Raises:
            AdapterError: it is damaged.
        """
        stored = state_dict.pop(_SETTINGS_KEY, None)
        if stored is None:
            return None
        try:
            return FitSettings(**json.loads(bytes(stored.tolist())))
        except (ValueError, TypeError) as fault:
            raise AdapterError(f"tensor {_SETTINGS_KEY!r} holds no settings of a router: {fault}") from fault

    def load(
        self, config: PeftConfig, router: Router, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], ExpertStore | None]:
        """Check everything of an adapter file and put its tensors into the model.

        Args:
            config: the adapter's settings.
            router: the adapter's router; gets the stored state, if there is one.
            adapter_name: PEFT's name of the adapter.
            state_dict: tensors of the adapter file.

        Returns:
            The same tensors under the model's names, and the store that holds the deltas, if their number is limited.

        Raises:
            AdapterError: tensors are missing, unknown or damaged.
            BackboneMismatchError: the model is not the backbone the adapter was built on.
        """
        if not isinstance(config, MediatorConfig):
            raise AdapterError(f"a Mediator adapter needs a MediatorConfig, got {type(config).__name__}.")
        self.check_backbone(config)
        layers = routed_layers(self._model)
        _check_keys(config, layers, adapter_name, set(state_dict))
        loaded: dict[str, Tensor] = {}
        store = _store(config, layers, adapter_name, state_dict)
        for name, layer in layers.items():
            if adapter_name in layer.mediator_bank:
                loaded.update(_load_layer(name, layer, adapter_name, deltas_stored(config), state_dict, store))
        if store is not None:
            store.release()
        stored = {
            key.removeprefix(ROUTER_PREFIX): value for key, value in state_dict.items() if key.startswith(ROUTER_PREFIX)
        }
        for key, tensor in stored.items():
            check_numbers(f"router tensor {key!r}", tensor)
        if stored:
            for key, tensor in router.load_flat(stored).items():
                loaded[f"{ROUTER_PREFIX}{adapter_name}.{key}"] = tensor
            for parameter in router.parameters():
                parameter.requires_grad_(not config.inference_mode)
            router.to(next(self._model.parameters()).device)
        return loaded, store

    def check_backbone(self, config: MediatorConfig) -> None:
        """Compare the model at hand with the fingerprint of the backbone that an adapter was built on.

        Raises:
            BackboneMismatchError: it is another one.
        """
        coded = _coded_weights(self._model)
        expected = {name: known for name, known in (config.backbone_fingerprint or {}).items() if name not in coded}
        with reading_weights(self._model):
            check_fingerprint(expected, backbone_state(self._model), "the model at hand")

    def before_saving(self, folder: Path, config: MediatorConfig) -> None:
        """Before PEFT writes the configuration: make sure of the backbone, and write the card."""
        give_usual_mode(folder)
        with reading_weights(self._model):
            config.base_model_name_or_path = self._backbone_reference(folder, config)
        (folder / CARD).write_text(model_card(config, report=None), encoding="utf-8")

    def finish_saving(self, fresh: Path, folder: Path) -> None:
        """After PEFT has written: checksums of the new files, and a card that is there already stays.

        Args:
            fresh: where the new files are.
            folder: where they will be.
        """
        for config in fresh.rglob(CONFIG_FILE):
            adapter = config.parent
            known = self._saved_checksums if self._saved_checksums is not None else self._known_checksums
            put_checksums(adapter, adapter_checksums(adapter, known))
        for card in fresh.rglob(CARD):
            # What a person wrote into it must not be lost.
            if (folder / card.relative_to(fresh)).exists():
                card.unlink()

    def know_backbone(self, path: str, checksums: Checksums | None) -> None:
        """Say where the backbone lies, so that ``save_pretrained`` need not write it.

        Args:
            path: folder or hub id.
            checksums: of its files; None where they are not known.
        """
        self.backbone_path, self._known_checksums = path, checksums

    @contextmanager
    def taking_backbone_along(self) -> Iterator[None]:
        """Within the block, what is saved includes the backbone, unless that is on the hub."""
        self._takes_along = True
        try:
            yield
        finally:
            self._takes_along = False

    def _backbone_reference(self, folder: Path, config: MediatorConfig) -> str:
        """Where the saved adapter will find its backbone; written beside it where it lies nowhere else."""
        self._saved_checksums = None
        known, place = self.backbone_path, final_place(folder)
        if known is None and config.base_model_name_or_path:
            # PEFT loaded the adapter around a model that somebody else had loaded: from here, as it seems.
            known = backbone_of(place, config.base_model_name_or_path)
        if known is None and config.merge_method == "base":
            known = getattr(self._model.config, "_name_or_path", None) or None
        if known is not None and (change := self._change_of_backbone(known, config)) is not None:
            if self.backbone_path is not None:
                warnings.warn(
                    f"the backbone is no longer that of {known!r} ({change}); it is saved with the adapter.",
                    stacklevel=2,
                )
            return self._write_backbone(folder, config, known)
        if known is not None and not Path(known).is_dir():
            return known
        if known is not None and not self._takes_along:
            return portable_reference(Path(known), place)
        return self._write_backbone(folder, config, known)

    def _change_of_backbone(self, known: str, config: MediatorConfig) -> str | None:
        """What differs between the backbone in memory and that in its folder; None where nothing does."""
        coded = _coded_weights(self._model)
        state = {name: tensor for name, tensor in backbone_state(self._model).items() if name not in coded}
        if Path(known).is_dir():
            return difference_from_files(state, Path(known), outline_like(self._model))
        expected = {name: kept for name, kept in (config.backbone_fingerprint or {}).items() if name not in coded}
        return difference_from_sample(state, expected)

    def _write_backbone(self, folder: Path, config: MediatorConfig, known: str | None) -> str:
        """The backbone beside the adapter, or for a checkpoint of a training run beside all checkpoints."""
        refuse_quantized(self._model)
        place = final_place(folder)
        if not place.name.startswith("checkpoint-") or self._takes_along:
            self._fill_backbone(folder / BACKBONE_FOLDER, config, known)
            target = place / BACKBONE_FOLDER
        else:
            # Checkpoints of a training run come and go, and share one backbone that stands beside them.
            target = place.parent / BACKBONE_FOLDER
            with replaced_together(place.parent) as fresh:
                self._fill_backbone(fresh / BACKBONE_FOLDER, config, known)
        if not self._takes_along:
            self.backbone_path, self._known_checksums = str(target.resolve()), self._saved_checksums
        return portable_reference(target, place)

    def _fill_backbone(self, folder: Path, config: MediatorConfig, known: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if known is not None and Path(known).is_dir():
            copy_side_files(Path(known), folder)
        self._write_live_backbone(folder, config)
        self._saved_checksums = backbone_checksums(folder)

    def _write_live_backbone(self, folder: Path, config: MediatorConfig) -> None:
        # It writes settings as they are in memory.
        save_backbone(self._model, folder, config)
        state = {name: tensor.to(storage_type(config).torch) for name, tensor in backbone_state(self._model).items()}
        if difference_from_sample(state, config.backbone_fingerprint or {}) is not None:
            config.backbone_fingerprint = fingerprint_of({name: state[name] for name in _own_parameters(self._model)})


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    lay_out_plainly(module)


def portable_reference(backbone: Path, folder: Path) -> str:
    """A relative path where adapter and backbone lie in one tree, so that both can be moved together."""
    backbone, folder = backbone.resolve(), folder.resolve()
    if folder.is_relative_to(backbone) or backbone.is_relative_to(folder):
        return os.path.relpath(backbone, folder)
    return str(backbone)


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the backbone under their own names, whatever wraps its layers.

    Parameters and the buffers that a checkpoint keeps. They are the model's own: read them inside ``reading_weights``.
    """
    return _own_parameters(model) | _kept_buffers(model)


def _own_parameters(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): parameter.data for name, parameter in named}


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of the backbone: no deltas, and no codes of quantised layers."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if BANK_ATTRIBUTE not in name.split(".") and not hasattr(module, "out_features")
        for key, tensor in module._buffers.items()
        if tensor is not None and key not in module._non_persistent_buffers_set
    }


def _coded_weights(model: Any) -> set[str]:
    """Names of weights of which a quantised model holds codes alone, or numbers that were made of codes."""
    settings: Any = getattr(model.config, "quantization_config", None)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "out_features")}
    if settings is None:
        # Another library may have put its layers in without saying so in the configuration.
        layers = {name: layer for name, layer in layers.items() if not _has_own_weight(layer)}
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    # It decompresses layers in their first forward pass.
    are_numbers = str(getattr(method, "value", method)) == "compressed-tensors"
    return {
        f"{name.removesuffix('.base_layer')}.weight"
        for name, layer in layers.items()
        if not isinstance(layer, MediatorLayer) and (are_numbers or not is_plain(layer))
    }


def _has_own_weight(layer: nn.Module) -> bool:
    """Whether a layer's weight is an ordinary tensor, wherever it lies."""
    return type(getattr(layer, "weight", None)) in (Tensor, nn.Parameter)


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a backbone that cannot be written as ordinary numbers.

    Raises:
        UnsupportedError: it is quantised, or parts of it are not in memory.
    """
    # Codes in buffers have no entry in the state.
    odd = sorted(_coded_weights(model))
    odd += [name for name, tensor in backbone_state(model).items() if not holds_numbers(tensor)]
    if odd:
        raise UnsupportedError(
            f"the backbone has to be saved with the adapter, and {odd[0]!r} is quantised or offloaded. Load the "
            "backbone from its folder as it is (load_mediator) and save that, or say where its unquantised files lie: "
            "model.set_backbone(folder)."
        )


def storage_type(config: MediatorConfig) -> FloatType:
    """What a backbone is rounded to in its files."""
    named = str((config.provenance or {}).get("storage_dtype", "float32"))
    return next((kind for kind in FLOAT_TYPES.values() if kind.name == named), FLOAT32)


def save_backbone(model: Any, folder: Path, config: MediatorConfig) -> None:
    """Write the backbone as an ordinary checkpoint, in the dtype it was rounded to."""
    stored = storage_type(config)
    tied = tied_names(model)
    state = {name: tensor.to(stored.torch) for name, tensor in backbone_state(model).items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    files = BackboneFiles(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, stored)
    files.create()
    for name, tensor in state.items():
        files.put(name, as_array(tensor.cpu()))
    files.close()
    write_model_config(folder, model.config, stored)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


_BYTES = ("mask", "signs", "codes")
_NUMBERS = ("scales", "bias", "values", "left", "right", "absmax")


def check_kind(key: str, layer: str, tensor: Tensor) -> None:
    """Refuse a part of a delta that holds other numbers than such a part can hold.

    Raises:
        AdapterError: it is of another dtype, or holds NaN or infinite values.
    """
    what = f"layer {layer!r}, part {key!r}"
    part = key.rpartition(":")[2]
    # Encodings of other packages may have parts of any kind.
    if part in _NUMBERS or (part not in _BYTES and tensor.is_floating_point()):
        check_numbers(what, tensor)
    elif part in _BYTES and tensor.dtype != torch.uint8:
        raise AdapterError(f"{what} of the adapter file holds {tensor.dtype}, bytes were expected: it is damaged.")


def check_numbers(what: str, tensor: Tensor) -> None:
    """Refuse what are no finite floating-point numbers.

    Raises:
        AdapterError: they are not.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise AdapterError(
            f"{what} of the adapter file holds {tensor.dtype}, which is of the wrong type: it is damaged."
        )
    if tensor.device.type != "meta" and not tensor.isfinite().all():
        raise AdapterError(f"{what} of the adapter file holds NaN or infinite values: it is damaged.")


def _check_keys(
    config: MediatorConfig, layers: Mapping[str, MediatorLayer], adapter_name: str, present: set[str]
) -> None:
    expected = set()
    for name in config.routed_modules or ():
        for column in deltas_stored(config):
            for part in layers[name].bank(adapter_name).part_names:
                expected.add(f"{MODEL_PREFIX}{name}.{BANK_ATTRIBUTE}.{column}:{part}")
    present = {key for key in present if not key.startswith(ROUTER_PREFIX) and key != "empty"}
    missing, extra = sorted(expected - present), sorted(present - expected)
    faults = []
    for what, keys in (("lacks", missing), ("has unknown", extra)):
        if keys:
            more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            faults.append(f"{what} tensors {', '.join(keys[:_LISTED])}{more}")
    if faults:
        raise AdapterError(f"the adapter file {'; it '.join(faults)}. Copy or build the adapter again.")


def _store(
    config: MediatorConfig, layers: Mapping[str, MediatorLayer], adapter_name: str, state_dict: dict[str, Tensor]
) -> ExpertStore | None:
    """Room on disk for the deltas, where the configuration limits how many experts are in memory."""
    if config.max_resident_experts is None:
        return None
    sizes = dict.fromkeys(deltas_stored(config), 0)
    for name, layer in layers.items():
        read = _reader(state_dict, name)
        for column in sizes:
            for part in layer.bank(adapter_name).part_names:
                key = f"{column}:{part}"
                _, stored = written(key, name, read)
                sizes[column] += padded_size(num_bytes_in_memory(key, stored, layer.shape))
    folder = None if config.expert_folder is None else Path(config.expert_folder)
    store = ExpertStore(config.max_resident_experts, folder, _pinned(config))
    store.make_room(sizes)
    return store


def _reader(state_dict: Mapping[str, Tensor], layer: str) -> Callable[[str], Tensor | None]:
    """Name of a buffer of a layer's bank → what an adapter file holds under it."""
    prefix = f"{MODEL_PREFIX}{layer}.{BANK_ATTRIBUTE}."
    return lambda key: state_dict.get(prefix + key)


def _pinned(config: MediatorConfig) -> list[str]:
    """Stored columns of the experts that stay in memory."""
    names = list(config.pinned_experts or ())
    if config.column_map is None:
        return names
    return [stored for stored, row in config.column_map.items() if any(name in row for name in names)]


def _load_layer(
    name: str,
    layer: MediatorLayer,
    adapter_name: str,
    columns: Sequence[str],
    state_dict: dict[str, Tensor],
    store: ExpertStore | None,
) -> dict[str, Tensor]:
    bank = layer.bank(adapter_name)
    device = device_of(layer.base_layer)
    read, loaded_prefix = _reader(state_dict, name), f"{MODEL_PREFIX}{name}.{BANK_ATTRIBUTE}.{adapter_name}."
    loaded: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for column in columns:
        for part in bank.part_names:
            key = f"{column}:{part}"
            place, stored = written(key, name, read)
            check_kind(key, name, stored)
            if store is not None:
                tensor = store.keep(column, from_disk(key, stored, layer.shape))
            elif place in held:
                # What several experts have in common is held once.
                tensor = held[place]
            else:
                tensor = from_disk(key, stored, layer.shape)
                tensor = held[place] = tensor if device.type == "meta" else tensor.to(device)
            bank.put_part(key, tensor)
            loaded[f"{loaded_prefix}{key}"] = tensor
    deltas = {column: bank.stored(column) for column in columns}
    if store is not None:
        bank.stays, bank.brought_to = True, None if device.type in ("cpu", "meta") else device
    check_parts(bank, name, {column: count_bits(delta.mask) for column, delta in deltas.items() if delta is not None})
    return loaded
