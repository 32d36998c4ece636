"""Forward passes of a routed layer: three ways to compute ``(D + sum_k w_k(x) S_k) x``, and steps that repeat one.

Each way equals the plain dense formula.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..bank.layer_bank import LayerBank
from ..bank.sparse_delta import SparseDelta
from ..config import warn_of_old_name
from ..errors import ConfigError, UnsupportedError
from ..methods.encoding import ENCODINGS
from .differentiable import mixed_output
from .expert_weights import LayerRoute
from .merged_weight import (
    MergedWeightCache,
    WeightState,
    block_merging,
    is_plain,
    mixed_bias,
    mixed_biases,
    mixed_delta,
    mixed_weight,
)
from .quantized import quantization_of, readable_weight
from .request_board import RequestBoard

EXECUTIONS = ("merged", "sparse", "dense")
_OLD_EXECUTIONS = {"fold": "merged", "densify": "dense"}

DENSE_TOKENS = 16
"""From this many tokens a group on, a scratch weight and a dense product beat the packed kernels on a CPU."""


DENSE_CODE_TOKENS = 192
"""The same where the weight is in 4 bits: it must be read out of its codes for every pass."""

MOST_ROWS = 16
"""Up to this many rows a loop that reads each weight once beats a general matrix product, which repacks it first."""

MOST_DEVICE_ROWS = 64
"""The same for a GPU, where the loop adds to a general product."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_execution(execution: str | None) -> str | None:
    """Refuse an unknown way of applying deltas.

    Raises:
        ConfigError: it is none of ``EXECUTIONS``.
    """
    if execution in _OLD_EXECUTIONS:
        warn_of_old_name(execution, _OLD_EXECUTIONS[execution])
        execution = _OLD_EXECUTIONS[execution]
    if execution is not None and execution not in EXECUTIONS:
        raise ConfigError(f"unknown execution {execution!r}; choose one of {list(EXECUTIONS)}, or None to let us pick.")
    return execution


def choose(x: Tensor, route: LayerRoute, base_layer: nn.Linear, bank: LayerBank, kept: MergedWeightCache) -> str:
    """Which way to go for one forward pass of one layer."""
    if route.is_differentiable:
        return "sparse"
    num_rows = x.numel() // x.shape[-1]
    uniform, kind = len(route.groups) == 1, None if is_plain(base_layer) else quantization_of(base_layer)
    # A dense product with a weight of its own does not call the base layer, so what watches that would see nothing.
    is_watched = bool(base_layer._forward_hooks or base_layer._forward_pre_hooks)
    # Whole weights are more to read than packed deltas: on a CPU they pay off for one expert, or for many tokens.
    reads_whole = uniform or x.device.type != "cpu" or num_rows >= DENSE_TOKENS * len(route.groups)
    may_keep = bool(kept.mixes) and reads_whole and route.execution is None and not is_watched
    if may_keep and all(kept.has(group.mix) for group in route.groups):
        return "dense"
    # Codes cannot take a delta: rounding the sum again would lose it.
    if uniform and kind is None and route.may_merge and route.execution in (None, "merged"):
        return "merged"
    if kind == "other" or is_watched or route.is_sharded:
        # Offloaded, codes that we cannot read, watched, or here for this pass alone.
        return "sparse"
    if route.execution in ("sparse", "dense"):
        return route.execution
    if kind == "int8":
        # Its product rounds the inputs; with its numbers alone, an answer would depend on how long the batch is.
        return "sparse"
    # A dense product costs the same for one token as for a few; building its weight is what must pay off.
    if x.device.type == "cuda":
        if num_rows <= MOST_DEVICE_ROWS and bank.has_device_loops:
            return "sparse"
        # Unpacking is what costs: each mix once, or each expert once.
        return "sparse" if len(route.groups) > len(route.columns) else "dense"
    tokens_a_group = num_rows / len(route.groups)
    if x.device.type == "cpu" and bank.has_loops:
        pays_off_from = DENSE_TOKENS if kind is None else DENSE_CODE_TOKENS
    else:
        pays_off_from = ENCODINGS[bank.coding].product_tokens
    return "sparse" if tokens_a_group < pays_off_from else "dense"


