"""Quantised checkpoints, read as the weights that their codes stand for. Formulas in plain torch: no library of the
quantiser and no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..deferred import torch
from ..errors import CheckpointError
from ..storage import BFLOAT16, FLOAT_TYPES, Array, as_array
from .checkpoint import TensorInfo
from .folders import FolderCheckpoint, quantization_method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_RAW_DTYPES = {
    **{code: kind.name for code, kind in FLOAT_TYPES.items()},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
"""safetensors name → torch's."""

# In which order AWQ's kernel lays eight columns into 32 bits, the lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SUPPORTED = ("fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes")

Parts: TypeAlias = "Mapping[str, Tensor]"
"""What belongs to one matrix, by the end of its name: e.g. ``weight`` and ``weight_scale_inv``."""


class DequantizedCheckpoint(FolderCheckpoint):
    """A Hugging Face folder whose ``config.json`` has a ``quantization_config``, seen as a plain model.

    Matrices come in the dtype that the configuration names, or in bfloat16: what a quantised model computes with.

    Raises:
        CheckpointError: as for any folder; or the codes are of a kind that is not known here.
    """

    def __init__(self, folder: Path, label: str, source: str | None = None) -> None:
        self._method: dict[str, Any] = {}
        super().__init__(folder, label, source)
        self._parts = self._group()
        self._last: tuple[str, Tensor] | None = None
        named = str(self._raw_config.get("dtype") or self._raw_config.get("torch_dtype") or "bfloat16")
        kinds = {kind.name: kind for kind in FLOAT_TYPES.values()}
        self._dtype = kinds.get(named.removeprefix("torch."), BFLOAT16)
        hidden = {name for parts in self._parts.values() for name in parts.values()}
        self.tensors = {name: info for name, info in self.tensors.items() if name not in hidden}
        for name, parts in self._parts.items():
            self.tensors[name] = TensorInfo(self._shape(parts), self._dtype)

    def _quantization_faults(self) -> list[str]:
        method = quantization_method(self._raw_config)
        if method is None:
            return []
        known = self._raw_config.get("quantization_config") or self._raw_config.get("compression_config")
        self._method = dict(known) if isinstance(known, dict) else {}
        self._raw_config = {
            key: value
            for key, value in self._raw_config.items()
            if key not in ("quantization_config", "compression_config")
        }
        self._forget_quantization(self._config)
        reason = "" if method in _SUPPORTED else f"{method} is not among {', '.join(_SUPPORTED)}"
        if method == "gptq" and self._method.get("bits") not in (2, 4, 8):
            reason = f"GPTQ with {self._method.get('bits')} bits"
        if method == "awq" and (self._method.get("bits", 4) != 4 or self._method.get("version", "gemm") != "gemm"):
            reason = f"AWQ of version {self._method.get('version')!r} with {self._method.get('bits')} bits"
        return [f"its weights cannot be dequantised here: {reason}. Give the unquantised checkpoint"] if reason else []

    @property
    def config(self) -> PretrainedConfig:
        config = super().config
        self._forget_quantization(config)
        return config

    @staticmethod
    def _forget_quantization(config: object) -> None:
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # type: ignore[attr-defined]

    def _group(self) -> dict[str, dict[str, str]]:
        """Quantised matrices: name of the weight → part → name of the tensor."""
        groups: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            layer, part = _split(name)
            if part:
                groups.setdefault(layer, {})[part] = name
        return {
            f"{layer}.weight": parts
            for layer, parts in groups.items()
            if set(parts) - {"weight"} or self._stored[parts["weight"]][1].dtype not in FLOAT_TYPES
        }

    def _shape(self, parts: Mapping[str, str]) -> tuple[int, ...]:
        """Shape of a dequantised matrix, from the headers where these tell it."""
        shapes = {part: self._stored[name][1].shape for part, name in parts.items()}
        if "qweight" in parts:
            rows, columns = shapes["qweight"]
            per_word = 32 // int(self._method.get("bits", 4))
            is_awq = self._method.get("quant_method") == "awq"
            return (columns * per_word, rows) if is_awq else (columns, rows * per_word)
        if "weight_shape" in parts:
            return tuple(int(length) for length in self._raw(parts["weight_shape"]).tolist())
        state = next((part for part in parts if part.startswith("weight.quant_state")), None)
        if state is not None:
            return tuple(_bnb_state(self._raw(parts[state]))["shape"])
        return shapes["weight"]

    def read_groups(self, name: str, groups: Sequence[tuple[int, int]]) -> Array:
        if name not in self._parts:
            return super().read_groups(name, groups)
        if self._last is None or self._last[0] != name:
            self._last = name, self._dequantized(name)
        return as_array(torch.cat([self._last[1][start:stop] for start, stop in groups or [(0, 0)]]))

    def take_as(self, name: str, source: str) -> None:
        if source in self._parts:
            self._parts[name] = self._parts[source]
            self.tensors[name] = self.tensors[source]
        else:
            super().take_as(name, source)

    def _dequantized(self, name: str) -> Tensor:
        parts = {part: self._raw(tensor) for part, tensor in self._parts[name].items()}
        try:
            weight = _formula(parts)(parts, self._method)
        except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as fault:
            raise CheckpointError(
                f"{self.label} ({self.source}): {name!r} cannot be dequantised: {fault!r}. Give the unquantised "
                "checkpoint."
            ) from fault
        return weight.to(self._dtype.torch).contiguous()

    def _raw(self, name: str) -> Tensor:
        path, stored = self._stored[name]
        dtype = getattr(torch, _RAW_DTYPES[stored.dtype])
        if not stored.num_bytes:
            return torch.empty(stored.shape, dtype=dtype)
        data = np.fromfile(path, np.uint8, stored.num_bytes, offset=stored.offset)
        return torch.from_numpy(data).view(dtype).reshape(stored.shape)


