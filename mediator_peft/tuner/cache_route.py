"""Which expert weights a cache was filled under: noted in the cache itself, and carried along when its rows change."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import RoutingError, UnsupportedError
from .expert_weights import Columns, LayerRoute

_TAG = "mediator_route"
_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls a cache: since 5.24, before, and of state-space models before."""


def carried_cache(given: Mapping[str, Any]) -> Any:
    """The cache that a forward pass or a generation was given, under any of its names; None for none."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """The cache in what a forward pass returns; None for none."""
    if isinstance(output, (tuple, list)):  # with return_dict=False
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next((part for name in _NAMES if (part := getattr(output, name, None)) is not None), None)


def is_filled(carried: Any) -> bool:
    """Whether a cache holds anything. Tuples of tensors, the form of former versions, do."""
    if isinstance(carried, (tuple, list)):
        return len(carried) > 0
    return carried is not None and bool(carried.get_seq_length())


def tag_cache(carried: Any, route: LayerRoute) -> None:
    """Note under which expert weights a cache was filled."""
    weights, columns = route.asked
    setattr(carried, _TAG, (weights.detach(), columns))
    if len(route.groups) > 1 and not isinstance(carried, _RowFollower):
        kind: Any = type(carried)
        carried.__class__ = _following(kind)


def cache_tag(carried: Any) -> tuple[Tensor, Columns] | None:
    """Expert weights and columns that a carried-over cache was filled under; None for none or an empty cache.

    Raises:
        RoutingError: it was filled, and not under this model's experts.
    """
    if not is_filled(carried):
        return None
    tag: tuple[Tensor, Columns] | None = getattr(carried, _TAG, None)
    if tag is None:
        raise RoutingError(
            "the cache was filled by the plain backbone or another model, or has lost its note of the experts, and a "
            "prompt is routed from its start. Give a new cache, or say which experts to continue with: expert_weights=."
        )
    return tag


def empty_cache(carried: Any) -> None:
    """Drop what a cache holds, in place.

    Raises:
        UnsupportedError: this kind of cache cannot be emptied.
    """
    carried.reset()
    length = carried.get_seq_length()
    if length:  # some versions of transformers only fill a reset cache with zeros
        with suppress(AttributeError, NotImplementedError, ValueError, TypeError):
            carried.crop(-length)
    if carried.get_seq_length():
        raise UnsupportedError(
            f"this turn goes to other experts, and a {type(carried).__name__} filled under the old ones cannot be "
            "emptied. Pass a new past_key_values, or use routing_turn='first' to keep to one route a chat."
        )


class _RowFollower:
    """Part of the class of a cache whose rows have different mixes: a row that moves takes its expert weights along."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        weights, columns = getattr(self, _TAG)
        setattr(self, _TAG, (weights.repeat_interleave(repeats, dim=0), columns))

    def _move_rows(self, rows: Tensor) -> None:
        weights, columns = getattr(self, _TAG)
        setattr(self, _TAG, (weights[torch.as_tensor(rows, device=weights.device)], columns))

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self).__mro__[2],), self.__dict__


@cache
def _following(kind: Any) -> type:
    """A class of caches that follows its rows, under the same name."""
    return type(kind.__name__, (_RowFollower, kind), {"__module__": kind.__module__})


def _remade(kind: type) -> Any:
    made: Any = _following(kind)
    return made.__new__(made)