def is_hooked(module: nn.Module) -> bool:
    """Whether anything watches or replaces the forward passes of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or "forward" in module.__dict__  # as Accelerate does it
    )


class LayerSteps:
    """Forward passes of one module, of which a step goes on as the last one went where it may.

    Args:
        state: of the weight that the module computes with.
        board: of the model.
    """

    def __init__(self, state: WeightState, board: RequestBoard) -> None:
        self._state, self._board = state, board
        self.short_way: ShortWay | None = None
        """What was kept for further steps under one route."""

    def next(self, x: Tensor, base_layer: Any, route: LayerRoute) -> Tensor | None:
        """A forward pass that goes on as the last one went; None where it cannot.

        Args:
            x: (B, ..., I), or (B * T, I) where a model flattens its batch.
            base_layer: the backbone's layer.
            route: of this pass.

        Returns:
            (B, ..., O) or (B * T, O)
        """
        state = self._state
        with state.lock:
            if state.merged.route is route:
                if type(base_layer) is not nn.Linear or is_hooked(base_layer):
                    return base_layer(x)
                parameters = base_layer._parameters
                return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
            short_way = self.short_way
            if short_way is not None and short_way.route is route and short_way.is_for(x):
                state.restore()
                return short_way(x)
        return None

    def first(
        self, x: Tensor, base_layer: Any, bank: LayerBank | None, route: LayerRoute | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A forward pass that could not go on as the last one went; the caller holds the lock.

        Args:
            x: as in :meth:`next`.
            base_layer: the backbone's layer.
            bank: the active adapter's deltas of the layer; None where it has none.
            route: of this pass; None for the backbone alone.
            *args: for a base layer without deltas.
            **kwargs: likewise.

        Raises:
            UnsupportedError: the deltas were offloaded.
        """
        state = self._state
        if route is None or bank is None:
            state.restore()
            return base_layer(x, *args, **kwargs)
        route = self._board.as_readers_allow(route)
        if bank.device.type == "meta":
            raise UnsupportedError(
                "the deltas of this layer were offloaded. Offload without buffers (offload_buffers=False), and limit "
                "their memory with load_mediator(max_resident_experts=...)."
            )
        way = choose(x, route, base_layer, bank, state.cached)
        self.short_way = _short_way(way, x, base_layer, bank, route, state.cached)
        if self.short_way is not None:
            state.restore()
            return self.short_way(x)
        return _apply(way, x, base_layer, bank, route, state)


def _short_way(
    way: str, x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute, kept: MergedWeightCache
) -> ShortWay | None:
    """The short way of computing such batches under this route, kept for the next step; None where it is not open."""
    if way == "dense" and WholeWeight.fits(x, route, kept):
        _split_rows(x, len(route.expert_weights))
        return WholeWeight(base_layer, bank, route, kept)
    if way != "sparse" or not any(group.mix for group in route.groups):
        return None
    if not route.is_sharded and FewRows.fits(x, base_layer, bank):
        _split_rows(x, len(route.expert_weights))
        return FewRows(x, base_layer, bank, route)
    if DeviceRows.fits(x, bank):
        _split_rows(x, len(route.expert_weights))
        return DeviceRows(x, base_layer, bank, route)
    return None


