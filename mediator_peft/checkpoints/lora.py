"""LoRA adapters as experts: merged into the base weights some rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..deferred import torch
from ..errors import CheckpointError
from ..storage import FLOAT_TYPES, Array, as_array, float_type, to_tensor
from .checkpoint import Checkpoint, TensorInfo
from .headers import Stored, is_lfs_pointer, read_header, read_json
from .patterns import first_matches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PICKLE_ADAPTER_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."

# Settings that change what the factors mean, and that are not folded here.
_REFUSED = {
    "use_dora": "DoRA scales columns by their norm",
    "use_qalora": "QALoRA pools its inputs",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "it changes single tokens",
    "alora_invocation_tokens": "it is active for a part of the prompt only",
    "arrow_config": "it routes by itself",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA scales a diagonal between its factors and truncates the base",
    "monteclora_config": "MonteCLoRA draws its factors from a distribution",
}
# Of those that PEFT turns variants of LoRA on by: what starts or trains the factors only, or is said elsewhere.
_HARMLESS = {
    *("use_rslora", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("runtime_config", *_REFUSED),
}
# These start from factors that are not zero, and change the base's own weights to make up for it.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = 1e9
_MERGE_HINT = "Merge it into its base with merge_and_unload() and give the merged model."


# Where PEFT's own state dict has the adapter's name, which its files leave out.
_DEFAULT_NAME = re.compile(r"(\.lora_[A-Za-z_]+|\.modules_to_save)\.default(?=\.|$)")


def find_lora(folder: Path, label: str) -> Path | None:
    """The folder of an adapter: this one, or the only named one inside, as PEFT saves adapters by name.

    Raises:
        CheckpointError: there are several inside.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    inner = [
        path.parent
        for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
        if path.is_file() and read_json(path).get("peft_type") != "MEDIATOR"
    ]
    if len(inner) > 1:
        names = ", ".join(path.name for path in inner)
        raise CheckpointError(f"{label} ({folder}): it holds several adapters ({names}). Give the folder of one.")
    return inner[0] if inner else None


class _Factors(NamedTuple):
    """One tensor's low-rank change: ``scale * left @ right``, in the layout in which the tensor is stored."""

    left: Tensor
    """(rows, r) float32"""

    right: Tensor
    """(r, columns) float32"""


class _Stacks(NamedTuple):
    """The same for each matrix of a tensor (E, rows, columns)."""

    left: Tensor
    """(E, rows, r) float32"""

    right: Tensor
    """(E, r, columns) float32"""


