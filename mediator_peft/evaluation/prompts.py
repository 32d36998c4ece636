"""Prompts from a file to token ids: read, render with the chat template, encode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..context_length import context_length, table_of_positions
from ..data_files import DataFileError, json_lines, text_fault
from ..errors import MediatorError
from ..tables import unknown_name
from ..time_limit import TimeLimitExceeded, time_limit
from .scoring import MATCHERS, last_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PROMPT_TOKENS = 1 << 20
"""Of a prompt, where the model's configuration sets no bound."""

_LISTED = 8
_SHOWN = 40
# Tokens by which a text's count may fall short of that of its beginning, cut within a word.
_CUT = 64
_TEMPLATE_SECONDS = 10
# What is given for JSONL by mistake.
_OTHER_FORMS = (".csv", ".tsv", ".parquet", ".xlsx", ".yaml", ".yml")


class ChatTemplateError(MediatorError, ValueError):
    """A tokenizer's chat template cannot be used."""


class PromptLengthError(MediatorError, ValueError):
    """A prompt is longer than the model can read.

    Args:
        number: of the prompt among those given, from 0.
        reason: what is too long.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"prompt {number + 1}: {reason}")
        self.number, self.reason = number, reason

    def __reduce__(self) -> Any:
        return type(self), (self.number, self.reason)


class TaskItem(NamedTuple):
    """One prompt with its reference answer."""

    prompt: str
    answer: str
    match: str = "exact"
    """A key of ``MATCHERS``."""


class Rendered(NamedTuple):
    """A prompt as the model reads it."""

    text: str
    add_special_tokens: bool
    """False where the text already begins with them, as a chat template writes them itself."""


def read_task(path: str | Path, match: str = "exact", prompt_column: str = "prompt") -> list[TaskItem]:
    """The items of a JSONL file with ``prompt``, ``answer`` and, where it differs from ``match``, ``match``.

    Raises:
        DataFileError: the file is missing or empty, or lines are at fault; all faults are listed with their lines.
    """
    if match not in MATCHERS:
        raise DataFileError(unknown_name(match, MATCHERS, "way to match"))
    items: list[TaskItem] = []
    faults: list[str] = []
    for number, record in _records(Path(path), faults):
        found = _field_faults(record, (prompt_column, "answer"))
        how = record.get("match", match)
        if not isinstance(how, str):
            found.append(f"'match' must be one of {sorted(MATCHERS)}, got {short(how)}")
        elif how not in MATCHERS:
            found.append(unknown_name(how, MATCHERS, "way to match"))
        elif not found and how == "last_number" and last_number(record["answer"]) is None:
            found.append("match is 'last_number', but the answer holds no number")
        if found:
            faults.extend(f"line {number}: {fault}" for fault in found)
        else:
            items.append(TaskItem(record[prompt_column], record["answer"], how))
    _refuse(Path(path), faults, is_empty=not items)
    return items


def read_prompts(path: str | Path, column: str = "prompt") -> list[str]:
    """One text column of a JSONL file.

    Raises:
        DataFileError: the file is missing or empty, or lines are at fault; all faults are listed with their lines.
    """
    return [text for _, text in numbered_prompts(path, column)]


def numbered_prompts(path: str | Path, column: str = "prompt") -> list[tuple[int, str]]:
    """The same, each text with the number of its line, from 1."""
    prompts: list[tuple[int, str]] = []
    faults: list[str] = []
    for number, record in _records(Path(path), faults):
        found = _field_faults(record, (column,))
        if found:
            faults.extend(f"line {number}: {fault}" for fault in found)
        else:
            prompts.append((number, record[column]))
    _refuse(Path(path), faults, is_empty=not prompts)
    return prompts


def _records(path: Path, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that holds one; the others are added to ``faults``."""
    if path.suffix.lower() in _OTHER_FORMS:
        raise DataFileError(f"{str(path)!r} is no JSONL file. Write one JSON object a line, and name it .jsonl.")
    for number, record in json_lines(path, faults):
        if isinstance(record, dict):
            yield number, record
        else:
            faults.append(f"line {number}: a JSON object was expected, not {type(record).__name__}")


def _field_faults(record: dict[str, Any], columns: Sequence[str]) -> list[str]:
    faults = []
    for column in columns:
        if column not in record:
            faults.append(unknown_name(column, record, "column"))
        elif (fault := text_fault(record[column])) is not None:
            faults.append(f"{column!r} {fault}")
    return faults