def _apply(
    way: str, x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute, state: WeightState
) -> Tensor:
    """Output of a routed layer by the way that was chosen; arguments as in :meth:`LayerSteps.first`."""
    if way == "merged":
        with float32_inside(x.device):
            state.merged.switch(bank, route.groups[0].mix)
        state.merged.route = route
        return base_layer(x)
    state.restore()
    has_delta = any(group.mix for group in route.groups)
    if not route.is_differentiable and not has_delta:
        return base_layer(x)
    by_row = _split_rows(x, len(route.expert_weights))
    if way == "dense":
        result = _dense(by_row, base_layer, bank, route, state.cached)
    elif _can_use_kernels(by_row, bank, route):
        result = _sparse_by_kernels(by_row, base_layer, bank, route)
    else:
        result = _sparse(by_row, base_layer, bank, route)
    return result.reshape(*x.shape[:-1], result.shape[-1])


def float32_inside(device: torch.device) -> AbstractContextManager[object]:
    """No autocast in the block, so that deltas are unpacked and summed in float32."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _split_rows(x: Tensor, batch_size: int) -> Tensor:
    """(B, T, I), whatever the model made of the batch."""
    if x.shape[0] == batch_size and x.ndim >= 2:
        return x.reshape(batch_size, -1, x.shape[-1])
    if x.ndim == 2 and x.shape[0] % batch_size == 0:
        return x.reshape(batch_size, -1, x.shape[-1])
    raise UnsupportedError(
        f"a routed layer got an input of shape {tuple(x.shape)} for {batch_size} rows; it cannot tell which row an "
        "entry belongs to. Leave this layer out with target_modules."
    )


def _dense(x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute, kept: MergedWeightCache) -> Tensor:
    """Each group's weight in a scratch matrix, and one dense product."""
    if not route.groups:
        raise RuntimeError("a route without rows")
    weight, bias = readable_weight(base_layer), base_layer.bias
    # A correction is added before anything is rounded.
    weight = weight.float() if bank.is_corrected else weight
    # Under autocast a product has another dtype than its inputs.
    is_autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
    is_ordinary = not (torch.is_grad_enabled() or is_autocast)
    result = x.new_empty(x.shape[0], x.shape[1], weight.shape[0], dtype=dtype)
    for rows, mix in route.groups:
        # Rows side by side are seen as they lie; others are gathered and scattered.
        place = slice(None) if rows is None else _as_slice(rows, x.device)
        shift = mixed_bias(bank, mix)
        group_bias = bias if shift is None else (bias.float() + shift).to(bias.dtype)
        group_weight = kept.weight(mix)
        if group_weight is None and is_ordinary and (merging := block_merging(weight, bank, mix, dtype)) is not None:
            inputs = x[place].flatten(0, 1)
            out = result[place].flatten(0, 1) if isinstance(place, slice) else x.new_empty(len(inputs), len(weight))
            merging.product(inputs, group_bias, out)
            if not isinstance(place, slice):
                result[place] = out.view(-1, *result.shape[1:])
            continue
        if group_weight is None:
            # Rounded once, after all is added.
            with float32_inside(x.device):
                group_weight = mixed_weight(weight, bank, mix).to(dtype)
        if rows is None:
            return F.linear(x, group_weight, group_bias)
        if isinstance(place, slice) and group_bias is None and is_ordinary:
            torch.mm(x[place].flatten(0, 1), group_weight.T, out=result[place].flatten(0, 1))
        else:
            result[place] = F.linear(x[place], group_weight, group_bias)
    return result


def _as_slice(rows: Tensor, device: torch.device) -> slice | Tensor:
    """Row numbers as a slice, where they follow each other."""
    first, count = int(rows[0]), len(rows)
    return slice(first, first + count) if int(rows[-1]) - first == count - 1 else rows.to(device)


def _sparse(x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute) -> Tensor:
    """One dense product for the whole batch, plus each active expert's delta on its rows."""
    result = base_layer(x)
    if route.is_differentiable:
        with float32_inside(x.device):
            change = mixed_output(x, bank, route)
        return result + change.to(result.dtype)
    total = torch.zeros(result.shape, dtype=torch.float32, device=result.device)
    for column, name in enumerate(route.columns):
        weights = route.expert_weights[:, column].to(result.device)
        delta = bank.get(name)
        rows = torch.nonzero(weights.detach()).flatten()
        if delta is None or not len(rows):
            continue
        part = _product(x[rows].float(), bank, name, delta)
        total = total.index_add(0, rows, weights[rows, None, None] * part)
    return result + total.to(result.dtype)


