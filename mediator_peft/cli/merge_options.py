"""Options that `build` and `plan` share: one declaration an option, and the configuration that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import MediatorSettings
from .common import parse_pairs

HOW_TO_MERGE = "How to merge"
"""Panel of the options that are fields of the configuration."""

DEFAULTS = MediatorSettings()

_FIELD_OF = {"target_module": "target_modules"}
_FIELDS = frozenset(item.name for item in fields(MediatorSettings))


def _setting(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=HOW_TO_MERGE)


Base = Annotated[str, typer.Option(help="The base: a folder, or a hub id, org/model@revision.", show_default=False)]
Expert = Annotated[
    list[str], typer.Option(metavar="NAME=PATH", help="A fine-tuned expert; once for each.", show_default=False)
]
MergeMethod = Annotated[str, _setting("How experts become the backbone, e.g. average, base, ties.")]
Density = Annotated[float, _setting("Share of a delta's entries that is kept, in (0, 1].")]
DensityScope = Annotated[str, _setting("Where density holds: in each matrix, or in the model (one threshold).")]
Budget = Annotated[
    str | None, _setting("Fit density to the bytes of backbone and adapter: 1.5x the backbone, or 400MB.")
]
Encoding = Annotated[str, _setting("How kept entries are stored: sign, float, int8 or nf4.")]
Rescale = Annotated[str, _setting("How large kept entries are made: projection, norm or mean.")]
Sparsifier = Annotated[str, _setting("What is kept: magnitude, dare or svd.")]
Rank = Annotated[
    int | None, _setting("With svd: rank of every delta; without it, as many bytes as signs at the density.")
]
RoutedLayers = Annotated[str, _setting("auto, all, a share of blocks such as 0.5, or block numbers such as 0,1,2.")]
TargetModule = Annotated[
    list[str] | None,
    _setting("What gets deltas, e.g. q_proj, all-linear or embed_tokens; once for each. All-linear without it."),
]
ConflictScore = Annotated[str, _setting("What ranks blocks.")]
ConflictDensity = Annotated[float, _setting("Share of entries that vote in the score, in (0, 1].")]
ConflictThreshold = Annotated[float, _setting("With auto: blocks are routed from this score on.")]
Router = Annotated[str, _setting("Which router decides.")]
RouterLayer = Annotated[int | None, _setting("The router reads after this many blocks; a tenth of them without it.")]
OodAlpha = Annotated[float, _setting("Share of known prompts that may be taken for unknown.")]
RoutingTopP = Annotated[float, _setting("The fewest experts that reach this probability are mixed.")]
Fallback = Annotated[str, _setting("Where unknown prompts go: base or backbone.")]
ForQuantization = Annotated[
    str | None, _setting("Correct the quantization error of a backbone in nf4, fp4 or int8 by one more delta.")
]
CorrectionDensity = Annotated[float, _setting("Share of these errors that is corrected, in (0, 1].")]
Seed = Annotated[int, _setting("Seeds whatever is drawn.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Obey this file of `plan --save`: its blocks, and its settings where no option here says otherwise.",
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the tensors; the bytes are the same.")]
MaxMemory = Annotated[str | None, typer.Option(help="Most memory to take, e.g. 4GiB.")]
AllowPickle = Annotated[bool, typer.Option(help="Also read .bin files, with weights_only.")]
Dequantize = Annotated[bool, typer.Option(help="Read quantised checkpoints as the weights that they stand for.")]
AllowDistant = Annotated[bool, typer.Option(help="Build although an expert has next to nothing of the base.")]


MERGE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (Base, Parameter.empty),
    "expert": (Expert, Parameter.empty),
    "merge_method": (MergeMethod, DEFAULTS.merge_method),
    "density": (Density, DEFAULTS.density),
    "density_scope": (DensityScope, DEFAULTS.density_scope),
    "budget": (Budget, None),
    "encoding": (Encoding, DEFAULTS.encoding),
    "rescale": (Rescale, DEFAULTS.rescale),
    "sparsifier": (Sparsifier, DEFAULTS.sparsifier),
    "rank": (Rank, None),
    "routed_layers": (RoutedLayers, str(DEFAULTS.routed_layers)),
    "target_module": (TargetModule, None),
    "conflict_score": (ConflictScore, DEFAULTS.conflict_score),
    "conflict_density": (ConflictDensity, DEFAULTS.conflict_density),
    "conflict_threshold": (ConflictThreshold, DEFAULTS.conflict_threshold),
    "router": (Router, DEFAULTS.router),
    "router_layer": (RouterLayer, None),
    "ood_alpha": (OodAlpha, DEFAULTS.ood_alpha),
    "routing_top_p": (RoutingTopP, DEFAULTS.routing_top_p),
    "fallback": (Fallback, DEFAULTS.fallback),
    "for_quantization": (ForQuantization, None),
    "correction_density": (CorrectionDensity, DEFAULTS.correction_density),
    "seed": (Seed, DEFAULTS.seed),
    "plan_file": (PlanFile, None),
    "workers": (Workers, 1),
    "max_memory": (MaxMemory, None),
    "allow_pickle": (AllowPickle, False),
    "dequantize": (Dequantize, False),
    "allow_distant": (AllowDistant, False),
}
"""Options of every command that plans or builds a merge: name → (type and help, default)."""


def takes_merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with ``MERGE_OPTIONS`` before its own options; ``merge_settings`` and ``merge_inputs`` read them.

    Args:
        command: takes the context and its own options.
    """

    @wraps(command)
    def with_options(ctx: typer.Context, **given: Any) -> None:
        command(ctx, **{name: value for name, value in given.items() if name not in MERGE_OPTIONS})

    own = list(signature(command, eval_str=True).parameters.values())
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in MERGE_OPTIONS.items()
    ]
    context, rest = own[0], [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own[1:]]
    parameters = [context, *shared, *rest]
    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del with_options.__wrapped__
    return with_options


def merge_settings(ctx: typer.Context) -> MediatorSettings:
    """The configuration that a command line asks for: what was typed, then what its plan file says, then defaults.

    Raises:
        ConfigError: a setting is out of range or contradicts another; the plan file cannot be read.
    """
    settings: dict[str, Any] = {
        _FIELD_OF.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in ctx.params.items()
        if _FIELD_OF.get(name, name) in _FIELDS and _is_typed(ctx, name)
    }
    if "routed_layers" in settings:
        settings["routed_layers"] = parse_routed_layers(settings["routed_layers"])
    return MediatorSettings(**{**_planned(ctx.params["plan_file"]), **settings})


def _is_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    # By name: typer may bring its own copy of click's classes.
    return source is not None and source.name != "DEFAULT"


def merge_inputs(ctx: typer.Context) -> dict[str, Any]:
    """What both commands hand on beside the configuration, by the names that build and plan take them by."""
    given = ctx.params
    return {
        "base": given["base"],
        "experts": parse_pairs(given["expert"], "--expert"),
        "plan": given["plan_file"],
        "workers": given["workers"],
        "max_memory": given["max_memory"],
        "allow_pickle": given["allow_pickle"],
        "dequantize": given["dequantize"],
        "allow_distant": given["allow_distant"],
    }


def parse_routed_layers(text: str) -> str | float | list[int]:
    """``auto``, ``all``, a share (with a point) or block numbers; anything else is left for the config to refuse."""
    try:
        if "." in text:
            return float(text)
        return [int(number) for number in text.split(",")]
    except ValueError:
        return text


def _planned(path: str | Path | None) -> Mapping[str, Any]:
    from ..merge.block_plan import planned_settings

    return {} if path is None else planned_settings(Path(path))
