"""``mediator-peft generate``: answer prompts, and say which expert did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MediatorError
from .common import AsJson, BatchSize, Device, Dtype, OutputFolder, Quantize, Raw, console, load, print_json


def generate(
    out: OutputFolder,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from the standard input.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Many prompts: a JSONL file with `prompt`, or a text file with one a line.", show_default=False
        ),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Let this expert answer instead of routing.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer is cut off here.")] = 128,
    raw: Raw = False,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or a file of prompts, greedily; prints which expert answered and how sure the router was.

    Example:
      mediator-peft generate out "Write a cron expression: At 04:05 PM"
    """
    import torch

    from ..evaluation.generation import answer_prompts, route_prompts
    from ..progress import bar_progress

    prompts = _prompts(prompt, file)
    model, tokenizer = load(out, dtype, device, quantize)
    shared: dict[str, Any] = {"batch_size": batch_size, "use_template": not raw}
    routes = route_prompts(model, tokenizer, prompts, **shared) if expert is None else None
    weights = torch.tensor([list(route.expert_weights.values()) for route in routes]) if routes else expert
    with bar_progress("answering", len(prompts)) as advance:
        answers = answer_prompts(
            model,
            tokenizer,
            prompts,
            expert_weights=weights,
            max_new_tokens=max_new_tokens,
            advance=advance,
            **shared,
        )
    records: list[dict[str, Any]] = [
        {"prompt": text, "answer": answer} for text, answer in zip(prompts, answers, strict=True)
    ]
    for number, record in enumerate(records):
        if routes is None:
            record.update(expert=expert, routed=False)
        else:
            record.update(routes[number]._asdict(), routed=True)
    if as_json:
        print_json(records)
        return
    target = console()
    for record in records:
        if len(records) > 1:
            target.print(f"> {record['prompt']}", style="dim", markup=False, highlight=False)
        target.print(_who(record), style="cyan", markup=False, highlight=False)
        target.print(record["answer"].strip(), markup=False, highlight=False, soft_wrap=True)
        if len(records) > 1:
            target.print()


def _who(record: dict[str, Any]) -> str:
    """``[cron: weight 1.00, uncertainty 0.00]``, with the other columns that have weight."""
    if not record["routed"]:
        return f"[{record['expert']}: as you asked]"
    others = "".join(
        f", {name} {weight:.2f}"
        for name, weight in record["expert_weights"].items()
        if name != record["expert"] and weight >= 0.005
    )
    unknown = ", an unknown kind of prompt" if record["is_ood"] else ""
    return f"[{record['expert']} {record['weight']:.2f}{others}; uncertainty {record['uncertainty']:.2f}{unknown}]"


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either a prompt or --file.", param_hint="PROMPT")
    if file is None:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
        if not text.strip():
            raise typer.BadParameter("the prompt is empty.", param_hint="PROMPT")
        return [text]
    if file.suffix in (".jsonl", ".json"):
        from ..evaluation.prompts import read_prompts

        return read_prompts(file)
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as fault:
        raise EmptyFileError(f"{file} is no UTF-8 text: {fault}") from fault
    if not lines:
        raise EmptyFileError(f"{file} holds no prompts. Write one a line.")
    return lines


class EmptyFileError(MediatorError, ValueError):
    """A text file gives no prompts."""