def _product(x: Tensor, bank: LayerBank, name: str, delta: SparseDelta) -> Tensor:
    """``S x + b`` for one expert: (B, T, O) float32."""
    with float32_inside(x.device):
        matrix = mixed_delta(bank, ((name, 1.0),)) if bank.has_device_loops else None
        result = delta.product(x) if matrix is None else F.linear(x, matrix)
    return result if delta.bias is None else result + delta.bias


def _can_use_kernels(x: Tensor, bank: LayerBank, route: LayerRoute) -> bool:
    if x.device.type != "cpu" or (torch.is_grad_enabled() and (x.requires_grad or route.is_differentiable)):
        return False
    return bank.has_loops


def _sparse_by_kernels(x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute) -> Tensor:
    """As :func:`_sparse`, straight from the packed bank: no delta is unpacked."""
    num_tokens = x.shape[1]
    product = bank.product(route.key, route.columns, num_tokens)
    inputs = x.detach().reshape(-1, x.shape[-1])
    numbers = inputs.float().contiguous().numpy()
    result = base_layer(inputs)
    if result.dtype == torch.float32 and result.is_contiguous():
        product(numbers, result.detach().numpy())
    else:
        total = torch.zeros(len(numbers), result.shape[-1])
        product(numbers, total.numpy())
        result = result + total.to(result.dtype)
    return _add_biases(result.view(*x.shape[:2], -1), bank, route)


def _add_biases(result: Tensor, bank: LayerBank, route: LayerRoute) -> Tensor:
    """Add each row's mix of bias deltas to (B, T, O)."""
    shift = mixed_biases(bank, route)
    return result if shift is None else (result.float() + shift[:, None]).to(result.dtype)


class WholeWeight:
    """What one layer computes where all rows have one mix whose whole weight is kept: a plain product."""

    def __init__(self, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute, kept: MergedWeightCache) -> None:
        self.route = route
        mix = route.groups[0].mix
        weight, shift = kept.weight(mix), mixed_bias(bank, mix)
        assert weight is not None
        self._base_layer, self._weight = base_layer, weight
        self._bias: Tensor | None = base_layer.bias
        if shift is not None:
            self._bias = (base_layer.bias.float() + shift).to(base_layer.bias.dtype)

    @staticmethod
    def fits(x: Tensor, route: LayerRoute, kept: MergedWeightCache) -> bool:
        """Whether this way is open: one mix with a weight of its own, no gradients, no other dtype."""
        weight = kept.weight(route.groups[0].mix) if len(route.groups) == 1 and not route.is_differentiable else None
        return weight is not None and _is_plain_input(x, weight) and not torch.compiler.is_compiling()

    def is_for(self, x: Tensor) -> bool:
        """Whether an input is like the one this was made for."""
        return _is_plain_input(x, self._weight) and not is_hooked(self._base_layer)

    def __call__(self, x: Tensor) -> Tensor:
        """Output of the layer, (..., O)."""
        return F.linear(x, self._weight, self._bias)


def _is_plain_input(x: Tensor, weight: Tensor) -> bool:
    is_other = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    return x.dtype == weight.dtype and x.device == weight.device and not is_other


