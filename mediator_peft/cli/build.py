"""``mediator-peft build``: checkpoints in, backbone and sparse experts out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, console, print_json, quiet_transformers, say
from .fit_router import made_from_deltas, say_made
from .merge_options import MergeOptions, Sources, WorkOptions, merge_settings
from .option_groups import takes_groups


@takes_groups
def build(
    ctx: typer.Context,
    *,
    sources: Sources,
    merging: MergeOptions,
    work: WorkOptions,
    output: Annotated[Path, typer.Option(help="Output folder; must not exist.", show_default=False)],
    hash_inputs: Annotated[bool, typer.Option(help="Record the SHA-256 of every input file.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs and print the plan; write nothing.")
    ] = False,
    router_from_deltas: Annotated[
        bool,
        typer.Option("--router-from-deltas", help="Make a router too, without prompts; as fit-router --from-deltas."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge fine-tuned models of one base into a backbone and sparse experts.

    Reads one tensor at a time. The output folder appears only when the build is complete; a killed build continues
    where it stopped when the command is run again.

    Example:
      mediator-peft build --base base --expert math=math --expert cron=cron --output out
    """
    from ..merge.offline import build_mediator

    quiet_transformers()
    experts, config = sources.experts, merge_settings(ctx, sources.base, merging)
    options = {"plan": merging.plan_file, **work.arguments()}
    if dry_run:
        from ..merge.preflight import plan_mediator
        from .plan import show_plan

        show_plan(plan_mediator(base=sources.base, experts=experts, output=output, config=config, **options), as_json)
        return
    report = build_mediator(
        base=sources.base,
        experts=experts,
        output=output,
        config=config,
        show_progress=True,
        hash_inputs=hash_inputs,
        **options,
    )
    routing = made_from_deltas(output) if router_from_deltas else None
    if as_json:
        print_json({**report.to_dict(), **({} if routing is None else {"routing": routing})})
        return
    from ..checkpoints.adapter_sizes import read_adapter_info
    from .inspect import print_info

    print_info(read_adapter_info(output), console())
    say(f"built in {report.seconds:.0f} s; largest resident memory {report.peak_memory_bytes / 1e9:.1f} GB")
    for note in report.notes:
        say(f"note: {note}")
    if routing is not None:
        say_made(output, routing)
        return
    data = " ".join(f"--data {name}={name}.jsonl" for name in experts)
    say(f"next: mediator-peft fit-router {output} {data}")
    say(f"without prompts: mediator-peft fit-router {output} --from-deltas")