class LoraCheckpoint(Checkpoint):
    """A folder with a LoRA adapter, seen as the model that merging it into the base gives.

    It knows its tensors once it is bound to a base.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of a kind that cannot be folded.
    """

    folder: Path

    def __init__(self, folder: Path, label: str, source: str, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.label = label
        self.source = source
        self.tensors = {}
        self._base: Checkpoint | None = None
        self._factors: dict[str, _Factors] = {}
        self._stacks: dict[str, _Stacks] = {}
        self._replaced: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}
        self._settings = self._read_settings()
        self._numbers: dict[str, dict[str, Any]] = {}
        self._stored: dict[str, Stored] = {}
        self._state: dict[str, Tensor] = {}
        self.path = folder / ADAPTER_FILE
        if not self.path.is_file() and (folder / PICKLE_ADAPTER_FILE).is_file():
            self.path = folder / PICKLE_ADAPTER_FILE
            self._state = self._read_pickle(allow_pickle)
            return
        try:
            self._stored, _ = read_header(self.path)
        except OSError as fault:
            raise CheckpointError(
                f"{label} ({source}): {ADAPTER_FILE} cannot be read: {fault.strerror or fault}"
            ) from fault
        except ValueError as fault:
            raise CheckpointError(
                f"{label} ({source}): {ADAPTER_FILE} is missing or damaged ({fault}). Save the adapter again, as "
                "safetensors."
            ) from fault

    def _read_pickle(self, allow_pickle: bool) -> dict[str, Tensor]:
        where = f"{self.label} ({self.source})"
        if not allow_pickle:
            raise CheckpointError(
                f"{where}: there is no {ADAPTER_FILE}, but {PICKLE_ADAPTER_FILE}: allow it (allow_pickle=True), or "
                "save the adapter again, as safetensors."
            )
        if is_lfs_pointer(self.path):
            raise CheckpointError(f"{where}: {self.path.name} is a Git LFS pointer: fetch it with `git lfs pull`.")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        except OSError as fault:
            raise CheckpointError(f"{where}: {self.path.name} cannot be read: {fault.strerror or fault}") from fault
        except Exception as fault:  # whatever a damaged pickle may raise
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise CheckpointError(
                f"{where}: {self.path.name} is damaged, or holds more than tensors ({reason})."
            ) from fault

    def _read_settings(self) -> dict[str, Any]:
        where = f"{self.label} ({self.source})"
        try:
            settings = json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as fault:
            raise CheckpointError(f"{where}: {ADAPTER_CONFIG} cannot be read: {fault}") from fault
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            kind = settings.get("peft_type") if isinstance(settings, dict) else None
            raise CheckpointError(f"{where}: an adapter of type {kind!r} cannot be folded, only LORA. {_MERGE_HINT}")
        reasons = [f"{key}: {why}" for key, why in _REFUSED.items() if settings.get(key)]
        unknown = [key for key in settings if key.startswith("use_") or key.endswith("_config")]
        reasons += [f"{key}: not known of LoRA" for key in unknown if settings[key] and key not in _HARMLESS]
        start = str(settings.get("init_lora_weights", "")).lower()
        if start.startswith(_CHANGED_BASE):
            reasons.append(f"init_lora_weights={start!r} changed the base's own weights")
        if reasons:
            raise CheckpointError(f"{where}: this LoRA cannot be folded ({'; '.join(reasons)}). {_MERGE_HINT}")
        faults = list(_number_faults(settings))
        if faults:
            raise CheckpointError(f"{where}: {ADAPTER_CONFIG} is damaged: {'; '.join(faults)}. Save the adapter again.")
        return settings

    @property
    def raw_config(self) -> Mapping[str, Any]:
        return self._bound().raw_config

    @property
    def config(self) -> PretrainedConfig:
        return self._bound().config

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def bind(self, base: Checkpoint, tied: Mapping[str, str], transposed: Container[str] = ()) -> list[str]:
        """Fit the adapter to its base.

        Args:
            base: the model it was trained on.
            tied: names of tensors that only repeat another, and the names of these.
            transposed: tensors of fused experts that are (E, inputs, outputs).

        Returns:
            What does not fit, one message each.

        Raises:
            CheckpointError: the base is an adapter itself, or the patterns of the adapter take too long to match.
        """
        if isinstance(base, LoraCheckpoint):
            raise CheckpointError(base.no_base())
        self._base, self.tensors = base, dict(base.tensors)
        faults: list[str] = []
        read = {self._plain_name(name): self._read(name) for name in (*self._stored, *self._state)}
        modules = {name.rpartition(".lora_")[0] for name in read} - {""}
        parameters = {module: found for module in modules if (found := self._parameters_of(module))}
        self._match_patterns({*modules, *(name for found in parameters.values() for name in found)})
        for name, source in tied.items():
            for saved in {name, source} & read.keys():
                # PEFT saves embeddings with the adapter on request, and where it was unsure whether they were changed.
                if self._is_unchanged(source, read[saved]):
                    del read[saved]
        for name, tensor in read.items():
            module, _, part = name.rpartition(".lora_")
            if not module:
                faults += self._replace(name, tensor)
            elif part in ("A.weight", "embedding_A"):
                other = read.get(f"{module}.lora_{part.replace('A', 'B', 1)}")
                if module in parameters:
                    faults += self._fold_parameter(module, parameters[module], tensor, other, transposed)
                    continue
                faults += self._fold(module, tensor, other, is_embedding=part == "embedding_A")
            elif part == "B.bias":
                faults += self._add_bias(module, tensor)
            elif part in ("B.weight", "embedding_B"):
                if f"{module}.lora_{part.replace('B', 'A', 1)}" not in read:
                    faults.append(f"the factors of {module!r} do not fit together: one of them is missing")
            else:
                faults.append(f"tensor {name!r} is not known of LoRA")
        # Factors that do not fit are missing as well.
        faults = faults or list(self._parameter_faults())
        if tied:
            changed = {*self._factors, *self._replaced}
            shared = sorted(name for name in changed if "embed" in name or "lm_head" in name or "wte" in name)
            if shared:
                faults.append(f"it changes {shared}, which the base ties together. {_MERGE_HINT}")
        return [f"{self.label} ({self.source}): {fault}" for fault in faults]

    def no_base(self) -> str:
        """What is to be said where this adapter is given as a base."""
        named = self._settings.get("base_model_name_or_path")
        hint = f" ({named})" if isinstance(named, str) and named else ""
        return (
            f"{self.label} ({self.source}): it is a LoRA adapter, no whole model. Give the model that it was trained "
            f"on{hint}, or merge the adapter with merge_and_unload() first."
        )

    @staticmethod
    def _plain_name(name: str) -> str:
        return _DEFAULT_NAME.sub(r"\1", name.removeprefix(_PREFIX))

    def _is_unchanged(self, name: str, tensor: Tensor) -> bool:
        info = self._bound().tensors.get(name)
        if info is None or info.shape != tuple(tensor.shape):
            return False
        ours = self._bound().tensor(name)
        return torch.equal(ours.to(tensor.dtype), tensor) or torch.equal(ours, tensor.to(ours.dtype))

    def _match_patterns(self, modules: set[str]) -> None:
        """Find the rank and the alpha that a pattern gives a module: the first that matches decides, as in PEFT."""
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = self._settings.get(key) or {}
            try:
                found = first_matches(list(patterns), sorted(modules))
            except CheckpointError as fault:
                raise CheckpointError(f"{self.label} ({self.source}): {key}: {fault}. {_MERGE_HINT}") from fault
            values = list(patterns.values())
            self._numbers[key] = {module: values[number] for module, number in found.items()}

    def _read(self, name: str) -> Tensor:
        if name in self._state:
            tensor = self._state[name]
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{self.label} ({self.source}): {name!r} is {tensor.dtype}, no plain floating point."
                )
            return tensor
        stored = self._stored[name]
        with open(self.path, "rb") as file:
            file.seek(stored.offset)
            raw = bytearray(file.read(stored.num_bytes))
        kind = FLOAT_TYPES.get(stored.dtype)
        if kind is None:
            raise CheckpointError(f"{self.label} ({self.source}): {name!r} is {stored.dtype}, no plain floating point.")
        return to_tensor(np.frombuffer(raw, kind.array).reshape(stored.shape))

    def _replace(self, name: str, tensor: Tensor) -> list[str]:
        """A tensor of ``modules_to_save``, or a trained bias: it takes the place of the base's."""
        name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        info = self._bound().tensors.get(name)
        if info is None or info.shape != tuple(tensor.shape):
            return [f"tensor {name!r} with shape {list(tensor.shape)} has no counterpart in the base"]
        self._replaced[name] = tensor
        self.tensors[name] = TensorInfo(info.shape, float_type(tensor.dtype))
        return []

    def _fold(self, module: str, a: Tensor, b: Tensor | None, is_embedding: bool) -> list[str]:
        name = f"{module}.weight"
        info = self._bound().tensors.get(name)
        if info is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            return [f"the factors of {module!r} do not fit together, or the base has no such layer"]
        left, right = b.float(), a.float()
        rank = self._by_pattern("rank_pattern", module, self._settings.get("r", a.shape[0]))
        if rank != a.shape[0]:
            return [f"the factors of {module!r} have rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}"]
        if is_embedding or self._settings.get("fan_in_fan_out"):
            left, right = right.T.contiguous(), left.T.contiguous()
        if info.shape != (left.shape[0], right.shape[1]):
            return [
                f"the factors of {module!r} give {[left.shape[0], right.shape[1]]}, the base has {list(info.shape)}"
            ]
        self._factors[name] = _Factors(left * self._scale(module, a.shape[0]), right)
        return []

    def _parameters_of(self, module: str) -> list[str]:
        """What a pair of factors may belong to, where ``target_parameters`` names tensors that are no layer's weight.

        PEFT puts one wrapper around another for each such tensor of a module, and names factors after the wrappers.
        """
        owner = module.replace(".base_layer", "")
        if f"{owner}.weight" in self.tensors:
            return []
        names = [name for name in self.tensors if name.rpartition(".")[0] == owner]
        return [name for name in names if any(_is_target(name, target) for target in self._target_parameters)]

    @property
    def _target_parameters(self) -> list[str]:
        targets = self._settings.get("target_parameters") or []
        return [str(target) for target in targets] if isinstance(targets, list) else [str(targets)]

    def _parameter_faults(self) -> Iterator[str]:
        """What ``target_parameters`` names and no factors change."""
        for target in self._target_parameters:
            names = [name for name in self.tensors if _is_target(name, target)]
            if not names:
                yield f"target_parameters names {target!r}, which the base has not"
            missing = [name for name in names if name not in self._factors and name not in self._stacks]
            if missing:
                yield f"target_parameters names {target!r}, and factors are missing: {missing[0]!r}"

    def _fold_parameter(
        self, module: str, names: Sequence[str], a: Tensor, b: Tensor | None, transposed: Container[str]
    ) -> list[str]:
        r"""Factors of a tensor (E, O, I): A is (E r, I) and B is (O, r E), the expert being the last index of B.

        .. math:: \Delta_e = s B_{:, :, e} A_e

        As PEFT's ``ParamWrapper``; of a tensor (E, I, O) each matrix is the transpose of that.
        """
        fitting: dict[str, _Stacks] = {}
        for name in names:
            shape = self._bound().tensors[name].shape
            shape = (1, *shape) if len(shape) == 2 else shape
            if b is None or len(shape) != 3 or a.shape[0] % shape[0] or b.shape[1] != a.shape[0]:
                continue
            count, rank = shape[0], a.shape[0] // shape[0]
            inner = a.float().reshape(count, rank, -1)
            outer = b.float().reshape(b.shape[0], rank, count).permute(2, 0, 1) * self._scale(name, rank)
            if name in transposed:
                outer, inner = inner.transpose(1, 2), outer.transpose(1, 2)
            fits = (outer.shape[1], inner.shape[2]) == shape[1:]
            if fits and rank == self._by_pattern("rank_pattern", name, self._settings.get("r", rank)):
                fitting[name] = _Stacks(outer.contiguous(), inner.contiguous())
        if len(fitting) != 1:
            what = f"fit {sorted(fitting)} alike" if fitting else f"do not fit {sorted(names)}"
            return [f"the factors of {module!r} {what}. {_MERGE_HINT}"]
        ((name, stacks),) = fitting.items()
        if len(self._bound().tensors[name].shape) == 2:
            self._factors[name] = _Factors(stacks.left[0], stacks.right[0])
        else:
            self._stacks[name] = stacks
        return []

    def _add_bias(self, module: str, bias: Tensor) -> list[str]:
        name = f"{module}.bias"
        if name not in self._bound().tensors:
            return [f"{module!r} gets a bias, which the base has not"]
        self._added[name] = bias.float() * self._scale(module, None)
        return []

    def _scale(self, module: str, rank: int | None) -> float:
        """What PEFT multiplies the product by: alpha / r, or alpha / sqrt(r) for rsLoRA; patterns go first."""
        alpha = self._by_pattern("alpha_pattern", module, self._settings.get("lora_alpha", 8))
        if rank is None:
            rank = self._by_pattern("rank_pattern", module, self._settings.get("r", 8))
        return float(alpha / (rank**0.5 if self._settings.get("use_rslora") else rank))

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        return self._numbers[key].get(module, default)

    def _bound(self) -> Checkpoint:
        assert self._base is not None, "a LoRA must be bound to its base before it is read"
        return self._base

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return None if name in self._replaced else self._factors.get(name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        replaced = self._replaced.get(name)
        stored = self._bound().read_rows(name, start, stop) if replaced is None else as_array(replaced[start:stop])
        factors, bias, stacks = self._factors.get(name), self._added.get(name), self._stacks.get(name)
        if stacks is not None:
            change = stacks.left[start:stop] @ stacks.right[start:stop]
        elif factors is not None:
            change = factors.left[start:stop] @ factors.right
        elif bias is not None:
            change = bias[start:stop]
        else:
            return stored
        rows = to_tensor(stored)
        return as_array((rows.float() + change).to(rows.dtype))

    def read_part(self, name: str, number: int, groups: Sequence[tuple[int, int]]) -> Array | None:
        is_changed = any(name in changes for changes in (self._replaced, self._factors, self._added, self._stacks))
        return None if is_changed else self._bound().read_part(name, number, groups)


def _is_target(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _number_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the numbers by which the product of the factors is scaled, one message each."""
    for key, pattern_key in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = settings.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            yield f"{pattern_key} must be pairs of pattern and number, got {patterns!r}"
            continue
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as fault:
                yield f"{pattern_key} has the pattern {pattern!r}, which cannot be read ({fault})"
        for name, value in ((key, settings.get(key, 1)), *patterns.items()):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
            if not is_number or (key == "r" and (value < 1 or value != int(value))):
                yield f"{name} must be a {'whole ' if key == 'r' else ''}number, got {value!r}"