def _refuse(path: Path, faults: list[str], is_empty: bool) -> None:
    if faults:
        more = f"\n- and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        listed = "\n- ".join(faults[:_LISTED])
        raise DataFileError(f"{path} cannot be used:\n- {listed}{more}")
    if is_empty:
        raise DataFileError(f"{path} holds no items. Write one JSON object a line.")


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, use_template: bool = True) -> Rendered:
    """A prompt as one user message of the tokenizer's chat template, ready for the answer; raw where it has none.

    Args:
        tokenizer: of the model.
        prompt: what the user wrote.
        use_template: False leaves the prompt raw even where there is a template.

    Raises:
        ChatTemplateError: the template is malformed or refuses the prompt.
    """
    if not use_template or not getattr(tokenizer, "chat_template", None):
        return Rendered(prompt, add_special_tokens=True)
    message = {"role": "user", "content": prompt}
    try:
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except Exception as fault:  # whatever a template may raise
        raise ChatTemplateError(
            f"the chat template of the tokenizer cannot render a prompt ({type(fault).__name__}: {fault}). Mend "
            "chat_template.jinja (or tokenizer_config.json) in the backbone's folder, or use prompts as they are "
            "(use_template=False, --raw)."
        ) from fault
    return Rendered(str(text), add_special_tokens=False)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a short prompt, in bounded time.

    A template is a program that comes with a checkpoint; loops in it may run for years.

    Raises:
        ChatTemplateError: the tokenizer's chat template fails, or takes longer than ten seconds.
    """
    try:
        with time_limit(_TEMPLATE_SECONDS):
            render(tokenizer, "hello")
    except (ChatTemplateError, TimeLimitExceeded) as fault:
        if not isinstance(fault, TimeLimitExceeded) and not isinstance(fault.__cause__, TimeLimitExceeded):
            raise
        raise ChatTemplateError(
            f"the chat template of the tokenizer needs more than {_TEMPLATE_SECONDS} s for one short prompt. Take the "
            "loops out of chat_template.jinja (or tokenizer_config.json) in the backbone's folder."
        ) from fault


def token_ids(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[int]:
    """The ids of one rendered prompt."""
    return tokenizer(rendered.text, add_special_tokens=rendered.add_special_tokens)["input_ids"]


def prompt_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    use_template: bool = True,
    num_new: int | Sequence[int] = 0,
) -> list[list[int]]:
    """The ids of each prompt, rendered; each in time and memory bounded by the model's context.

    Args:
        model: whose context bounds the prompts.
        tokenizer: of the model.
        prompts: what a user would write.
        use_template: as for :func:`render`.
        num_new: tokens that are to follow, of all prompts or of each. They count where the model has a table of
            positions; other models count on.

    Raises:
        PromptLengthError: a prompt has more tokens than the model reads at once.
        ChatTemplateError: the template refuses a prompt.
    """
    limit = context_length(getattr(model, "config", None)) or MOST_PROMPT_TOKENS
    table, rows = table_of_positions(model), []
    to_follow = [num_new] * len(prompts) if isinstance(num_new, int) else num_new
    for number, (prompt, new) in enumerate(zip(prompts, to_follow, strict=True)):
        ids = _ids_within(tokenizer, render(tokenizer, prompt, use_template), limit)
        shown = f"({prompt[:_SHOWN]!r}{' ...' if len(prompt) > _SHOWN else ''})"
        if ids is None:
            raise PromptLengthError(
                number, f"more than {limit:,} tokens, the most that the model reads at once {shown}. Shorten the text."
            )
        if table is not None and len(ids) + new > table:
            raise PromptLengthError(
                number,
                f"{len(ids):,} tokens and {new:,} new ones; the model has a table of {table:,} positions {shown}. "
                "Shorten the text, or ask for fewer new tokens.",
            )
        rows.append(ids)
    return rows


def _ids_within(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, limit: int) -> list[int] | None:
    """The ids of a text; None where they are more than ``limit``, mostly found by a beginning of the text."""
    size = 8 * limit
    while size < len(rendered.text):
        if len(token_ids(tokenizer, rendered._replace(text=rendered.text[:size]))) > limit + _CUT:
            return None
        size *= 4
    ids = token_ids(tokenizer, rendered)
    return ids if len(ids) <= limit else None


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The ids of one answer, with the end of text where the tokenizer has one."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of token ids as one batch that ends where generation begins.

    The padding is done here and not by the tokenizer, whose own padding side is thus neither asked nor changed.

    Returns:
        ``input_ids`` and ``attention_mask``, both (B, T) int64.
    """
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def pad_right(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token ids as one batch whose positions count from 0 in every architecture without being told.

    Returns:
        ``input_ids`` and ``attention_mask``, both (B, T) int64.
    """
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([list(row) + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its end of text, else 0. Padding is masked, so any will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], use_template: bool = True) -> dict[str, Tensor]:
    """Prompts, rendered and padded on the left: ``input_ids`` and ``attention_mask``, both (B, T)."""
    rows = [token_ids(tokenizer, render(tokenizer, prompt, use_template)) for prompt in prompts]
    return pad_left(rows, pad_token_id(tokenizer))
