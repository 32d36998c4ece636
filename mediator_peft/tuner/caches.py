"""Key-value caches that are carried from one request to the next."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError

_TAG = "mediator_expert_weights"


def tag_cache(cache: Any, expert_weights: Tensor) -> None:
    """Note under which expert weights a cache was filled."""
    setattr(cache, _TAG, expert_weights.detach())


def cache_weights(cache: Any) -> Tensor | None:
    """Expert weights that a carried-over cache was filled under; None for none or an empty cache."""
    if cache is None or not cache.get_seq_length():
        return None
    return getattr(cache, _TAG, None)


def empty_cache(cache: Any) -> None:
    """Drop what a cache holds, in place.

    Raises:
        UnsupportedError: this kind of cache cannot be emptied.
    """
    cache.reset()
    length = cache.get_seq_length()
    if length:  # some versions of transformers only fill a reset cache with zeros
        with suppress(AttributeError, NotImplementedError, ValueError, TypeError):
            cache.crop(-length)
    if cache.get_seq_length():
        raise UnsupportedError(
            f"this turn goes to other experts, and a {type(cache).__name__} filled under the old ones cannot be "
            "emptied. Pass a new past_key_values, or use routing_turn='first' to keep to one route a chat."
        )
