"""Options of what merges (`build`, `plan`, `merge`, `search`): one declaration an option, and the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import MediatorSettings
from ..data_files import MalformedJsonError, parse_json
from ..presets import PRESETS, preset_settings
from ..tables import unknown_name
from .common import MOST_WORKERS, parse_pairs
from .option_needs import idle_settings, is_typed

HOW_TO_MERGE = "How to merge"
"""Panel of the options that are fields of the configuration."""

DEFAULTS = MediatorSettings()

_FIELD_OF = {"target_module": "target_modules", "merge_parameter": "merge_parameters"}
_FIELDS = frozenset(item.name for item in fields(MediatorSettings))


def _setting(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=HOW_TO_MERGE)


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
Seed = Annotated[int, _setting("Seed of random choices.")]


@dataclass(frozen=True)
class Sources:
    """What is merged."""

    base: Annotated[str, typer.Option(help="Base model: a folder or a hub id, org/model@revision.", show_default=False)]
    expert: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A fine-tuned expert; repeatable.", show_default=False)
    ]

    @property
    def experts(self) -> dict[str, str]:
        """Name → path.

        Raises:
            typer.BadParameter: no such pairs were given.
        """
        return parse_pairs(self.expert, "--expert")


@dataclass(frozen=True)
class MergeOptions:
    """How a merge with experts is made: fields of the configuration, or what they are taken from."""

    preset: Annotated[
        str | None,
        typer.Option(help="A published system as a configuration: twin or t-switch. Other options take precedence."),
    ] = None
    merge_method: Annotated[
        str,
        _setting("How experts are merged into the backbone, e.g. average or base; `mediator-peft methods` lists all."),
    ] = DEFAULTS.merge_method
    merge_parameter: MergeParameter = None
    merge_data: MergeData = None
    depth_scaling: DepthScaling = None
    density: Annotated[float, _setting("Share of entries kept in a delta, in (0, 1].")] = DEFAULTS.density
    density_scope: Annotated[str, _setting("Scope of density: matrix, or model (one threshold for all matrices).")] = (
        DEFAULTS.density_scope
    )
    budget: Annotated[
        str | None, _setting("Choose density by size of backbone and adapter: 1.5x (of the backbone) or 400MB.")
    ] = None
    encoding: Annotated[str, _setting("Encoding of kept entries: sign, float, int8, nf4 or factors_sign.")] = (
        DEFAULTS.encoding
    )
    rescale: Annotated[str, _setting("How kept entries are rescaled: projection, norm or mean.")] = DEFAULTS.rescale
    sparsifier: Annotated[str, _setting("Which entries are kept: magnitude, dare or svd.")] = DEFAULTS.sparsifier
    rank: Annotated[
        int | None,
        _setting("With svd: rank of every delta. Default: as many bytes as encoding sign has at this density."),
    ] = None
    routed_layers: Annotated[
        str, _setting("auto, all, a share of blocks such as 0.5, or block numbers such as 0,1,2.")
    ] = str(DEFAULTS.routed_layers)
    target_module: Annotated[
        list[str] | None,
        _setting("Modules with deltas, e.g. q_proj, all-linear or embed_tokens; repeatable. Default: all-linear."),
    ] = None
    conflict_score: Annotated[str, _setting("Conflict score that ranks blocks: sign, sign_any or energy.")] = (
        DEFAULTS.conflict_score
    )
    conflict_density: Annotated[float, _setting("Share of largest entries used in the conflict score, in (0, 1].")] = (
        DEFAULTS.conflict_density
    )
    conflict_threshold: Annotated[
        float, _setting("With routed-layers auto: blocks with at least this score are routed.")
    ] = DEFAULTS.conflict_threshold
    always: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH:WEIGHT",
            help="A delta that every prompt gets: a checkpoint minus the base (PATH,REFERENCE:WEIGHT: minus another); "
            "repeatable.",
            rich_help_panel=HOW_TO_MERGE,
        ),
    ] = None
    always_rule: Annotated[
        str | None,
        _setting("Weights of always: as given, alpha (relative to the experts' task vectors) or alpha-omega."),
    ] = None
    router: Annotated[str, _setting("Router: gaussian, knn, mlp or prototype.")] = DEFAULTS.router
    router_layer: Annotated[
        str, _setting("The router uses the hidden state after this many blocks; auto lets fit-router choose.")
    ] = str(DEFAULTS.router_layer)
    ood_alpha: Annotated[float, _setting("Accepted share of in-distribution prompts flagged as OOD, in (0, 1).")] = (
        DEFAULTS.ood_alpha
    )
    ood_beta: Annotated[float, _setting("Accepted share of OOD prompts that reach an expert, in (0, 1).")] = (
        DEFAULTS.ood_beta
    )
    routing_top_p: Annotated[
        float, _setting("The smallest set of experts that reaches this probability is mixed, in (0, 1].")
    ] = DEFAULTS.routing_top_p
    fallback: Annotated[str, _setting("Where OOD prompts go: base or backbone.")] = DEFAULTS.fallback
    families: Annotated[
        str | None,
        _setting(
            "Store equal experts once, and related ones as a shared delta with residuals: auto, or the least cosine."
        ),
    ] = None
    for_quantization: Annotated[
        str | None, _setting("Add a delta that corrects the quantization error of a backbone in nf4, fp4 or int8.")
    ] = None
    correction_density: Annotated[float, _setting("Share of entries with a correction, in (0, 1].")] = (
        DEFAULTS.correction_density
    )
    seed: Seed = DEFAULTS.seed
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="Use the blocks and settings of a file of `plan --save`; options given here take precedence.",
        ),
    ] = None


@dataclass(frozen=True)
class WorkOptions:
    """How checkpoints are read and merged, by the names that the library takes them by."""

    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="Processes; the output has the same bytes.")] = 1
    max_memory: Annotated[str | None, typer.Option(help="Memory limit, e.g. 4GiB.")] = None
    allow_pickle: Annotated[bool, typer.Option(help="Also read .bin files, with weights_only=True.")] = False
    dequantize: Annotated[bool, typer.Option(help="Dequantize quantized checkpoints to plain weights.")] = False
    allow_distant: Annotated[
        bool, typer.Option(help="Build although an expert is too far from the base for a fine-tune.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Keywords of ``build_mediator``, ``plan_mediator`` and ``merge_models``."""
        return asdict(self)


