"""``mediator-peft demo``: the whole job on a real model, on the spot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, check_folder, console, print_json, quiet_transformers, say
from .loading import Device, pick_device

_GPU_BATCH = 256
"""Prompts at once on a GPU, whose steps take as long for many rows as for few."""


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and items: minutes instead of a quarter of an hour.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for base, experts, model and results.")] = Path("mediator-demo"),
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of items and fine-tuning.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune three experts of a small model, merge them, fit the router and evaluate.

    Needs the extra `demo`; runs on a CPU. Trained experts are kept in the output folder and used again.

    Example:
      mediator-peft demo --quick --output demo
    """
    from ..demo.results import draw_results, print_results
    from ..demo.runner import run_demo
    from ..demo.settings import FULL, QUICK

    quiet_transformers()
    check_folder(output, "--output")
    settings, place = replace(QUICK if quick else FULL, seed=seed), pick_device(device)
    if place.type != "cpu":
        settings = replace(settings, batch_size=_GPU_BATCH)
    report = run_demo(output, settings, say, str(place))
    draw_results(report, output / "results.png")
    if as_json:
        print_json(report.to_dict())
    else:
        print_results(report, console())
    say(f"results, answers and figure are in {output}; try: mediator-peft generate {output / 'model'} 'your prompt'")
