"""``mediator-peft search``: coefficients of a weighted sum of task vectors, from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import merge_options as options
from .common import AsJson, parse_pairs, print_json, quiet_transformers, say
from .option_groups import takes_groups


@takes_groups
def search(
    *,
    method: Annotated[str, typer.Argument(help="expert_merging, map, frank_wolfe or evolution.", show_default=False)],
    sources: options.Sources,
    data: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="JSONL file of prompts of an expert; repeatable.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The coefficients.json to write.", show_default=False)],
    with_answers: Annotated[
        bool, typer.Option("--with-answers", help="Use the column answer; default: imitate each expert.")
    ] = False,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each expert. Default: 5 for expert_merging, 16 for others.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the search, e.g. epochs=3; repeatable.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="With map: draw the Pareto front, e.g. front.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search coefficients for --merge-method weighted. Base, experts and result are held in memory, in float32.

    Example:
      mediator-peft search expert_merging --base base --expert math=math --data math=math.jsonl -o coefficients.json
    """
    from ..evaluation.searches.runner import search_coefficients
    from ..progress import bar_progress

    quiet_transformers()
    settings: dict[str, Any] = options.parse_parameters(option or ())
    content = search_coefficients(
        method,
        sources.base,
        sources.experts,
        parse_pairs(data, "--data"),
        output,
        with_answers=with_answers,
        max_prompts=max_prompts,
        figure=figure,
        progress=bar_progress,
        **settings,
    )
    if as_json:
        print_json(content)
        return
    say(f"written to {output}")
    say(f"next: mediator-peft merge --method weighted --merge-data {output} ...")
