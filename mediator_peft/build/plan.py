"""Conflict scores → which blocks are routed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from ..errors import ConfigError


def choose_blocks(
    scores: Sequence[float], routed_layers: str | float | Sequence[int], threshold: float
) -> list[int]:
    """Numbers of the blocks that get sparse experts, ascending.

    Args:
        scores: conflict score of each block, in order of depth.
        routed_layers: as in ``MediatorConfig``.
        threshold: for ``"auto"``: the score from which on a block is routed.

    Raises:
        ConfigError: a block number is out of range.
    """
    num_blocks = len(scores)
    if routed_layers == "all":
        return list(range(num_blocks))
    if routed_layers == "auto":
        return [block for block, score in enumerate(scores) if score >= threshold]
    if isinstance(routed_layers, (int, float)):
        num_routed = ceil(routed_layers * num_blocks)
        # Of equal scores the earlier block goes first.
        ranked = sorted(range(num_blocks), key=lambda block: (-scores[block], block))
        return sorted(ranked[:num_routed])
    check_block_numbers(list(routed_layers), num_blocks)  # type: ignore[arg-type]
    return sorted(routed_layers)  # type: ignore[arg-type]


def check_block_numbers(numbers: Sequence[int], num_blocks: int) -> None:
    """Refuse block numbers that the model does not have.

    Raises:
        ConfigError: a number is out of range.
    """
    beyond = [number for number in numbers if number >= num_blocks]
    if beyond:
        raise ConfigError(f"routed_layers {beyond} are beyond this model, whose blocks are 0 to {num_blocks - 1}.")
