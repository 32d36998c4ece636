"""Options that have an effect beside others only: a command line or a file with one that has none is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from ..config import MediatorSettings
from ..methods.sparsifying import SPARSIFIERS


class Need(NamedTuple):
    """When an option has an effect."""

    option: str
    """Name of its parameter."""

    reason: str
    """What is said where it has none."""

    is_met: Callable[[Mapping[str, Any]], bool]
    """(name → value of all options) → whether it has one."""


def _beside(other: str, *options: str) -> list[Need]:
    """Options that need another, ``--other``."""
    flag = f"--{other.replace('_', '-')}"
    return [Need(name, f"has no effect without {flag}", lambda given: bool(given.get(other))) for name in options]


def _instead_of(other: str, *options: str) -> list[Need]:
    """Options that another, ``--other``, makes useless."""
    flag = f"--{other.replace('_', '-')}"
    return [Need(name, f"has no effect beside {flag}", lambda given: not given.get(other)) for name in options]


_FIT_ROUTER = [*_beside("answered", "match"), *_instead_of("from_deltas", "data", "text_column", "answered")]

NEEDS: dict[str, list[Need]] = {
    "fit-router": _FIT_ROUTER,
    "calibrate": _FIT_ROUTER,
    "eval": [
        *_beside("lm_eval", "include_path", "limit", "num_fewshot"),
        *_instead_of("lm_eval", "match", "max_new_tokens"),
    ],
    "verify": _beside("against", "base", "logits"),
    "bench": _instead_of(
        "routes",
        *("prompt_tokens", "context", "batch_size", "num_experts", "rounds", "threads", "plot", "dtype", "device"),
    ),
    "condense": _beside("families", "min_cosine", "residual_density"),
    "measure": [
        Need("seed", "has no effect without --statistic fisher", lambda given: given.get("statistic") == "fisher")
    ],
}
"""Command → needs of its options."""

_IN_PLAN = "has no effect beside --plan, whose blocks say it; edit the plan"
# Of the configuration: its values are those of options, preset and plan together.
SETTING_NEEDS: list[Need] = [
    *_beside("always", "always_rule"),
    *_beside("for_quantization", "correction_density"),
    *(Need(name, _IN_PLAN, lambda given: not given["plan"]) for name in ("routed_layers", "conflict_threshold")),
    Need(
        "conflict_threshold",
        "has no effect without --routed-layers auto",
        lambda given: given["routed_layers"] == "auto",
    ),
    Need("density", "has no effect beside --budget, which decides it", lambda given: given["budget"] is None),
    Need("density", "has no effect beside --rank, which decides the size", lambda given: given["rank"] is None),
    Need("rescale", "has no effect on low-rank deltas", lambda given: not _is_low_rank(given["sparsifier"])),
]
"""Needs of the options that are fields of the configuration."""


def idle_options(needs: Collection[Need], typed: Collection[str], given: Mapping[str, Any]) -> Iterator[Need]:
    """Options that were typed and have no effect.

    Args:
        needs: of a command, or of the configuration.
        typed: names of the options that were given, rather than left at their default.
        given: name → value of all options.
    """
    for need in needs:
        if need.option in typed and not need.is_met(given):
            yield need


def idle_settings(typed: Collection[str], settings: Mapping[str, Any], has_plan: bool) -> Iterator[Need]:
    """The same of fields of the configuration.

    Args:
        typed: names of the fields that were given.
        settings: those that are no default, of options, preset and plan together.
        has_plan: whether a plan says which blocks are routed, and how dense each is.
    """
    yield from idle_options(SETTING_NEEDS, typed, {**vars(MediatorSettings()), **settings, "plan": has_plan})


def _is_low_rank(name: object) -> bool:
    sparsifier = SPARSIFIERS.get(name) if isinstance(name, str) else None
    return sparsifier is not None and sparsifier.is_low_rank


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = ctx.get_parameter_source(name)
    # By name: typer may bring its own copy of click's classes.
    return source is not None and source.name != "DEFAULT"


class CheckedCommand(TyperCommand):
    """A command that refuses options without effect."""

    def invoke(self, ctx: Any) -> Any:
        flags = {parameter.name: parameter.opts[0] for parameter in self.params}
        typed = [name for name in flags if name is not None and is_typed(ctx, name)]
        for need in idle_options(NEEDS.get(self.name or "", ()), typed, ctx.params):
            raise typer.BadParameter(f"{need.reason}.", param_hint=flags[need.option])
        return super().invoke(ctx)