def merge_settings(ctx: typer.Context, base: str, given: MergeOptions) -> MediatorSettings:
    """The configuration that a command line asks for: what was typed, then what its plan file says, then defaults.

    Args:
        ctx: knows which options were typed.
        base: folder or hub id; a preset depends on its size.
        given: the options.

    Raises:
        ConfigError: a setting is out of range or contradicts another; the plan file cannot be read.
        typer.BadParameter: an option has no effect beside the others.
    """
    settings: dict[str, Any] = {
        _FIELD_OF.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in asdict(given).items()
        if _FIELD_OF.get(name, name) in _FIELDS and is_typed(ctx, name)
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
    preset = _preset(given.preset, base)
    combined = {**preset, **_planned(given.plan_file), **settings}
    for need in idle_settings(settings, combined, given.plan_file is not None):
        raise typer.BadParameter(f"{need.reason}.", param_hint=f"--{need.option.replace('_', '-')}")
    return MediatorSettings(**combined)


def _preset(name: str | None, base: str) -> dict[str, Any]:
    """Settings of a preset for this base; none without one."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise typer.BadParameter(unknown_name(name, PRESETS, "preset"), param_hint="--preset")
    from ..checkpoints.opening import open_checkpoint

    config = open_checkpoint(base, "base").config
    return preset_settings(name, int(config.get_text_config().hidden_size))


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
