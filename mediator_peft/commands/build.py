"""``mediator-peft build``: checkpoints in, backbone and sparse experts out."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import MediatorSettings
from .common import AsJson, console, parse_pairs, print_json, quiet_transformers, say

_DEFAULTS: dict[str, Any] = {
    item.name: item.default for item in fields(MediatorSettings) if item.default is not MISSING
}


def _setting(name: str, text: str) -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="How to merge")


def build(
    base: Annotated[str, typer.Option(help="The base: a folder, or org/model[@revision].", show_default=False)],
    expert: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A fine-tuned expert; once for each.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="A folder that does not exist yet.", show_default=False)],
    merge_method: Annotated[
        str, _setting("merge_method", "How experts become the backbone, e.g. average, base, ties.")
    ] = (_DEFAULTS["merge_method"]),
    density: Annotated[float, _setting("density", "Share of a delta's entries that is kept, in (0, 1].")] = (
        _DEFAULTS["density"]
    ),
    density_scope: Annotated[
        str, _setting("density_scope", "Where density holds: in each matrix, or in the model (one threshold).")
    ] = _DEFAULTS["density_scope"],
    budget: Annotated[
        str | None, _setting("budget", "Fit density to the bytes of backbone and adapter: 1.5x the backbone, or 400MB.")
    ] = None,
    values: Annotated[str, _setting("values", "How kept entries are stored: sign, float, int8 or nf4.")] = _DEFAULTS[
        "values"
    ],
    sign_scale: Annotated[str, _setting("sign_scale", "How large kept entries are made: projection, norm or mean.")] = (
        _DEFAULTS["sign_scale"]
    ),
    sparsifier: Annotated[str, _setting("sparsifier", "What is kept: magnitude, random (DARE) or svd.")] = _DEFAULTS[
        "sparsifier"
    ],
    rank: Annotated[
        int | None,
        _setting("rank", "With svd: rank of every delta; without it, as many bytes as signs at the density."),
    ] = None,
    routed_layers: Annotated[
        str, _setting("routed_layers", "auto, all, a share of blocks such as 0.5, or block numbers such as 0,1,2.")
    ] = _DEFAULTS["routed_layers"],
    target_module: Annotated[
        list[str] | None,
        _setting(
            "target_module",
            "What gets deltas, e.g. q_proj, all-linear or embed_tokens; once for each. All-linear without it.",
        ),
    ] = None,
    conflict_score: Annotated[str, _setting("conflict_score", "What ranks blocks.")] = _DEFAULTS["conflict_score"],
    conflict_density: Annotated[
        float, _setting("conflict_density", "Share of entries that vote in the score, in (0, 1].")
    ] = _DEFAULTS["conflict_density"],
    conflict_threshold: Annotated[
        float, _setting("conflict_threshold", "With auto: blocks are routed from this score on.")
    ] = _DEFAULTS["conflict_threshold"],
    router: Annotated[str, _setting("router", "Which router decides.")] = _DEFAULTS["router"],
    router_layer: Annotated[
        int | None, _setting("router_layer", "The router reads after this many blocks; a tenth of them without it.")
    ] = None,
    ood_alpha: Annotated[
        float, _setting("ood_alpha", "Share of known prompts that may be taken for unknown.")
    ] = _DEFAULTS["ood_alpha"],
    top_p: Annotated[float, _setting("top_p", "The fewest experts that reach this probability are mixed.")] = (
        _DEFAULTS["top_p"]
    ),
    fallback: Annotated[str, _setting("fallback", "Where unknown prompts go: base or backbone.")] = (
        _DEFAULTS["fallback"]
    ),
    for_quantization: Annotated[
        str | None,
        _setting(
            "for_quantization", "Take back the rounding errors of a backbone in nf4, fp4 or int8 by one more delta."
        ),
    ] = None,
    correction_density: Annotated[
        float, _setting("correction_density", "Share of these errors that is taken back, in (0, 1].")
    ] = _DEFAULTS["correction_density"],
    seed: Annotated[int, _setting("seed", "Seeds whatever is drawn.")] = _DEFAULTS["seed"],
    plan: Annotated[Path | None, typer.Option(help="Obey this plan file, which `plan --save` wrote.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the tensors; the bytes are the same.")] = 1,
    max_memory: Annotated[str | None, typer.Option(help="Most memory to take, e.g. 4GiB.")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Also read .bin files, with weights_only.")] = False,
    hash_inputs: Annotated[bool, typer.Option(help="Write the sha256 of every input file into the output.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, say what would be built, stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge fine-tuned models of one base into a backbone and sparse experts.

    Reads one tensor at a time; OUT appears when all is done, and not at all otherwise.

    Example:
      mediator-peft build --base base --expert math=math --expert cron=cron --output out
    """
    from ..build.offline import build_mediator

    quiet_transformers()
    experts = parse_pairs(expert, "--expert")
    config = MediatorSettings(
        merge_method=merge_method,
        density=density,
        density_scope=density_scope,
        budget=budget,
        rank=rank,
        values=values,
        sign_scale=sign_scale,
        sparsifier=sparsifier,
        routed_layers=parse_routed_layers(routed_layers),
        target_modules=target_module or None,
        conflict_score=conflict_score,
        conflict_density=conflict_density,
        conflict_threshold=conflict_threshold,
        router=router,
        router_layer=router_layer,
        ood_alpha=ood_alpha,
        top_p=top_p,
        fallback=fallback,
        for_quantization=for_quantization,
        correction_density=correction_density,
        seed=seed,
    )
    shared: dict[str, Any] = {
        "plan": plan, "workers": workers, "max_memory": max_memory, "allow_pickle": allow_pickle
    }  # fmt: skip
    if dry_run:
        from ..build.preflight import plan_mediator
        from .plan import show_plan

        show_plan(plan_mediator(base, experts, output, config, **shared), as_json)
        return
    report = build_mediator(base, experts, output, config, show_progress=True, hash_inputs=hash_inputs, **shared)
    if as_json:
        print_json(report.to_dict())
        return
    from ..evaluation.sizes import read_adapter_info
    from .inspect import print_info

    print_info(read_adapter_info(output), console())
    say(f"built in {report.seconds:.0f} s; largest resident memory {report.peak_memory_bytes / 1e9:.1f} GB")
    for note in report.notes:
        say(f"note: {note}")
    data = " ".join(f"--data {name}={name}.jsonl" for name in experts)
    say(f"next: mediator-peft calibrate {output} {data}")


def parse_routed_layers(text: str) -> str | float | list[int]:
    """``auto``, ``all``, a share (with a point) or block numbers; anything else is left for the config to refuse."""
    try:
        if "." in text:
            return float(text)
        return [int(number) for number in text.split(",")]
    except ValueError:
        return text
