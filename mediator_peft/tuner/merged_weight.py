"""The weight that a routed layer computes with: a mix is written into it for a while, and taken out bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bank.layer_bank import LayerBank
from ..bank.restoring import ComputedBack, KeptEntries, Saved, free_low_bits, has_loops_for
from ..forking import renew_after_fork
from ..kernels import dispatch as kernels
from ..kernels.dispatch import PackedDelta
from .expert_weights import LayerRoute, Mix
from .request_board import RequestBoard


def is_plain(base_layer: nn.Module) -> bool:
    """Whether the weight is an ordinary matrix to be read and written, and is here: not quantised nor offloaded."""
    weight: Any = getattr(base_layer, "weight", None)
    # Subclasses of tensors hold codes, or the part of a matrix that is on this device.
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta":
        return False
    return weight.is_floating_point() and weight.ndim == 2 and weight.dtype.itemsize >= 2


def plain_weight(base_layer: nn.Linear) -> Tensor:
    """The layer's weight as (O, I); a view, also of ``Conv1D``."""
    weight = base_layer.weight.data
    return weight.T if isinstance(base_layer, Conv1D) else weight


def mixed_delta(bank: LayerBank, mix: Mix) -> Tensor | None:
    """``sum_k w_k S_k`` as a plain matrix (O, I) float32; None where no column of the mix has a delta."""
    device = bank.device
    if device.type == "cuda":
        zeros = torch.zeros(bank.shape, device=device)
        if (result := _mixed_on_device(zeros, bank, mix, out=zeros)) is not None:
            return result
    total: Tensor | None = None
    for name, weight in mix:
        packed = bank.packed(name) if bank.has_loops else None
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


def mixed_biases(bank: LayerBank, route: LayerRoute) -> Tensor | None:
    """Each prompt's mix of bias deltas, (B, O) float32; None where there are none."""
    if not bank.has_bias:
        return None
    mixes = [mixed_bias(bank, mix) for _, mix in route.groups]
    known = next((mix for mix in mixes if mix is not None), None)
    if known is None:
        return None
    biases = known.new_zeros(len(route.key), len(known))
    for (rows, _), mix in zip(route.groups, mixes, strict=True):
        if mix is not None:
            biases[slice(None) if rows is None else rows] = mix
    return biases


def mixed_weight(weight: Tensor, bank: LayerBank, mix: Mix) -> Tensor:
    """``D + sum_k w_k S_k``, summed in float32 and rounded once; (O, I) in the dtype of ``weight``."""
    packed = bank.packed(mix[0][0]) if len(mix) == 1 and has_loops_for(weight) else None
    if packed is not None:
        return kernels.added(weight, packed, mix[0][1])
    if (result := _mixed_on_device(weight, bank, mix)) is not None:
        return result
    delta = mixed_delta(bank, mix)
    return weight if delta is None else delta.add_(weight).to(weight.dtype)


def _mixed_on_device(weight: Tensor, bank: LayerBank, mix: Mix, out: Tensor | None = None) -> Tensor | None:
    """The same by a GPU's kernels, into ``out`` if given; None where they cannot."""
    if weight.device.type != "cuda":
        return None
    present = [(name, coefficient) for name, coefficient in mix if bank.get(name) is not None]
    deltas = bank.on_device([name for name, _ in present])
    if deltas is None:
        return None
    coefficients = torch.tensor([coefficient for _, coefficient in present], device=weight.device)
    return deltas.added(weight, coefficients, out)


BLOCK_BYTES = 16 << 20
"""Of a weight that is merged for a product: large enough for matrix products, and most layers have fewer."""

_MOST_SCRATCHES = 2
_scratches: list[Tensor] = []
"""Free ones, at most so many; threads take them out and put them back."""


