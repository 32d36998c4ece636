"""Deltas of all experts of one layer, as buffers that move, save and copy with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import CORRECTION
from ..errors import AdapterError
from ..kernels.dispatch import GroupedProduct, PackedDelta, has_native
from ..methods.encoding import ENCODINGS
from ..methods.encoding.bitmaps import decompress_mask
from ..storage import as_array, to_tensor
from .packed_arrays import BIAS, MASK, SEPARATOR, stored_parts
from .sparse_delta import SparseDelta, full_mask

if TYPE_CHECKING:
    from ..kernels.triton_kernels import DeviceDeltas


@cache
def _kernels_triton() -> Any:
    """The GPU's kernels; None without Triton, where PyTorch's own operations do their work."""
    try:
        from ..kernels import triton_kernels as kernels_triton
    except ImportError:
        return None
    return kernels_triton


class LayerBank(nn.Module):
    """Deltas of one linear layer, by expert name. Buffers, never parameters: nothing here is trained."""

    def __init__(self, shape: tuple[int, int], coding: str, has_bias: bool) -> None:
        super().__init__()
        self.shape = shape
        self.coding = coding
        self.has_bias = has_bias
        self.is_corrected = False
        """Whether the layer's weight is quantised in the manner that the bank's correction is for."""
        self.brought_to: torch.device | None = None
        """Where a delta is brought before it is used, if another device than where all of them lie."""
        self._brought: dict[str, SparseDelta] = {}
        self.stays = False
        """Whether the deltas stay where they lie when the model moves: in an ``ExpertStore``'s files."""
        self._packed: dict[str, PackedDelta] = {}
        self._product: tuple[GroupedProduct | None, Any] = (None, None)
        self._device_deltas: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Experts that have a delta here."""
        suffix = SEPARATOR + MASK
        return [key.removesuffix(suffix) for key in self._buffers if key.endswith(suffix)]

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the tensors that make up one expert's delta."""
        return (MASK, *ENCODINGS[self.coding].part_names, *((BIAS,) if self.has_bias else ()))

    def get(self, name: str) -> SparseDelta | None:
        """One column's delta, where it is used; None where it has none (it is the backbone here).

        The correction is one only for a weight that is quantised in its manner.
        """
        if name == CORRECTION and not self.is_corrected:
            return None
        delta = self._brought.get(name) or self.stored(name)
        if delta is not None and self.brought_to is not None and name not in self._brought:
            self._brought[name] = delta = delta.to(self.brought_to)
        return delta

    def stored(self, name: str) -> SparseDelta | None:
        """One column's delta, where it lies; None where it has none."""
        parts = {part: self._buffers.get(f"{name}{SEPARATOR}{part}") for part in self.part_names}
        mask = parts.pop(MASK)
        if mask is None:
            return None
        if not ENCODINGS[self.coding].has_positions:
            mask = full_mask(self.shape, mask.device)
        bias = parts.pop(BIAS, None)
        return SparseDelta(self.shape, self.coding, mask, {k: v for k, v in parts.items() if v is not None}, bias)

    @property
    def has_loops(self) -> bool:
        """Whether the native kernels can read these deltas as they are packed."""
        return ENCODINGS[self.coding].in_kernels and has_native()

    @property
    def device(self) -> torch.device:
        """Where deltas are used; the CPU for an empty bank."""
        first = next((buffer.device for buffer in self._buffers.values() if buffer is not None), torch.device("cpu"))
        return self.brought_to or first

    @property
    def has_device_loops(self) -> bool:
        """Whether a GPU's kernels can read these deltas as they are packed, where they are now."""
        if self.device.type != "cuda" or self.shape[1] % 32:
            return False
        return ENCODINGS[self.coding].in_kernels and _kernels_triton() is not None

    def on_device(self, names: Sequence[str]) -> DeviceDeltas | None:
        """Some experts' deltas as a GPU's kernels take them; None where none of them has one, or no kernel reads it.

        Args:
            names: in the order of the kernels' coefficients. All of them must have a delta here.
        """
        if not names or not self.has_device_loops:
            return None
        kernels = _kernels_triton()
        for name in names:
            if name not in self._device_deltas:
                self._device_deltas[name] = kernels.DeviceDelta(self.get(name))
        return kernels.DeviceDeltas([self._device_deltas[name] for name in names])

    def packed(self, name: str) -> PackedDelta | None:
        """One expert's delta as the CPU kernels take it, without a copy; None where it has none or lies elsewhere."""
        if name not in self._packed:
            delta = self.get(name)
            if delta is None or delta.mask.device.type != "cpu" or not ENCODINGS[self.coding].in_kernels:
                return None
            # Tensors and not arrays of their memory: that may be moved into shared memory.
            parts: dict[str, Any] = dict(delta.parts)
            self._packed[name] = PackedDelta(delta.mask, self.shape[1], **parts)
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
        held = [*self._packed.values(), *self._device_deltas.values()]
        return sum(delta.offsets.nbytes for delta in held)

    def put(self, name: str, delta: SparseDelta) -> None:
        """Set one expert's delta."""
        for key, tensor in delta_buffers(name, delta).items():
            self.put_part(key, tensor)

    def let_go(self, name: str) -> None:
        """Drop the copy of an expert's delta that was brought to where it is used."""
        self._brought.pop(name, None)
        self._device_deltas.pop(name, None)

    def put_part(self, key: str, tensor: Tensor) -> None:
        """Set one tensor of a delta, under its key ``"expert:part"``."""
        self._forget()
        if key in self._buffers:
            self._buffers[key] = tensor
        else:
            self.register_buffer(key, tensor)

    def remove(self, name: str) -> None:
        """Drop one expert's delta."""
        self._forget()
        for part in self.part_names:
            self._buffers.pop(f"{name}{SEPARATOR}{part}", None)

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        # Deltas never change in place, for copies of the model share them; those of another build have other sizes.
        for key, buffer in list(self._buffers.items()):
            tensor = state_dict.get(prefix + key)
            is_known = tensor is None or buffer is None or tensor.data_ptr() == buffer.data_ptr()
            if not is_known and tensor.device.type != "meta":
                device = tensor.device if buffer.device.type == "meta" else buffer.device
                self.put_part(key, tensor.detach().to(device, buffer.dtype, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, object]) -> LayerBank:
        # Deltas never change in place, so copies of a model share them.
        copy = LayerBank(self.shape, self.coding, self.has_bias)
        copy.is_corrected, copy.brought_to, copy.stays = self.is_corrected, self.brought_to, self.stays
        for key, buffer in self._buffers.items():
            copy.register_buffer(key, buffer)
        memo[id(self)] = copy
        return copy

    def _forget(self) -> None:
        """Drop what was derived from the buffers."""
        self._brought.clear()
        self._packed.clear()
        self._device_deltas.clear()
        self._product = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_brought": {}, "_packed": {}, "_device_deltas": {}, "_product": (None, None)}

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moves between devices are wanted, changes of dtype (model.half()) are not: scales and values keep theirs.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        self._forget()
        if self.stays:
            device = fn(torch.empty(0)).device
            self.brought_to = None if device.type == "cpu" else device
            return self
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer) if buffer.device.type == "meta" else move(buffer)
        return self


