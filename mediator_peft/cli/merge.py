"""``mediator-peft merge``: checkpoints in, one merged model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import merge_options as options
from .common import AsJson, print_json, quiet_transformers, say
from .option_groups import takes_groups

Method = Annotated[
    str, typer.Option(help="Merge method; `mediator-peft methods` lists all.", rich_help_panel=options.HOW_TO_MERGE)
]


@takes_groups
def merge(
    *,
    sources: options.Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist.", show_default=False)],
    method: Method = options.DEFAULTS.merge_method,
    merge_parameter: options.MergeParameter = None,
    merge_data: options.MergeData = None,
    depth_scaling: options.DepthScaling = None,
    seed: options.Seed = options.DEFAULTS.seed,
    work: options.WorkOptions,
    hash_inputs: Annotated[bool, typer.Option(help="Record the SHA-256 of every input file.")] = True,
    as_json: AsJson = False,
) -> None:
    """Merge fine-tuned models of one base into one plain model, without experts or router.

    Reads one tensor at a time. The output folder, an ordinary transformers checkpoint with tokenizer, appears only when
    the merge is complete; a killed merge continues when the command is run again.

    Example:
      mediator-peft merge --method widen --base base --expert math=math --expert cron=cron --output merged
    """
    from ..config import MediatorSettings
    from ..merge.plain_merge import merge_models

    quiet_transformers()
    config = MediatorSettings(
        merge_method=method,
        merge_parameters=options.parse_parameters(merge_parameter or ()),
        merge_data=merge_data,
        depth_scaling=None if depth_scaling is None else options.parse_depth_scaling(depth_scaling),
        seed=seed,
    )
    report = merge_models(
        sources.base,
        sources.experts,
        output,
        config,
        show_progress=True,
        hash_inputs=hash_inputs,
        **work.arguments(),
    )
    if as_json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        say(f"note: {note}")
    memory = report.peak_memory_bytes / 1e9
    say(f"merged in {report.seconds:.0f} s; largest resident memory {memory:.1f} GB")
    say(f"next: AutoModelForCausalLM.from_pretrained({report.output!r})")
