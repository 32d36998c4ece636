"""Which tokens of a chat decide its route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WORDS = ("A", "B")


def unwrapped(tokenizer: Any) -> Any:
    """The tokenizer itself, where settings were bound to its call by ``functools.partial``."""
    return getattr(tokenizer, "func", tokenizer)


def turn_markers(tokenizer: Any) -> list[list[int]] | None:
    """Token ids that open and close a user turn in a tokenizer's chat template; None where it has none.

    They are what two chats of the same form and different words have in common around the words.
    """
    tokenizer = unwrapped(tokenizer)
    words = _two_words(tokenizer) if getattr(tokenizer, "chat_template", None) is not None else None
    if words is None:
        return None
    chats = [
        [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}] * 2
        for user, assistant in (words, words[::-1])
    ]
    try:
        first, second = (
            tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
            for chat in chats
        )
    except Exception:  # a template may refuse any chat, in any way
        return None
    tail = list(first[_last_difference(first, second) + 1 :])
    frame = _common_frame(first, second)
    return None if frame is None else _without_earlier_close(frame, tail)


def _last_difference(first: Sequence[int], second: Sequence[int]) -> int:
    return max((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), default=-1)


def _without_earlier_close(frame: list[list[int]], tail: list[int]) -> list[list[int]]:
    """The frame without the close of the assistant turn before, which the template's own system prompt may share.

    Args:
        frame: opening and close of a user turn.
        tail: what stands after the last assistant turn.
    """
    opening, closing = frame
    for length in range(min(len(tail), len(opening) - 1), 0, -1):
        if opening[:length] == tail[-length:]:
            return [opening[length:], closing]
    return frame


def _two_words(tokenizer: Any) -> tuple[str, str] | None:
    """Two texts of one known token each."""
    found: list[str] = []
    candidates = (*_WORDS, *(tokenizer.decode([number]).strip() for number in range(5, min(200, len(tokenizer)))))
    for word in candidates:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"] if word and word not in found else []
        if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
            found.append(word)
        if len(found) == 2:
            return found[0], found[1]
    return None


def _common_frame(first: Sequence[int], second: Sequence[int]) -> list[list[int]] | None:
    """What stands before each user's word and between it and the assistant's."""
    words = [place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    if len(first) != len(second) or len(words) != 4:
        return None
    user, assistant, next_user, _ = words
    length = 0
    while length < min(user, next_user - assistant - 1) and first[user - 1 - length] == first[next_user - 1 - length]:
        length += 1
    opening, closing = list(first[user - length : user]), list(first[user + 1 : assistant])
    return [opening, closing] if opening and closing else None


def routing_rows(
    input_ids: Tensor, attention_mask: Tensor, markers: Sequence[Sequence[int]] | None, routing_turn: str
) -> tuple[Tensor, Tensor]:
    """The part of each chat that is routed on, as prompts of their own.

    Args:
        input_ids: (B, T)
        attention_mask: (B, T)
        markers: opening and close of a user turn; without them whole rows are taken.
        routing_turn: ``"last"`` or ``"first"`` user turn, or ``"all"`` tokens.

    Returns:
        Token ids and mask, (B, T') each, padded on the right. A turn keeps its opening and its close, with which the
        assistant's turn begins: it reads like a chat of this one turn.
    """
    if routing_turn == "all" or markers is None:
        return input_ids, attention_mask
    rows = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        real = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
        spans = user_turns(real, markers)
        chosen = spans[-1 if routing_turn == "last" else 0] if spans else (0, len(real))
        rows.append(real[slice(*chosen)])
    new_ids, new_mask = padded(rows)
    return new_ids.to(input_ids.device), new_mask.to(input_ids.device)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each; padded by hand, for a tokenizer may have no padding token."""
    width = max(1, max(len(row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids, mask


def turn_mask(
    input_ids: Tensor, attention_mask: Tensor, markers: Sequence[Sequence[int]] | None, routing_turn: str
) -> Tensor:
    """As :func:`routing_rows`, the chosen tokens left in their place: (B, T), 1 for a token that is routed on."""
    if routing_turn == "all" or markers is None:
        return attention_mask
    chosen = torch.zeros(input_ids.shape, dtype=torch.long)
    mask = attention_mask.cpu()
    for row, (ids, real) in enumerate(zip(input_ids.tolist(), mask, strict=True)):
        places = real.nonzero().flatten()
        spans = user_turns([ids[place] for place in places.tolist()], markers)
        start, stop = spans[-1 if routing_turn == "last" else 0] if spans else (0, len(places))
        chosen[row, places[start:stop]] = 1
    return chosen.to(input_ids.device)


def user_turns(ids: Sequence[int], markers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(start, stop) of each user turn in a chat's token ids, opening and close included."""
    opening, end = list(markers[0]), list(markers[1])
    spans = []
    place = 0
    while place <= len(ids) - len(opening):
        if list(ids[place : place + len(opening)]) == opening:
            stop = _find(ids, end, place + len(opening))
            spans.append((place, stop))
            place = stop
        else:
            place += 1
    return spans


def turn_contents(ids: Sequence[int], markers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(start, stop) of what stands between opening and close of each user turn.

    A last turn may lack its close, or a part of it: that of a prompt to which no assistant turn has been opened.
    """
    opening, close = list(markers[0]), list(markers[1])
    contents = []
    for start, stop in user_turns(ids, markers):
        start += len(opening)
        lengths = range(min(len(close), stop - start), 0, -1)
        cut = next((length for length in lengths if list(ids[stop - length : stop]) == close[:length]), 0)
        contents.append((start, stop - cut))
    return contents


def _find(ids: Sequence[int], wanted: list[int], start: int) -> int:
    for place in range(start, len(ids) - len(wanted) + 1):
        if list(ids[place : place + len(wanted)]) == wanted:
            return place + len(wanted)
    return len(ids)
