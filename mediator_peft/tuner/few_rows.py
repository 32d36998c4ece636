"""A mixed batch of few tokens, as in decoding, straight from the packed bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bank.layer_bank import LayerBank
from ..config import CORRECTION
from .expert_weights import LayerRoute
from .merged_weight import mixed_biases

MOST_ROWS = 16
"""Up to this many rows a loop that reads each weight once beats a general matrix product, which repacks it first."""

MOST_DEVICE_ROWS = 64
"""The same for a GPU, where the loop adds to a general product."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        weight, bias = base_layer.weight, base_layer.bias
        return (
            type(base_layer) is nn.Linear
            and bank.has_loops
            and x.numel() <= MOST_ROWS * x.shape[-1]
            and x.dtype == weight.dtype
            and x.dtype in _DTYPES
            and x.device.type == weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.shape[1] % 16 == 0
            and not bank.has_bias
            and (bias is None or bias.dtype == torch.float32)
            and not torch.is_grad_enabled()
            and not (base_layer._forward_hooks or base_layer._forward_pre_hooks or hasattr(base_layer, "_hf_hook"))
            and not torch.compiler.is_compiling()
        )

    def is_for(self, x: Tensor) -> bool:
        """Whether an input is like the one this was made for."""
        return x.shape == self._shape and x.dtype == self._dtype and not torch.is_grad_enabled()

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
        if bank.correction is not None:
            rows[CORRECTION] = (1.0,) * len(route.key)
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
