"""``mediator-peft merge``: checkpoints in, one merged model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import merge_options as options
from .common import AsJson, parse_pairs, print_json, quiet_transformers, say

Method = Annotated[
    str, typer.Option(help="Merge method; `mediator-peft methods` lists all.", rich_help_panel=options.HOW_TO_MERGE)
]


def merge(
    base: options.Base,
    expert: options.Expert,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist.", show_default=False)],
    method: Method = options.DEFAULTS.merge_method,
    merge_parameter: options.MergeParameter = None,
    merge_data: options.MergeData = None,
    depth_scaling: options.DepthScaling = None,
    seed: options.Seed = options.DEFAULTS.seed,
    workers: options.Workers = 1,
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    dequantize: options.Dequantize = False,
    allow_distant: options.AllowDistant = False,
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
        base,
        parse_pairs(expert, "--expert"),
        output,
        config,
        show_progress=True,
        workers=workers,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        hash_inputs=hash_inputs,
        dequantize=dequantize,
        allow_distant=allow_distant,
    )
    if as_json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        say(f"note: {note}")
    memory = report.peak_memory_bytes / 1e9
    say(f"merged in {report.seconds:.0f} s; largest resident memory {memory:.1f} GB")
    say(f"next: AutoModelForCausalLM.from_pretrained({report.output!r})")