def delta_buffers(name: str, delta: SparseDelta) -> dict[str, Tensor]:
    """One expert's delta as a bank's buffers: key → tensor."""
    return {f"{name}{SEPARATOR}{part}": tensor for part, tensor in stored_parts(delta).items()}


def from_disk(key: str, stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """The reverse of ``packed_arrays.to_disk`` for a layer of ``shape`` (O, I).

    Raises:
        AdapterError: the tensor is damaged or belongs to other shapes.
    """
    if stored.ndim != 1:
        raise AdapterError(f"tensor {key!r} of the adapter file has {stored.ndim} dimensions, 1 was expected.")
    if key.endswith(SEPARATOR + MASK):
        if not len(stored):
            return stored
        return to_tensor(decompress_mask(as_array(stored), (shape[0], (shape[1] + 7) // 8), key))
    if key.endswith((SEPARATOR + "scales", SEPARATOR + BIAS)) and len(stored) != shape[0]:
        raise AdapterError(f"tensor {key!r} of the adapter file has {len(stored)} entries, {shape[0]} were expected.")
    if key.endswith(SEPARATOR + "scales"):
        return stored.to(torch.bfloat16, copy=True)
    # A view of the mapped file would hold all of it in memory.
    return stored.clone()


def num_bytes_in_memory(key: str, stored: Tensor, shape: tuple[int, int]) -> int:
    """Bytes of what :func:`from_disk` will give."""
    return shape[0] * ((shape[1] + 7) // 8) if key.endswith(SEPARATOR + MASK) and len(stored) else stored.nbytes


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
        delta = bank.stored(name)
        if delta is None:
            continue
        fault = ENCODINGS[bank.coding].fault(delta.parts, bank.shape, num_kept)
        if fault is not None:
            raise AdapterError(
                f"layer {layer!r}, expert {name!r}: {fault}. The adapter file is damaged; copy or build it again."
            )
