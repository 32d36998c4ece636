"""Quantised layers under a delta: which kind they are, what their weight stands for, how one is filled.

The codes of bitsandbytes are read. Any other quantised layer (torchao, quanto, compressed-tensors, GPTQ, AWQ, ...) is
called as it is, and the deltas' product is added to its output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import copy
from itertools import chain
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .merged_weight import is_plain, plain_weight


def quantization_of(base_layer: nn.Module) -> str | None:
    """``"nf4"``, ``"fp4"`` or ``"int8"``; None for a plain weight, ``"other"`` for what cannot be read."""
    if is_plain(base_layer):
        return None
    weight: Any = getattr(base_layer, "weight", None)
    if weight is None or weight.device.type == "meta":
        return "other"
    kind = type(weight).__name__
    if kind == "Params4bit":
        return weight.quant_type
    return "int8" if kind == "Int8Params" else "other"


def quantizations_of(layers: Iterable[Any]) -> set[str]:
    """Those of routed layers; empty where all are plain."""
    return {kind for layer in layers if (kind := quantization_of(layer.base_layer))}


def are_corrected(layers: Iterable[Any], adapter_name: str) -> bool:
    """Whether quantised layers have their error corrected by an adapter, which may route some of them only."""
    return any(layer.bank(adapter_name).is_corrected for layer in layers if adapter_name in layer.mediator_bank)


def uncorrected_quantization(layers: Collection[Any], adapter_name: str) -> str | None:
    """In what quantisation prompts are read, several joined by ``+``; None for plain and for corrected weights."""
    return None if are_corrected(layers, adapter_name) else "+".join(sorted(quantizations_of(layers))) or None


def device_of(base_layer: nn.Module) -> torch.device:
    """Where a layer computes; for one that accelerate fetches from elsewhere, where it is fetched to."""
    place = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    # A matrix of fused experts has no parameters of its own.
    first = next(chain(base_layer.parameters(), base_layer.buffers()), getattr(base_layer, "weight", None))
    here = first.device if isinstance(first, Tensor) else torch.device("cpu")
    return here if place is None or here.type != "meta" else torch.device(place)


def readable_weight(base_layer: nn.Module) -> Tensor:
    """The weight (O, I) as numbers: the weight itself, or what its codes stand for, in a new tensor.

    bitsandbytes' 8-bit layers also round the inputs of a product; a product with this weight does not.
    """
    if is_plain(base_layer):
        return plain_weight(base_layer)  # type: ignore[arg-type]
    weight: Any = base_layer.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return _unpacked_for_cpu(weight)
    if type(weight).__name__ == "Int8Params":
        return _of_eight_bits(base_layer)
    return dequantize_module_weight(base_layer).detach()


def _of_eight_bits(base_layer: Any) -> Tensor:
    """Codes times their rows' scales, which the layer takes over from its weight at the first inference.

    PEFT's own helper would put a new weight into the layer, which then lacks them.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight, state = base_layer.weight, base_layer.state
    scales = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    return int8_vectorwise_dequant(weight.data, scales).detach()


def lay_out_plainly(model: nn.Module) -> None:
    """Bring 4-bit codes that bitsandbytes has laid out anew for its CPU kernels back, before they are saved.

    It would do so itself, and leave their scales in the other order: the model's next answers would be noise.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
            weight.data, weight.quant_state = _plain_codes(weight)
            module.quant_state = weight.quant_state


def _unpacked_for_cpu(weight: Any) -> Tensor:
    """As bitsandbytes dequantises, of codes that it has laid out anew for its CPU kernels (at the first inference)."""
    from bitsandbytes.functional import dequantize_4bit

    codes, state = _plain_codes(weight)
    state.dtype = torch.float32
    return dequantize_4bit(codes, state)


def _plain_codes(weight: Any) -> tuple[Tensor, Any]:
    """Codes and their state as they were before; the weight is left as it is."""
    from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

    state = copy(weight.quant_state)
    # Its scales are rounded to bfloat16 for good, and plain; quantising them again would only add to that.
    state.original_nested = False
    codes, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.float().reshape(-1)
    return codes, state


def fill_quantized(base_layer: nn.Module, weight: Tensor) -> None:
    """Quantise a full-precision weight (O, I) into a layer, in the layer's own manner and on its device.

    Its compute dtype and outlier threshold stay.
    """
    import bitsandbytes as bnb

    base: Any = base_layer
    old: Any = base.weight
    if isinstance(old, bnb.nn.Params4bit):
        state = old.quant_state
        # Through the storage dtype of the codes' state: what a checkpoint of that dtype gives.
        fresh: Any = bnb.nn.Params4bit(
            weight.to(getattr(state, "original_dtype", state.dtype)).cpu().contiguous(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(state, "original_nested", state.nested),
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=base,
        )
        base.weight = fresh.to(old.device)
        base.quant_state = base.weight.quant_state
    else:
        fresh = bnb.nn.Int8Params(
            weight.to(torch.float16).cpu().contiguous(), requires_grad=False, has_fp16_weights=False
        )
        base.weight = fresh.to(old.device)
        base.state.CB = base.weight.CB
        base.state.SCB = base.weight.SCB
