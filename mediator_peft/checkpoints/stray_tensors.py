"""Tensors in old files that no model reads: buffers that are computed today. transformers leaves them out, too."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .checkpoint import Checkpoint
from .tensor_inventory import Outline, is_known, skeleton

# Buffers that former versions of transformers stored, for many models: transformers' ``from_pretrained`` passes over
# the first two by name, and over the third as over anything that it does not know.
_BUFFERS = r"(^|\.)(inv_freq|position_ids|masked_bias)$"


def leave_out_strays(checkpoints: Iterable[Checkpoint], outline: Outline) -> None:
    """Forget tensors that the model has not and that transformers passes over when it loads.

    These are stored buffers, what the model's class names in ``_keys_to_ignore_on_load_unexpected``, and what lies in
    the shards but not in their index. Any other tensor that the model has not stays, and is a fault.
    """
    checkpoints = list(checkpoints)
    unknown = {name for checkpoint in checkpoints for name in checkpoint.tensors} - outline.names
    if not unknown:
        return
    ignored = re.compile("|".join([_BUFFERS, *(f"({pattern})" for pattern in _patterns(checkpoints[0]))]))
    stray = {name for name in unknown if ignored.search(name)}
    for checkpoint in checkpoints:
        checkpoint.leave_out(stray | (unknown & checkpoint.unlisted))


def _patterns(base: Checkpoint) -> list[str]:
    if is_known(base.raw_config):
        return []
    # Set on the model and not on its class: parts of it add their own.
    return sorted(getattr(skeleton(base.config), "_keys_to_ignore_on_load_unexpected", None) or ())
