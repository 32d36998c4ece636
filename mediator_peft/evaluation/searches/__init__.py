"""Searches for coefficients of a weighted sum of task vectors; each writes a ``coefficients.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .evolutionary import evolution
from .expert_merging import Found, expert_merging
from .frank_wolfe import frank_wolfe
from .pareto import pareto


class Search(NamedTuple):
    """One search; a row of ``SEARCHES``."""

    run: Callable[..., Found]
    """(merged model, examples, **options) → what it found."""

    paper: str
    takes_answers: bool
    """Whether it may be given prompts with answers; without them experts are imitated."""


SEARCHES: dict[str, Search] = {
    "evolution": Search(evolution, "our choice, after Evo-Merging, arXiv 2509.12951", True),
    "expert_merging": Search(expert_merging, "Expert Merging, arXiv 2509.25712", False),
    "frank_wolfe": Search(frank_wolfe, "FW-Merging, arXiv 2503.12649", True),
    "map": Search(pareto, "MAP, arXiv 2406.07529", True),
}

__all__ = ["SEARCHES", "Found", "Search"]


def describe(name: str, found: Found, **more: Any) -> dict[str, Any]:
    """Content of a ``coefficients.json``."""
    return {"coefficients_version": 1, **found.coefficients, "about": {"search": name, **more, **found.about}}
