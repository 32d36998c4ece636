"""Options that `build` and `plan` share: one declaration an option, and the configuration that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import MediatorSettings
from ..data_files import MalformedJsonError, parse_json
from ..presets import PRESETS, preset_settings
from ..tables import unknown_name
from .common import MOST_WORKERS, parse_pairs

HOW_TO_MERGE = "How to merge"
"""Panel of the options that are fields of the configuration."""

DEFAULTS = MediatorSettings()

_FIELD_OF = {"target_module": "target_modules", "merge_parameter": "merge_parameters"}
_FIELDS = frozenset(item.name for item in fields(MediatorSettings))


def _setting(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=HOW_TO_MERGE)


Base = Annotated[str, typer.Option(help="Base model: a folder or a hub id, org/model@revision.", show_default=False)]
Expert = Annotated[
    list[str], typer.Option(metavar="NAME=PATH", help="A fine-tuned expert; repeatable.", show_default=False)
]
Preset = Annotated[
    str | None,
    typer.Option(help="A published system as a configuration: twin or t-switch. Other options take precedence."),
]
MergeMethod = Annotated[
    str,
    _setting("How experts are merged into the backbone, e.g. average or base; `mediator-peft methods` lists all."),
]
MergeParameter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="A parameter of the merge method, e.g. density=0.1; repeatable.",
        rich_help_panel=HOW_TO_MERGE,
    ),
]
MergeData = Annotated[
    str | None, _setting("File or folder of data that the merge method reads, e.g. coefficients.json.")
]
DepthScaling = Annotated[
    str | None, _setting("Scale by depth (LiNeS): auto, or alpha,beta such as 0.5,0.5. Default: not scaled.")
]
Density = Annotated[float, _setting("Share of entries kept in a delta, in (0, 1].")]
DensityScope = Annotated[str, _setting("Scope of density: matrix, or model (one threshold for all matrices).")]
Budget = Annotated[
    str | None, _setting("Choose density by size of backbone and adapter: 1.5x (of the backbone) or 400MB.")
]
Encoding = Annotated[str, _setting("Encoding of kept entries: sign, float, int8, nf4 or factors_sign.")]
Rescale = Annotated[str, _setting("How kept entries are rescaled: projection, norm or mean.")]
Sparsifier = Annotated[str, _setting("Which entries are kept: magnitude, dare or svd.")]
Rank = Annotated[
    int | None, _setting("With svd: rank of every delta. Default: as many bytes as encoding sign has at this density.")
]
RoutedLayers = Annotated[str, _setting("auto, all, a share of blocks such as 0.5, or block numbers such as 0,1,2.")]
TargetModule = Annotated[
    list[str] | None,
    _setting("Modules with deltas, e.g. q_proj, all-linear or embed_tokens; repeatable. Default: all-linear."),
]
ConflictScore = Annotated[str, _setting("Conflict score that ranks blocks: sign, sign_any or energy.")]
ConflictDensity = Annotated[float, _setting("Share of largest entries used in the conflict score, in (0, 1].")]
ConflictThreshold = Annotated[float, _setting("With routed-layers auto: blocks with at least this score are routed.")]
Always = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH:WEIGHT",
        help="A delta that every prompt gets: a checkpoint minus the base (PATH,REFERENCE:WEIGHT: minus another); "
        "repeatable.",
        rich_help_panel=HOW_TO_MERGE,
    ),
]
AlwaysRule = Annotated[
    str | None, _setting("Weights of always: as given, alpha (relative to the experts' task vectors) or alpha-omega.")
]
Router = Annotated[str, _setting("Router: gaussian, knn, mlp or prototype.")]
RouterLayer = Annotated[
    str, _setting("The router uses the hidden state after this many blocks; auto lets fit-router choose.")
]
OodAlpha = Annotated[float, _setting("Accepted share of in-distribution prompts flagged as OOD, in (0, 1).")]
OodBeta = Annotated[float, _setting("Accepted share of OOD prompts that reach an expert, in (0, 1).")]
RoutingTopP = Annotated[
    float, _setting("The smallest set of experts that reaches this probability is mixed, in (0, 1].")
]
Fallback = Annotated[str, _setting("Where OOD prompts go: base or backbone.")]
Families = Annotated[
    str | None,
    _setting("Store equal experts once, and related ones as a shared delta with residuals: auto, or the least cosine."),
]
ForQuantization = Annotated[
    str | None, _setting("Add a delta that corrects the quantization error of a backbone in nf4, fp4 or int8.")
]
CorrectionDensity = Annotated[float, _setting("Share of entries with a correction, in (0, 1].")]
Seed = Annotated[int, _setting("Seed of random choices.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Use the blocks and settings of a file of `plan --save`; options given here take precedence.",
    ),
]
Workers = Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="Processes; the output has the same bytes.")]
MaxMemory = Annotated[str | None, typer.Option(help="Memory limit, e.g. 4GiB.")]
AllowPickle = Annotated[bool, typer.Option(help="Also read .bin files, with weights_only=True.")]
Dequantize = Annotated[bool, typer.Option(help="Dequantize quantized checkpoints to plain weights.")]
AllowDistant = Annotated[bool, typer.Option(help="Build although an expert is too far from the base for a fine-tune.")]


MERGE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (Base, Parameter.empty),
    "expert": (Expert, Parameter.empty),
    "preset": (Preset, None),
    "merge_method": (MergeMethod, DEFAULTS.merge_method),
    "merge_parameter": (MergeParameter, None),
    "merge_data": (MergeData, None),
    "depth_scaling": (DepthScaling, None),
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
    "always": (Always, None),
    "always_rule": (AlwaysRule, None),
    "router": (Router, DEFAULTS.router),
    "router_layer": (RouterLayer, DEFAULTS.router_layer),
    "ood_alpha": (OodAlpha, DEFAULTS.ood_alpha),
    "ood_beta": (OodBeta, DEFAULTS.ood_beta),
    "routing_top_p": (RoutingTopP, DEFAULTS.routing_top_p),
    "fallback": (Fallback, DEFAULTS.fallback),
    "families": (Families, None),
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
    if "always" in settings:
        settings["always"] = parse_pairs(settings["always"], "--always")
    if "routed_layers" in settings:
        settings["routed_layers"] = parse_routed_layers(settings["routed_layers"])
    if "router_layer" in settings:
        settings["router_layer"] = parse_router_layer(settings["router_layer"])
    if "families" in settings:
        settings["families"] = parse_families(settings["families"])
    if "merge_parameters" in settings:
        settings["merge_parameters"] = parse_parameters(settings["merge_parameters"])
    if "depth_scaling" in settings:
        settings["depth_scaling"] = parse_depth_scaling(settings["depth_scaling"])
    preset = _preset(ctx.params["preset"], ctx.params["base"])
    return MediatorSettings(**{**preset, **_planned(ctx.params["plan_file"]), **settings})


def _preset(name: str | None, base: str) -> dict[str, Any]:
    """Settings of a preset for this base; none without one."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise typer.BadParameter(unknown_name(name, PRESETS, "preset"), param_hint="--preset")
    from ..checkpoints.opening import open_checkpoint

    config = open_checkpoint(base, "base").config
    return preset_settings(name, int(config.get_text_config().hidden_size))


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


def parse_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; numbers and truth values as JSON writes them, all else as text."""
    found: dict[str, Any] = {}
    for name, text in parse_pairs(pairs, "--merge-parameter", "KEY=VALUE").items():
        try:
            found[name] = parse_json(text)
        except MalformedJsonError:
            found[name] = text
    return found


def parse_depth_scaling(text: str) -> str | list[float]:
    """``auto``, or two numbers; anything else is left for the config to refuse."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return text


def parse_routed_layers(text: str) -> str | float | list[int]:
    """``auto``, ``all``, a share (with a point) or block numbers; anything else is left for the config to refuse."""
    try:
        if "." in text:
            return float(text)
        return [int(number) for number in text.split(",")]
    except ValueError:
        return text


def parse_families(text: str) -> str | float:
    """``auto`` or a least cosine; anything else is left for the config to refuse."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_router_layer(text: str) -> str | int:
    """``auto`` or a number of blocks; anything else is left for the config to refuse."""
    try:
        return int(text)
    except ValueError:
        return text


def _planned(path: str | Path | None) -> Mapping[str, Any]:
    from ..merge.block_plan import planned_settings

    return {} if path is None else planned_settings(Path(path))