class BlockMerging:
    """``D + w S`` of one expert for a product: some rows at a time, in memory that is used again.

    Fresh memory for a whole weight costs more than what is written into it: the system clears it page by page.

    Args:
        weight: (O, I) ``D``
        delta: (O, I) ``S``
        coefficient: ``w``
    """

    def __init__(self, weight: Tensor, delta: PackedDelta, coefficient: float) -> None:
        self._weight, self._delta, self._coefficient = weight, delta, coefficient

    def product(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``x (D + w S)^T + bias``, each weight rounded once.

        Args:
            x: (n, I) in the dtype of the weight.
            bias: (O,) or None.
            out: (n, O), written.
        """
        num_rows, num_columns = self._weight.shape
        step = max(16, BLOCK_BYTES // max(1, num_columns * self._weight.itemsize) // 16 * 16)
        size = min(step, num_rows) * num_columns * self._weight.itemsize
        scratch = _take_scratch(size)
        for start in range(0, num_rows, step):
            rows = self._weight[start : start + step]
            block = scratch[: rows.nbytes].view(rows.dtype).view(rows.shape)
            kernels.added(rows, self._delta, self._coefficient, block, start)
            place = out[:, start : start + step]
            if bias is None:
                torch.mm(x, block.T, out=place)
            else:
                torch.addmm(bias[start : start + step], x, block.T, out=place)
        _give_scratch(scratch)


def _take_scratch(size: int) -> Tensor:
    """Bytes of any content."""
    try:
        scratch = _scratches.pop()
    except IndexError:
        scratch = None
    if scratch is None or len(scratch) < size:
        with torch.inference_mode(False):
            scratch = torch.empty(size, dtype=torch.uint8)
    return scratch


def _give_scratch(scratch: Tensor) -> None:
    if len(_scratches) < _MOST_SCRATCHES:
        _scratches.append(scratch)


def block_merging(weight: Tensor, bank: LayerBank, mix: Mix, dtype: torch.dtype) -> BlockMerging | None:
    """A product by some rows at a time, where the native kernels can write them: of one expert's delta on a CPU.

    Args:
        weight: (O, I)
        bank: the layer's deltas.
        mix: of the product.
        dtype: of the product.
    """
    packed = bank.packed(mix[0][0]) if len(mix) == 1 and weight.dtype == dtype and has_loops_for(weight) else None
    return None if packed is None else BlockMerging(weight, packed, mix[0][1])


class MergedWeight:
    """The state of one layer's weight: plain, or with one mix written into it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        self._base_layer = base_layer
        self._saved: Saved | None = None
        self._bias: Tensor | None = None
        self._free_bits: int | None = None
        self.mix: Mix = ()
        """What is folded in now; empty for nothing."""
        self.route: object = None
        """The route that was last settled by this fold: as long as it stays, nothing is to be done for it."""

    @property
    def num_bytes(self) -> int:
        """Bytes held for the way back, beside the bank."""
        return sum(part.num_bytes for part in (self._saved,) if part) + (0 if self._bias is None else self._bias.nbytes)

    def switch(self, bank: LayerBank | None, mix: Mix) -> None:
        """MergedWeight ``mix`` in, after taking out what was there. An empty mix restores the backbone."""
        if mix == self.mix:
            return
        self.route = None
        self._restore()
        if mix and bank is not None:
            self._write(bank, mix)

    def _write(self, bank: LayerBank, mix: Mix) -> None:
        present = [(name, weight, delta) for name, weight in mix if (delta := bank.get(name)) is not None]
        if not present:
            return
        deltas = [delta for _, _, delta in present]
        weight = plain_weight(self._base_layer)
        bias_delta = mixed_bias(bank, mix)
        # The way back is kept before the first write: an exception in the middle still restores everything.
        self.mix = mix
        if bias_delta is not None:
            self._bias = self._base_layer.bias.data.clone()
        packed = bank.packed(present[0][0]) if len(present) == 1 and has_loops_for(weight) else None
        if packed is None:
            self._saved = KeptEntries(weight, reduce(torch.bitwise_or, [delta.mask for delta in deltas]))
            if _mixed_on_device(weight, bank, mix, out=weight) is None:
                weight.copy_(_only_where_changed(weight, mixed_delta(bank, mix)))
        elif not self._write_computed(weight, packed, present[0][1]):
            self._saved = KeptEntries(weight, deltas[0].mask, packed.offsets)
            kernels.add_to(kernels.as_array(weight), packed, present[0][1])
        if self._bias is not None and bias_delta is not None:
            self._base_layer.bias.data.copy_((self._bias.float() + bias_delta).to(self._bias.dtype))

    def _write_computed(self, weight: Tensor, packed: PackedDelta, coefficient: float) -> bool:
        if self._free_bits is None:
            self._free_bits = free_low_bits(weight)
        if not ComputedBack.fits(weight, self._free_bits):
            return False
        self._saved = computed = ComputedBack(packed, coefficient, self._free_bits)
        return computed.add(weight)

    def _restore(self) -> None:
        if self._saved is not None:
            self._saved.restore(plain_weight(self._base_layer))
        if self._bias is not None:
            self._base_layer.bias.data.copy_(self._bias)
        self._saved, self._bias, self.mix = None, None, ()


def _only_where_changed(weight: Tensor, delta: Tensor | None) -> Tensor:
    """``weight + delta``, rounded once; where the delta is 0, every bit of the weight."""
    if delta is None:
        return weight
    return torch.where(delta != 0, (weight.float() + delta).to(weight.dtype), weight)


class MergedWeightCache:
    """``D + S_k`` of some experts of one layer, each a dense copy in the dtype of the backbone's weight."""

    def __init__(self) -> None:
        self.mixes: tuple[Mix, ...] = ()
        self._weights: dict[Mix, Tensor] = {}

    def keep(self, mixes: Sequence[Mix], base_layer: nn.Linear, bank: LayerBank) -> None:
        """Make the weights of these mixes, and drop all others. The backbone's weight must not be folded now."""
        kept = {mix: self._weights[mix] for mix in mixes if mix in self._weights}
        self.mixes, self._weights = tuple(mixes), kept
        for mix in mixes:
            if mix not in kept and any(bank.get(name) is not None for name, _ in mix):
                kept[mix] = mixed_weight(plain_weight(base_layer), bank, mix)

    def drop(self) -> None:
        """Keep nothing."""
        self.mixes, self._weights = (), {}

    def has(self, mix: Mix) -> bool:
        """Whether nothing is left to add for a mix: it is kept, or it is the backbone alone."""
        return not mix or mix in self.mixes

    def weight(self, mix: Mix) -> Tensor | None:
        """The weight (O, I) of a mix, if kept; None where it has no delta here or is not kept."""
        return self._weights.get(mix)

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(weight.nbytes for weight in self._weights.values())


class WeightState:
    """Lock and state of one layer's weight; modules that share the weight share this.

    Args:
        base_layer: has the weight.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        self.lock: Any = threading.RLock()
        """Nobody computes with a weight while somebody else writes to it."""
        self._is_lock_shared = False
        self.merged = MergedWeight(base_layer)
        """The mix that is written into the weight now."""
        self.cached = MergedWeightCache()
        """Whole weights of hot experts beside it."""
        renew_after_fork(self)

    def share_lock(self, lock: Any) -> None:
        """Use the lock of an owner, which renews it after a fork."""
        self.lock, self._is_lock_shared = lock, True

    def locks(self) -> tuple[Any, ...]:
        """What is held at a fork."""
        return () if self._is_lock_shared else (self.lock,)

    def renew_locks(self) -> None:
        """In a forked child."""
        if not self._is_lock_shared:
            self.lock = threading.RLock()

    def restore(self) -> None:
        """Bring the weight back to the backbone's, bit for bit."""
        self.merged.switch(None, ())


def copy_if_in_use(
    state: dict[str, Any], prefix: str, names: Iterable[str], board: RequestBoard, keep_vars: bool
) -> None:
    """In a state dict, put copies in the place of tensors that a mix may be merged into later.

    Args:
        state: key → tensor, changed in place while requests are open.
        prefix: of the keys.
        names: what follows it.
        board: of the model.
        keep_vars: the caller wants the parameters themselves.
    """
    if keep_vars or not board.has_requests:
        return
    for name in names:
        if isinstance(state.get(prefix + name), Tensor):
            state[prefix + name] = state[prefix + name].clone()
