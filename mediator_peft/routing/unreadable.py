"""Prompts of which nothing can be read: no token, or a hidden state that holds NaN or infinity."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .gate import RouteOutput


def split_unreadable(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features that a router can take, and which prompts they say nothing of.

    A prompt without a token has features of exactly 0; no hidden state of a token has.

    Args:
        features: (B, H)

    Returns:
        (B, H) with zeros in place of NaN and infinity, and (B,) bool, True for the rows that cannot be read; None where
        all can.
    """
    values = features.detach()
    broken = ~torch.isfinite(values).all(dim=1)
    unreadable = broken | (values == 0).all(dim=1)
    if not bool(unreadable.any()):
        return features, None
    if bool(broken.any()):
        warnings.warn(
            f"{int(broken.sum())} of {len(features)} prompts have NaN or infinity in their hidden state, so they are "
            "answered by the base. Look for a broken weight, or load the backbone in a wider dtype.",
            stacklevel=2,
        )
    return torch.where(unreadable[:, None], 0, features), unreadable


def to_the_base(output: RouteOutput, rows: Tensor, fallback_column: bool) -> RouteOutput:
    """The output with some prompts sent to the base, as unknown as can be.

    Args:
        output: of B prompts.
        rows: (B,) bool, True for those that are sent there.
        fallback_column: whether the base is a column of its own, the last.
    """
    base = torch.zeros_like(output.expert_weights[0])
    if fallback_column:
        base[-1] = 1.0
    num_experts = output.scores.shape[1]
    even = torch.full_like(output.scores[0], 1 / num_experts).log()
    return RouteOutput(
        torch.where(rows[:, None], base, output.expert_weights),
        torch.where(rows[:, None], even, output.scores),
        torch.where(rows, 1.0, output.uncertainty),
        output.is_ood | rows,
    )