_PARTS = (
    *("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_packed", "weight_shape"),
    *("weight_g_idx", "qweight", "qzeros", "scales", "g_idx", "input_scale", "activation_scale", "SCB"),
    *("weight_format", "input_zero_point", "weight_global_scale", "input_global_scale"),
)


def _split(name: str) -> tuple[str, str]:
    """Layer and part of a tensor's name; no part for what quantising does not touch."""
    layer, found, rest = name.partition(".weight.")
    if found:  # bitsandbytes
        return layer, f"weight.{rest}"
    layer, _, part = name.rpartition(".")
    return (layer, part) if part in _PARTS else (name, "")


def _formula(parts: Parts) -> Callable[[Parts, Mapping[str, Any]], Tensor]:
    if "weight_g_idx" in parts or "weight_global_scale" in parts:
        raise ValueError(f"its parts are {sorted(parts)}")
    if "qweight" in parts:
        return _from_words
    if "weight_packed" in parts:
        return _packed
    if any(part.startswith("weight.") for part in parts):
        return _bnb_4bit
    if "SCB" in parts:
        return _bnb_8bit
    return _scaled


def _scaled(parts: Parts, method: Mapping[str, Any]) -> Tensor:
    """Codes times the scale of their tensor, row, block or group, as in fp8 and compressed-tensors."""
    codes = parts["weight"].float()
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    if "weight_zero_point" in parts:
        codes = codes - _spread(parts["weight_zero_point"].float(), codes.shape, method)
    return codes * _spread(scale.float(), codes.shape, method)


def _spread(scale: Tensor, shape: torch.Size, method: Mapping[str, Any]) -> Tensor:
    """Scales of blocks, one for each entry; blocks at the edges may be cut."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale[:, None]
    block = method.get("weight_block_size")
    for dim, (length, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if count in (1, length):
            continue
        size = int(block[dim]) if block else -(-length // count)
        if -(-length // size) != count:
            raise ValueError(f"{count} scales for {length} entries in blocks of {size}")
        scale = scale.repeat_interleave(size, dim)[(slice(None),) * dim + (slice(length),)]
    return scale


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Words of 32 bits → (*, 32 / bits) numbers, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts) & ((1 << bits) - 1)


def _from_words(parts: Parts, method: Mapping[str, Any]) -> Tensor:
    """GPTQ and AWQ: scale * (code - zero) by groups of inputs; the matrix is stored as (inputs, outputs)."""
    bits, scales = int(method.get("bits", 4)), parts["scales"].float()
    zeros = _unpacked(parts["qzeros"], bits)
    if method.get("quant_method") == "awq":
        order = list(_AWQ_ORDER)
        inverse = [order.index(column) for column in range(len(order))]
        codes = _unpacked(parts["qweight"], bits)[..., inverse].flatten(1)
        zeros = zeros[..., inverse].flatten(1)
        groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    else:
        codes = _unpacked(parts["qweight"].T.contiguous(), bits).flatten(1).T
        zeros = zeros.flatten(1)
        # The first version of the format stores zeros less one, modulo their range.
        if method.get("checkpoint_format", "gptq") == "gptq":
            zeros = (zeros + 1) & ((1 << bits) - 1)
        size = int(method.get("group_size", -1))
        plain = torch.arange(len(codes)) // (size if size > 0 else len(codes))
        groups = parts["g_idx"].long() if "g_idx" in parts else plain
    return ((codes - zeros[groups]).float() * scales[groups]).T


def _packed(parts: Parts, method: Mapping[str, Any]) -> Tensor:
    """compressed-tensors' ``pack-quantized``: signed codes plus half their range, along the inputs."""
    if "weight_zero_point" in parts:
        raise ValueError("packed zero points")
    rows, columns = (int(length) for length in parts["weight_shape"].tolist())
    bits = 32 // -(-columns // parts["weight_packed"].shape[1])
    codes = _unpacked(parts["weight_packed"], bits).flatten(1)[:, :columns] - (1 << (bits - 1))
    return codes.float() * _spread(parts["weight_scale"].float(), torch.Size((rows, columns)), {})


def _bnb_8bit(parts: Parts, method: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' LLM.int8(): codes of a row times its largest magnitude over 127."""
    return parts["weight"].float() * (parts["SCB"].float() / 127)[:, None]


def _bnb_4bit(parts: Parts, method: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' nf4 and fp4: two codes a byte, the upper first; a scale a block, which may be coded itself."""
    state = _bnb_state(parts[next(part for part in parts if part.startswith("weight.quant_state"))])
    packed = parts["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    largest = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
        values = parts["weight.nested_quant_map"].float()[largest.long()]
        largest = values * nested[: len(values)] + float(state["nested_offset"])
    shape = tuple(state["shape"])
    scales = largest.float().repeat_interleave(int(state["blocksize"]))
    count = int(np.prod(shape))
    return (parts["weight.quant_map"].float()[codes[:count]] * scales[:count]).reshape(shape)


def _bnb_state(raw: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(raw.numpy()).decode())
    return state
