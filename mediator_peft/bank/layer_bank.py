"""All experts' deltas of one layer, as buffers, so that they move, save and copy with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..settings import CORRECTION
from .kernels import GroupedProduct, PackedDelta, as_array, has_compiled
from .packing import compress, decompress
from .sparse_delta import SparseDelta
from .values import VALUES

# Parts of a delta become buffers "expert:part". A colon cannot stand in an expert's name, and unlike a dot it can stand
# in a buffer's.
_SEPARATOR = ":"
_MASK, _BIAS = "mask", "bias"


class LayerBank(nn.Module):
    """Deltas of one linear layer, by expert name. Buffers, never parameters: nothing here is trained."""

    def __init__(self, shape: tuple[int, int], coding: str, has_bias: bool) -> None:
        super().__init__()
        self.shape = shape
        self.coding = coding
        self.has_bias = has_bias
        self.is_corrected = False
        """Whether the layer's weight is quantised in the manner that the bank's correction is for."""
        self._packed: dict[str, PackedDelta] = {}
        self._product: tuple[GroupedProduct | None, Any] = (None, None)

    @property
    def names(self) -> list[str]:
        """Experts that have a delta here."""
        suffix = _SEPARATOR + _MASK
        return [key.removesuffix(suffix) for key in self._buffers if key.endswith(suffix)]

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the tensors that make up one expert's delta."""
        return (_MASK, *VALUES[self.coding].part_names, *((_BIAS,) if self.has_bias else ()))

    def get(self, name: str) -> SparseDelta | None:
        """One expert's delta; None where it has none (it is the backbone here)."""
        parts = {part: self._buffers.get(f"{name}{_SEPARATOR}{part}") for part in self.part_names}
        mask = parts.pop(_MASK)
        if mask is None:
            return None
        bias = parts.pop(_BIAS, None)
        return SparseDelta(self.shape, self.coding, mask, {k: v for k, v in parts.items() if v is not None}, bias)

    @property
    def has_loops(self) -> bool:
        """Whether compiled loops can read these deltas as they are packed."""
        return VALUES[self.coding].in_kernels and has_compiled()

    @property
    def correction(self) -> SparseDelta | None:
        """What every row gets, whatever its expert weights; None unless the weight is quantised."""
        return self.get(CORRECTION) if self.is_corrected else None

    def packed(self, name: str) -> PackedDelta | None:
        """One expert's delta as the CPU kernels take it, without a copy; None where it has none or lies elsewhere."""
        if name not in self._packed:
            delta = self.get(name)
            if delta is None or delta.mask.device.type != "cpu" or not VALUES[self.coding].in_kernels:
                return None
            arrays = {part: as_array(tensor) for part, tensor in delta.parts.items()}
            self._packed[name] = PackedDelta(delta.mask.numpy(), self.shape[1], **arrays)
        return self._packed[name]

    def product(
        self, table: tuple[tuple[float, ...], ...], columns: tuple[str, ...], num_tokens: int
    ) -> GroupedProduct:
        """The kernels' product for one table of expert weights; kept for the next step of the same generation.

        Args:
            table: (B, C) expert weights as plain numbers.
            columns: names of the columns.
            num_tokens: tokens of each row.
        """
        key = (table, columns, num_tokens)
        product, made_for = self._product
        if made_for != key or product is None:
            weights = np.array(table, np.float32)
            active = [
                (packed, np.flatnonzero(weights[:, column]), weights[:, column])
                for column, name in enumerate(columns)
                if weights[:, column].any() and (packed := self.packed(name)) is not None
            ]
            if self.correction is not None and (packed := self.packed(CORRECTION)) is not None:
                active.append((packed, np.arange(len(weights)), np.ones(len(weights), np.float32)))
            tokens = np.arange(num_tokens)
            product = GroupedProduct(
                [packed for packed, _, _ in active],
                [(rows[:, None] * num_tokens + tokens).ravel() for _, rows, _ in active],
                [np.repeat(column[rows], num_tokens) for _, rows, column in active],
            )
            self._product = (product, key)
        return product

    @property
    def num_bytes(self) -> int:
        """Bytes of all deltas in memory."""
        return sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    @property
    def num_derived_bytes(self) -> int:
        """Bytes held beside the deltas for the kernels' use."""
        return sum(packed.offsets.nbytes for packed in self._packed.values())

    def put(self, name: str, delta: SparseDelta) -> None:
        """Set one expert's delta."""
        for key, tensor in delta_buffers(name, delta).items():
            self._put_part(key, tensor)

    def _put_part(self, key: str, tensor: Tensor) -> None:
        self._forget()
        if key in self._buffers:
            self._buffers[key] = tensor
        else:
            self.register_buffer(key, tensor)

    def remove(self, name: str) -> None:
        """Drop one expert's delta."""
        self._forget()
        for part in self.part_names:
            self._buffers.pop(f"{name}{_SEPARATOR}{part}", None)

    def __deepcopy__(self, memo: dict[int, object]) -> LayerBank:
        # Deltas never change in place, so copies of a model share them.
        copy = LayerBank(self.shape, self.coding, self.has_bias)
        copy.is_corrected = self.is_corrected
        for key, buffer in self._buffers.items():
            copy.register_buffer(key, buffer)
        memo[id(self)] = copy
        return copy

    def _forget(self) -> None:
        """Drop what was derived from the buffers."""
        self._packed.clear()
        self._product = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}, "_product": (None, None)}

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moves between devices are wanted, changes of dtype (model.half()) are not: scales and values keep theirs.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        self._forget()
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer) if buffer.device.type == "meta" else move(buffer)
        return self


