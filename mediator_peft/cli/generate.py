"""``mediator-peft generate``: answer prompts, and say which expert did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data_files import DataFileError, surrogate_fault, text_lines
from ..errors import MediatorError
from .common import (
    MOST_TOKENS,
    AsJson,
    OutputFolder,
    console,
    print_json,
    say,
)
from .loading import MODEL_LOADING, PROMPTING, ModelLoading, Prompting, load
from .option_groups import takes_groups

_LONGEST_PROMPT = 1 << 24
"""Characters of a prompt on the standard input."""


@takes_groups
def generate(
    out: OutputFolder,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from the standard input.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Many prompts: a JSONL file with a column prompt, or a text file with one prompt a line.",
            show_default=False,
        ),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Use this expert for all prompts, without routing.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of an answer.")] = 128,
    prompting: Prompting = PROMPTING,
    loading: ModelLoading = MODEL_LOADING,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or a file of prompts, by greedy decoding; print the expert and the router's uncertainty.

    Example:
      mediator-peft generate out "Write a cron expression: At 04:05 PM"
    """
    import torch

    from ..evaluation.generation import PromptedModel
    from ..evaluation.prompts import PromptLengthError
    from ..progress import bar_progress

    numbered = _prompts(prompt, file)
    prompts = [text for _, text in numbered]
    model, tokenizer = load(out, loading)
    asked = PromptedModel(model, tokenizer, prompting.settings())
    if expert is None and model.active_peft_config.fitted_router is not None:
        say(
            "note: the router was made from deltas, without prompts of the experts; one fitted on prompts is better: "
            f"mediator-peft fit-router {out} --data NAME=FILE ..."
        )
    try:
        routes = asked.routes(prompts) if expert is None else None
        weights = torch.tensor([list(route.expert_weights.values()) for route in routes]) if routes else expert
        with bar_progress("answering", len(prompts)) as advance:
            answers = asked.answers(prompts, weights, max_new_tokens, advance)
    except PromptLengthError as fault:
        where = "the prompt" if file is None else f"{file}, line {numbered[fault.number][0]}"
        raise DataFileError(f"{where}: {fault.reason}") from fault
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
            target.print(f"> {record['prompt']}", style="dim")
        target.print(_who(record), style="cyan")
        target.print(record["answer"].strip(), soft_wrap=True)
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


def _prompts(prompt: str | None, file: Path | None) -> list[tuple[int, str]]:
    """Prompts with the numbers of their lines."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either a prompt or --file.", param_hint="PROMPT")
    if file is None:
        text = _standard_input() if prompt == "-" else str(prompt)
        fault = surrogate_fault(text) if text.strip() else "is empty"
        if fault is not None:
            raise typer.BadParameter(f"the prompt {fault}.", param_hint="PROMPT")
        return [(1, text)]
    if file.suffix in (".jsonl", ".json"):
        from ..evaluation.prompts import numbered_prompts

        return numbered_prompts(file)
    lines = [(number, text) for number, line in text_lines(file) if (text := line.rstrip("\r\n")).strip()]
    if not lines:
        raise EmptyFileError(f"{file} holds no prompts. Write one a line.")
    return lines


def _standard_input() -> str:
    """One prompt from the standard input, in bounded memory."""
    try:
        text = sys.stdin.read(_LONGEST_PROMPT + 1)
    except UnicodeDecodeError as fault:
        raise EmptyFileError(f"the standard input is not UTF-8 text: {fault}") from fault
    if len(text) > _LONGEST_PROMPT:
        raise EmptyFileError(
            f"the standard input holds more than {_LONGEST_PROMPT:,} characters, the most of a prompt."
        )
    return text


class EmptyFileError(MediatorError, ValueError):
    """A text file gives no prompts."""
