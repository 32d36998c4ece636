"""The method written out plainly, sharing nothing with the library but the checkpoints' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def load(path: Path) -> nn.Module:
    """A plain model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the experts' weights."""
    states = [load(path).state_dict() for path in paths]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the blocks: those with a number in their name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    }


def thin_out(delta: Tensor, density: float, encoding: str, rescale: str = "projection") -> Tensor:
    """Largest entries by sorting; then either as they are, or as their signs with one scale a row."""
    order = delta.abs().flatten().argsort(descending=True, stable=True)[: round(density * delta.numel())]
    mask = torch.zeros(delta.numel())
    mask[order] = 1
    mask = mask.reshape(delta.shape) * (delta != 0)
    if encoding != "sign":
        # Numbers: what is kept shall point along the delta as far as the delta does.
        kept_square = float((delta * mask).double().square().sum())
        if rescale == "projection" and kept_square:
            delta = delta * (float(delta.double().square().sum()) / kept_square)
    if encoding == "float":
        return delta * mask
    if encoding in ("int8", "nf4"):
        from bitsandbytes import functional

        places = mask.bool()
        if encoding == "nf4":
            rounded = functional.dequantize_4bit(
                *functional.quantize_4bit(delta[places], blocksize=64, quant_type="nf4")
            )
        else:
            rounded = functional.dequantize_blockwise(*functional.quantize_blockwise(delta[places], blocksize=64))
        return torch.zeros_like(delta).masked_scatter(places, rounded.flatten())
    rows = []
    for row, kept in zip(delta, mask, strict=True):
        count = int(kept.sum())
        scale = float(row.norm()) / count**0.5 if count else 0.0
        if rescale == "mean":
            scale = float(row[kept.bool()].abs().mean()) if count else 0.0
        rows.append(row.sign() * kept * scale)
    signs = torch.stack(rows)
    if rescale == "projection" and signs.any():
        # What points along the delta shall be as long as the delta.
        unit = delta / delta.norm()
        signs *= delta.norm() / (signs * unit).sum()
    # A row's scale is stored in 16 bits.
    return signs.bfloat16().float()


def mixed_model(
    paths: Mapping[str, Path], weights: Mapping[str, float], density: float, encoding: str, method: str = "average"
) -> nn.Module:
    """A plain model whose routed weights are set to ``D + sum_k w_k S_k`` by hand.

    ``paths``: base and experts, the base under the name "base"; ``weights`` may name it too.
    """
    base = load(paths["base"]).state_dict()
    experts = [path for name, path in paths.items() if name != "base"]
    backbone = base if method == "base" else average_weights(experts)
    model = load(paths["base"])
    model.load_state_dict(backbone)
    state = deepcopy(backbone)
    tuned = {column: load(paths[column]).state_dict() for column in weights}
    for name, module in linear_layers(model).items():
        for column, weight in weights.items():
            theirs = tuned[column]
            delta = theirs[f"{name}.weight"] - backbone[f"{name}.weight"]
            if isinstance(module, Conv1D):
                delta = delta.T
            sparse = thin_out(delta, density, encoding)
            if isinstance(module, Conv1D):
                sparse = sparse.T
            state[f"{name}.weight"] = state[f"{name}.weight"] + weight * sparse
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"] + weight * (
                    theirs[f"{name}.bias"] - backbone[f"{name}.bias"]
                )
    model.load_state_dict(state)
    return model
