"""The method written out plainly, sharing nothing with the library but the checkpoints' files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def load(path: Path) -> nn.Module:
    """A plain model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def weights_of(path: Path) -> dict[str, Tensor]:
    """The weights of a plain model in float32, not to be changed: those of equal files are read once."""
    key = _digest(path)
    if key not in _results:
        _results[key] = load(path).state_dict()
    return _results[key]


def _digest(path: Path) -> str:
    """Of the configuration and the weights of a checkpoint."""
    digest = sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


_results: dict[Hashable, dict[str, Tensor]] = {}
"""What was computed, by all that it depends on: tests ask for the same many times."""


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the experts' weights."""
    states = [weights_of(path) for path in paths]
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
    model = load(paths["base"])
    experts = [path for name, path in paths.items() if name != "base"]
    backbone = weights_of(paths["base"]) if method == "base" else average_weights(experts)
    state = dict(backbone)
    known = (*(_digest(path) for path in experts), density, encoding, method)
    for column, weight in weights.items():
        key = (*known, _digest(paths[column]))
        if key not in _results:
            _results[key] = _sparse_deltas(model, weights_of(paths[column]), backbone, density, encoding)
        for name, delta in _results[key].items():
            state[name] = state[name] + weight * delta
    model.load_state_dict(state)
    return model


def _sparse_deltas(
    model: nn.Module, theirs: Mapping[str, Tensor], backbone: Mapping[str, Tensor], density: float, encoding: str
) -> dict[str, Tensor]:
    """What one column adds to each routed weight, and to each bias."""
    deltas = {}
    for name, module in linear_layers(model).items():
        delta = theirs[f"{name}.weight"] - backbone[f"{name}.weight"]
        if isinstance(module, Conv1D):
            deltas[f"{name}.weight"] = thin_out(delta.T, density, encoding).T
        else:
            deltas[f"{name}.weight"] = thin_out(delta, density, encoding)
        if f"{name}.bias" in backbone:
            deltas[f"{name}.bias"] = theirs[f"{name}.bias"] - backbone[f"{name}.bias"]
    return deltas
