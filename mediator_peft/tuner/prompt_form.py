"""The one form in which prompts are read for routing: what the user wrote, without template, system prompt or padding.

The same user text then gives the same route plain, in a chat, after a system prompt or as a later turn, when the router
is fitted and when it is used. Token ids are all there is at a forward pass, so the form is defined on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chat_turns import turn_contents, unwrapped

_BLANK_CHARACTERS = frozenset("ĠĊĉčċ▁ \n\t\r")
_BLANK_BYTES = frozenset(("<0x0A>", "<0x0D>", "<0x09>", "<0x20>"))


class PromptForm(NamedTuple):
    """How a tokenizer's prompts are brought to that form."""

    prefix: tuple[int, ...]
    """Tokens that the tokenizer itself puts before a plain text. They are read and not pooled."""

    special: frozenset[int]
    """Special tokens, which are no part of what a user wrote."""

    blank: frozenset[int]
    """Tokens of white space alone; left out at both ends, since templates strip them or add some."""

    def to_config(self) -> dict[str, list[int]]:
        """As plain data."""
        return {name: sorted(value) if name != "prefix" else list(value) for name, value in self._asdict().items()}

    @classmethod
    def from_config(cls, data: dict[str, Any]) -> PromptForm:
        """From :meth:`to_config`."""
        return cls(tuple(data["prefix"]), frozenset(data["special"]), frozenset(data["blank"]))

    def content(self, ids: Sequence[int], markers: Sequence[Sequence[int]] | None, routing_turn: str) -> list[int]:
        """What the user wrote, of one prompt's token ids without padding.

        A prompt without any user turn is taken whole, and one of special tokens or white space alone as it is.

        Args:
            ids: of one prompt.
            markers: opening and close of a user turn; None where the tokenizer has no chat template.
            routing_turn: ``"last"`` or ``"first"`` user turn, or ``"all"`` tokens.
        """
        turns = turn_contents(ids, markers) if markers is not None and routing_turn != "all" else []
        chosen = list(ids[slice(*turns[-1 if routing_turn == "last" else 0])]) if turns else list(ids)
        text = [token for token in chosen if token not in self.special]
        places = [place for place, token in enumerate(text) if token not in self.blank]
        return text[places[0] : places[-1] + 1] if places else list(chosen or ids)


def prompt_form(tokenizer: Any) -> PromptForm:
    """The form of a tokenizer's prompts."""
    plain = unwrapped(tokenizer)
    special = frozenset(getattr(plain, "all_special_ids", ()) or ())
    tokens = plain.get_vocab() if hasattr(plain, "get_vocab") else {}
    blank = frozenset(
        number
        for token, number in tokens.items()
        if token in _BLANK_BYTES or (isinstance(token, str) and token and _BLANK_CHARACTERS.issuperset(token))
    )
    return PromptForm(_own_prefix(plain, special), special, blank)


def _own_prefix(tokenizer: Any, special: frozenset[int]) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts before a plain text, such as ``<bos>``."""
    try:
        ids = list(tokenizer("A")["input_ids"])
    except Exception:  # tokenizers of other libraries may want other arguments
        return ()
    count = next((place for place, token in enumerate(ids) if token not in special), 0)
    return tuple(ids[:count])


class FormedPrompts(NamedTuple):
    """Prompts in that form."""

    input_ids: Tensor
    """(B, T) prefix and content, padded on the right."""

    attention_mask: Tensor
    """(B, T) 1 for real tokens."""

    pooled: Tensor
    """(B, T) 1 for the content."""

    in_place: bool
    """Whether each prompt was in this form already, padding apart."""

    places: Tensor
    """(B, T0) 1 for the content, where it stood in the prompts as given. Of use only ``in_place``."""


def formed(
    form: PromptForm,
    input_ids: Tensor,
    attention_mask: Tensor,
    markers: Sequence[Sequence[int]] | None,
    routing_turn: str,
) -> FormedPrompts:
    """Bring prompts to the form in which they are read for routing.

    Args:
        form: of the tokenizer.
        input_ids: (B, T0)
        attention_mask: (B, T0), 1 for the tokens that may be looked at; padding on either side.
        markers: opening and close of a user turn, or None.
        routing_turn: which turn, or ``"all"``.
    """
    masks = attention_mask.cpu() > 0
    rows, contents, in_place = [], [], True
    places = torch.zeros(input_ids.shape, dtype=torch.long)
    for number, (ids, mask) in enumerate(zip(input_ids.cpu(), masks, strict=True)):
        real = ids[mask].tolist()
        content = form.content(real, markers, routing_turn)
        row = [*form.prefix, *content]
        rows.append(row)
        contents.append(len(content))
        in_place = in_place and row == real
        where = mask.nonzero().flatten()
        places[number, where[len(where) - len(content) :] if content else where[:0]] = 1
    width = max(1, max((len(row) for row in rows), default=1))
    new_ids, new_mask, pooled = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for number, (row, count) in enumerate(zip(rows, contents, strict=True)):
        new_ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        new_mask[number, : len(row)] = 1
        pooled[number, len(row) - count : len(row)] = 1
    device = input_ids.device
    return FormedPrompts(new_ids.to(device), new_mask.to(device), pooled.to(device), in_place, places.to(device))
