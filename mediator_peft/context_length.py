"""How many tokens a model reads at once, by its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .deferred import nn

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_TABLE = re.compile(r"(^|\.)(wpe|[a-z_]*position[a-z_]*)$")


def context_length(config: Any) -> int | None:
    """Positions of a model, times the factor of its RoPE scaling; None where the configuration names none.

    Where a configuration leaves open whether its number of positions counts the scaling already, the larger number.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _POSITIONS)
    positions = next((value for value in found if isinstance(value, int) and value > 0), None)
    if positions is None:
        return None
    scaled = [positions]
    for rope in _rope_settings(text):
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or positions
        if isinstance(factor, (int, float)) and isinstance(original, int) and 1 < factor < float("inf"):
            scaled.append(int(factor * original))
    return max(scaled)


def table_of_positions(model: nn.Module) -> int | None:
    """Most positions of a model that looks each of them up in a table (GPT-2, OPT); None where there is no table."""
    has_table = any(
        isinstance(module, nn.Embedding) and _TABLE.search(name) is not None for name, module in model.named_modules()
    )
    config: Any = getattr(model, "config", None)
    return context_length(config) if has_table else None


def _rope_settings(config: Any) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary embeddings; some models have one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, Mapping):
            yield settings
            yield from (value for value in settings.values() if isinstance(value, Mapping))
