"""``mediator-peft measure``: statistics of a model on prompts, for merge methods that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, print_json, quiet_transformers, say
from .loading import Raw


def measure(
    model: Annotated[str, typer.Argument(help="Expert or base: a folder or a hub id.", show_default=False)],
    prompts: Annotated[Path, typer.Option(help="JSONL file of prompts.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="EXPERT.safetensors in the folder of --merge-data.", show_default=False),
    ],
    statistic: Annotated[
        str, typer.Option(help="gram (regmean), fisher (fisher, ota) or norms (root mean square of layer inputs).")
    ] = "gram",
    text_column: Annotated[str, typer.Option(help="Column that holds the prompt.")] = "prompt",
    answer_column: Annotated[
        str | None, typer.Option(help="Column that holds an answer; with fisher, its positions alone count.")
    ] = None,
    raw: Raw = False,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="A sequence is cut off after so many tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the labels that fisher draws.")] = 0,
    memory: Annotated[str, typer.Option(help="Memory for sums; less of it takes more passes.")] = "2GiB",
    as_json: AsJson = False,
) -> None:
    """Measure one statistic of a model on prompts. A killed measurement continues when the command is run again.

    Example:
      mediator-peft measure maths --prompts maths.jsonl --statistic gram -o side/maths.safetensors
    """
    from ..evaluation.measuring import measure_statistics
    from ..merge.memory import parse_bytes
    from ..progress import bar_progress

    quiet_transformers()
    report = measure_statistics(
        model,
        prompts,
        output,
        statistic,
        text_column=text_column,
        answer_column=answer_column,
        use_template=not raw,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        seed=seed,
        memory_of_sums=parse_bytes(memory) or 1,
        progress=bar_progress,
    )
    if as_json:
        print_json(report.to_dict())
        return
    say(
        f"{report.statistic} of {report.num_tensors} tensors on {report.num_sequences} sequences, {report.num_tokens} "
        f"tokens, in {report.num_passes} pass(es)"
    )
    say(f"{report.cpu_seconds:.0f} CPU seconds; largest resident memory {report.peak_memory_bytes / 1e9:.1f} GB")
    say(f"written to {report.output}, {report.file_bytes / 1e6:.0f} MB")
