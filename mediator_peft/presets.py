"""Published systems that are configurations of this library: settings for ``build``, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Task arithmetic as the shared model, exclusive parts of low rank, mixed by the softmax of a small network.
        "twin": {
            "merge_method": "task_arithmetic",
            "merge_parameters": {"scale": 0.3},
            "routed_layers": "all",
            "sparsifier": "svd",
            "rank": 0.1,
            "router": "mlp",
            "routing_top_p": 1.0,
            "fallback": "backbone",
        },
        # The base, signs of the largest entries at the norm of the task vector, mixed by votes of nearest neighbours.
        "t-switch": {
            "merge_method": "base",
            "routed_layers": "all",
            "density": 0.35,
            "rescale": "norm",
            "router": "knn",
            "routing_top_p": 1.0,
            "fallback": "backbone",
        },
    }
)
"""Name → settings that differ from the defaults. ``twin``: Twin-Merging, arXiv 2406.15479 (rank: a share of the hidden
size). ``t-switch``: T-Switch with Auto-Switch's neighbours, arXiv 2412.00054. Both keep this library's gate for unknown
prompts, and have one threshold and one scale where its deltas have them: a matrix and a row."""


def preset_settings(name: str, hidden_size: int) -> dict[str, Any]:
    """Settings of a preset for a model.

    Args:
        name: a key of ``PRESETS``.
        hidden_size: of the model.
    """
    settings = dict(PRESETS[name])
    if "rank" in settings:
        settings["rank"] = max(1, round(settings["rank"] * hidden_size))
    return settings
