"""Writing a mix into a layer's weight for a while, and taking it out again bit for bit."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bank import kernels
from ..bank.layer_bank import LayerBank, as_array
from ..bank.packing import unpack_bits

Mix = tuple[tuple[str, float], ...]


class _Saved(NamedTuple):
    """What a fold overwrote."""

    mix: Mix
    mask: Tensor
    """(O, ceil(I / 8)) uint8, the union of the mixed deltas' masks."""

    weight: Tensor
    """(num_changed,) what stood there."""

    bias: Tensor | None


def plain_weight(base_layer: nn.Linear) -> Tensor:
    """The layer's weight as (O, I); a view, also of ``Conv1D``."""
    weight = base_layer.weight.data
    return weight.T if isinstance(base_layer, Conv1D) else weight


def mixed_delta(bank: LayerBank, mix: Mix) -> Tensor | None:
    """``sum_k w_k S_k`` as a plain matrix (O, I) float32; None where no column of the mix has a delta."""
    total: Tensor | None = None
    for name, weight in mix:
        packed = bank.packed(name) if kernels.has_compiled() else None
        if packed is not None:
            total = torch.zeros(bank.shape) if total is None else total
            kernels.add_to(total.numpy(), packed, weight)
        elif (delta := bank.get(name)) is not None:
            dense = delta.dense().mul_(weight)
            total = dense if total is None else total.add_(dense)
    return total


def mixed_bias(bank: LayerBank, mix: Mix) -> Tensor | None:
    """``sum_k w_k b_k`` of the biases' deltas, (O,) float32; None where there are none."""
    total: Tensor | None = None
    for name, weight in mix:
        delta = bank.get(name)
        if delta is not None and delta.bias is not None:
            total = delta.bias * weight if total is None else total + delta.bias * weight
    return total


def mixed_weight(weight: Tensor, bank: LayerBank, mix: Mix) -> Tensor:
    """``D + sum_k w_k S_k``, summed in float32 and rounded once; (O, I) in the dtype of ``weight``."""
    delta = mixed_delta(bank, mix)
    return weight if delta is None else delta.add_(weight).to(weight.dtype)


class Fold:
    """The state of one layer's weight: plain, or with one mix written into it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        self._base_layer = base_layer
        self._saved: _Saved | None = None

    @property
    def mix(self) -> Mix:
        """What is folded in now; empty for nothing."""
        return self._saved.mix if self._saved else ()

    def switch(self, bank: LayerBank | None, mix: Mix) -> None:
        """Fold ``mix`` in, after taking out what was there. An empty mix restores the backbone."""
        if mix == self.mix:
            return
        self._restore()
        if mix and bank is not None:
            self._write(bank, mix)

    def _write(self, bank: LayerBank, mix: Mix) -> None:
        masks = [delta.mask for name, _ in mix if (delta := bank.get(name)) is not None]
        if not masks:
            return
        weight = plain_weight(self._base_layer)
        mask = reduce(torch.bitwise_or, masks)
        changed = unpack_bits(mask, bank.shape[1])
        bias_delta = mixed_bias(bank, mix)
        bias = None if bias_delta is None else self._base_layer.bias.data.clone()
        # Kept before the first write: an exception in the middle still restores everything.
        self._saved = _Saved(mix, mask, weight[changed], bias)
        if not self._add_in_place(bank, mix, weight):
            total = mixed_delta(bank, mix)
            if total is not None:
                weight[changed] = (self._saved.weight.float() + total[changed]).to(weight.dtype)
        if bias is not None and bias_delta is not None:
            self._base_layer.bias.data.copy_((bias.float() + bias_delta).to(bias.dtype))

    @staticmethod
    def _add_in_place(bank: LayerBank, mix: Mix, weight: Tensor) -> bool:
        """Fold a single delta by the kernel, which writes to kept entries alone; False where that cannot be done."""
        packed = bank.packed(mix[0][0]) if len(mix) == 1 and weight.device.type == "cpu" else None
        if packed is None or not weight.is_contiguous() or not kernels.has_compiled():
            return False
        kernels.add_to(as_array(weight), packed, mix[0][1])
        return True

    def _restore(self) -> None:
        if self._saved is None:
            return
        weight = plain_weight(self._base_layer)
        weight[unpack_bits(self._saved.mask, weight.shape[1])] = self._saved.weight
        if self._saved.bias is not None:
            self._base_layer.bias.data.copy_(self._saved.bias)
        self._saved = None
