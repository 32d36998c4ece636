"""Largest logit difference between each expert of an output and its original."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.fused_parts import transposed_tensors
from ..checkpoints.lora import LoraCheckpoint
from ..checkpoints.name_mapping import named_as_in_model
from ..checkpoints.opening import PLAIN, Checkpoint, Reading, open_checkpoint
from ..checkpoints.tensor_inventory import auto_class, outline_of
from ..errors import CheckpointError
from ..tuner.loading import load_mediator

_PROMPTS, _LENGTH = 2, 16


def logit_differences(
    path: str | os.PathLike[str],
    against: Mapping[str, str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> dict[str, float]:
    """Run random tokens through each expert of an output and through its original, both in float32.

    Args:
        path: what ``build_mediator`` wrote.
        against: expert name (or ``"base"``) → checkpoint.
        base: needed where an expert in ``against`` is a LoRA.
        allow_pickle: also read ``.bin`` files.

    Returns:
        Expert → largest absolute difference of a logit. It is 0 where no weight differs.

    Raises:
        AdapterError, CheckpointError: something cannot be read.
    """
    model, _ = load_mediator(Path(path), dtype=torch.float32)
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, size, (_PROMPTS, _LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, other in against.items():
        with torch.no_grad():
            ours = model(input_ids=tokens, expert_weights=name).logits
            theirs = original_model(str(other), name, base, Reading(allow_pickle))(input_ids=tokens).logits
        found[name] = _largest(ours - theirs)
    return found


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def original_model(path: str, name: str, base: str | os.PathLike[str] | None, reading: Reading = PLAIN) -> Any:
    """An expert's own model, in float32.

    Raises:
        CheckpointError: it cannot be read, or is a LoRA and its base is missing.
    """
    expert: Checkpoint = open_checkpoint(path, f"expert {name!r}", reading)
    if isinstance(expert, LoraCheckpoint):
        if base is None:
            raise CheckpointError(f"expert {name!r} is a LoRA: give its base as well (base=).")
        base_model = open_checkpoint(str(base), "base", reading)
        outline = outline_of(base_model)
        expert.bind(named_as_in_model(base_model, outline), {}, transposed_tensors(outline.structure.layers))
    expert = named_as_in_model(expert, outline_of(expert))
    return plain_model(expert.config, {key: expert.tensor(key).float() for key in expert.tensors})


def plain_model(config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of transformers with these weights, which it takes over, in float32."""
    model: nn.Module = auto_class(config).from_config(config, dtype=torch.float32)
    model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model.eval()
