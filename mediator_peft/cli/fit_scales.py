"""``mediator-peft fit-scales``: bring deltas nearer to their experts, at the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AsJson,
    OutputFolder,
    check_output,
    console,
    parse_pairs,
    print_json,
    quiet_transformers,
    reading_output,
    say,
)
from .loading import Raw


def fit_scales(
    out: OutputFolder,
    expert: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="Checkpoint of an expert of OUT; repeatable.", show_default=False),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE", help="JSONL file with prompts, perhaps answers; repeatable.", show_default=False
        ),
    ],
    base: Annotated[Path | None, typer.Option(help="Base of the experts; needed for LoRA experts.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps of Adam, one batch each.")] = 12,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Prompts in one batch.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Order of the prompts.")] = 0,
    raw: Raw = False,
    as_json: AsJson = False,
) -> None:
    """Fit one factor a matrix to each expert's own distribution, as BitDelta does, and save the scales in OUT.

    Scales stay where the divergence on held-out prompts does not fall. Needs the memory of two float32 models.

    Example:
      mediator-peft fit-scales out --expert math=math --data math=math.jsonl
    """
    from ..evaluation.scale_fitting import ScaleFit
    from ..evaluation.scale_fitting import fit_scales as fit

    quiet_transformers()
    check_output(out)
    settings = ScaleFit(num_steps=steps, batch_size=batch_size, seed=seed)
    with reading_output(out):
        reports = fit(
            out,
            parse_pairs(expert, "--expert"),
            parse_pairs(data, "--data"),
            settings,
            base=base,
            use_template=not raw,
            say=say,
        )
    if as_json:
        print_json({name: report.to_dict() for name, report in reports.items()})
        return
    for name, report in reports.items():
        kept = "saved" if report.is_kept else "not saved: it did not fall"
        console().print(
            f"{name}: divergence of {report.num_held_out} held-out prompts {report.divergence_before:.4f} -> "
            f"{report.divergence_after:.4f} nats a token ({kept})"
        )