def delta_buffers(name: str, delta: SparseDelta) -> dict[str, Tensor]:
    """One expert's delta as a bank's buffers: key → tensor."""
    bias = {} if delta.bias is None else {_BIAS: delta.bias}
    return {f"{name}{_SEPARATOR}{part}": tensor for part, tensor in {_MASK: delta.mask, **delta.parts, **bias}.items()}


def to_disk(key: str, tensor: Tensor) -> Tensor:
    """The form in which a buffer of a bank is written: 1-D, bitmaps entropy-coded."""
    return compress(tensor) if key.endswith(_SEPARATOR + _MASK) else tensor.detach().flatten()


def from_disk(key: str, stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """The reverse of :func:`to_disk` for a layer of ``shape`` (O, I).

    Raises:
        AdapterError: the tensor is damaged or belongs to other shapes.
    """
    if stored.ndim != 1:
        raise AdapterError(f"tensor {key!r} of the adapter file has {stored.ndim} dimensions, 1 was expected.")
    if key.endswith(_SEPARATOR + _MASK):
        row_bytes = (shape[1] + 7) // 8
        return decompress(stored, shape[0] * row_bytes, key).reshape(shape[0], row_bytes)
    if key.endswith((_SEPARATOR + "scales", _SEPARATOR + _BIAS)) and len(stored) != shape[0]:
        raise AdapterError(f"tensor {key!r} of the adapter file has {len(stored)} entries, {shape[0]} were expected.")
    return stored


def num_bytes_in_memory(key: str, stored: Tensor, shape: tuple[int, int]) -> int:
    """Bytes of what :func:`from_disk` will give."""
    return shape[0] * ((shape[1] + 7) // 8) if key.endswith(_SEPARATOR + _MASK) else stored.nbytes


def check_parts(bank: LayerBank, layer: str, sizes: Mapping[str, int]) -> None:
    """Refuse a bank whose values do not fit its masks.

    Args:
        bank: as loaded.
        layer: the layer's name, for the message.
        sizes: expert name → number of kept entries.

    Raises:
        AdapterError: numbers of entries and of values differ.
    """
    for name, num_kept in sizes.items():
        delta = bank.get(name)
        if delta is None:
            continue
        for part, expected in VALUES[bank.coding].part_sizes(num_kept).items():
            if len(delta.parts[part]) != expected:
                raise AdapterError(
                    f"layer {layer!r}, expert {name!r}: {len(delta.parts[part])} {part} for {expected} expected. The "
                    "adapter file is damaged; copy or build it again."
                )