class FewRows:
    """What one layer computes under one route on a CPU: backbone and deltas in one pass over the weight."""

    def __init__(self, x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute) -> None:
        self.route = route
        self._base_layer, self._shape, self._dtype = base_layer, x.shape, x.dtype
        self._num_outputs, self._num_inputs = bank.shape
        num_rows = x.numel() // self._num_inputs
        self._product = bank.product(route.key, route.columns, num_rows // len(route.expert_weights))
        self._out_shape = (*x.shape[:-1], self._num_outputs)

    @staticmethod
    def fits(x: Tensor, base_layer: nn.Linear, bank: LayerBank) -> bool:
        """Whether this way is open: plain float weight in whole vectors, nothing hooked to the layer, no gradients."""
        if type(base_layer) is not nn.Linear or type(base_layer.weight) is not nn.Parameter:
            return False
        weight, bias = base_layer.weight, base_layer.bias
        return (
            bank.has_loops
            and x.numel() <= MOST_ROWS * x.shape[-1]
            and x.dtype == weight.dtype
            and x.dtype in _DTYPES
            and x.device.type == weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.shape[1] % 16 == 0
            and not bank.has_bias
            and (bias is None or bias.dtype == torch.float32)
            and not torch.is_grad_enabled()
            and not is_hooked(base_layer)
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )

    def is_for(self, x: Tensor) -> bool:
        """Whether an input is like the one this was made for."""
        is_same = x.shape == self._shape and x.dtype == self._dtype
        is_other = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_hooked(self._base_layer)
        return is_same and not is_other

    def __call__(self, x: Tensor) -> Tensor:
        """Output of the layer, (..., O) in the dtype of ``x``; summed in float32 and rounded once."""
        parameters = self._base_layer._parameters
        rows = x.reshape(-1, self._num_inputs).float().contiguous()
        out = torch.empty(self._out_shape)
        self._product.multiply(rows, out.view(len(rows), -1), parameters["weight"], parameters["bias"])
        return out.to(self._dtype)


class DeviceRows:
    """What one layer computes under one route on a GPU: its own product, and all deltas added by one kernel."""

    def __init__(self, x: Tensor, base_layer: nn.Linear, bank: LayerBank, route: LayerRoute) -> None:
        self.route = route
        self._base_layer, self._shape, self._dtype = base_layer, x.shape, x.dtype
        self._num_outputs, self._num_inputs = bank.shape
        num_tokens = x.numel() // self._num_inputs // len(route.key)
        rows = {name: row for name, row in zip(route.columns, zip(*route.key, strict=True), strict=True) if any(row)}
        names = [name for name in rows if bank.get(name) is not None]
        table = torch.tensor([rows[name] for name in names]).reshape(len(names), len(route.key))
        self._coefficients = table.repeat_interleave(num_tokens, dim=1).to(x.device)
        self._deltas = bank.on_device(names)
        shift = mixed_biases(bank, route)
        self._shift = None if shift is None else shift.repeat_interleave(num_tokens, dim=0)

    @staticmethod
    def fits(x: Tensor, bank: LayerBank) -> bool:
        """Whether this way is open: few rows on a GPU, deltas that its kernels read, no gradients."""
        return (
            x.device.type == "cuda"
            and x.numel() <= MOST_DEVICE_ROWS * x.shape[-1]
            and x.dtype in _DTYPES
            and not torch.is_grad_enabled()
            and bank.has_device_loops
        )

    def is_for(self, x: Tensor) -> bool:
        """Whether an input is like the one this was made for."""
        return x.shape == self._shape and x.dtype == self._dtype and not torch.is_grad_enabled()

    def __call__(self, x: Tensor) -> Tensor:
        """Output of the layer, (..., O); deltas are summed in float32."""
        result = self._base_layer(x).contiguous()
        if self._deltas is not None:
            rows = x.reshape(-1, self._num_inputs).contiguous()
            self._deltas.add_product(rows, self._coefficients, result.view(len(rows), self._num_outputs))
        if self._shift is not None:
            result = (result.float() + self._shift.view(result.shape)).to(result.dtype)
        return result


ShortWay = WholeWeight | FewRows | DeviceRows
"""What is kept of a pass, for further steps under its route."""
