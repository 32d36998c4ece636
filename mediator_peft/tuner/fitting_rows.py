"""What a router is fitted on, as rows of token ids: texts, altered copies, background prompts, hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing.augmentation import augment, recombine, shared_words, vary_in_turn
from ..routing.background import background_families, kind_numbers, numbers_alone, random_token_rows, user_families
from ..routing.calibration_data import LabelledTexts, content_hash
from ..routing.decision_rule import Negatives, family_numbers
from ..routing.hard_negatives import HARD_NEGATIVE_FORMS, hard_negatives
from ..routing.translation import LANGUAGES_OF_TABLE, in_other_words
from ..routing.wording import reference_prompts
from .chat_turns import turn_contents, unwrapped, user_turns
from .config import MediatorConfig

_MOST_UNKNOWN = 0.2
_FEWEST_BACKGROUND = 20
_HARD_PER_EXPERT = 25
_TRIED = 100
_BACKGROUND_TOKENS = 24
_LONG_PROMPTS = 14
_OF_LONG_FAMILIES = 12
_HARD_FAMILIES = ("other questions about the same subject", "other commands about the same subject")
RANDOM_TOKENS = "random tokens"
NUMBERS_ALONE = "numbers alone"

COPIES = 1
"""Altered copies of each calibration text, in a way that its text decides."""

_COPIED_PER_EXPERT = 60
"""Texts an expert that are altered; more changed nothing (``docs/routing.md``)."""


class NegativeRows(NamedTuple):
    """Token ids of prompts that belong to no expert."""

    rows: list[list[int]]
    """One a prompt."""

    families: list[str]
    """Each prompt's family."""

    hard: frozenset[str]
    """Families of hard negatives."""

    @classmethod
    def of(cls, families: Mapping[str, list[list[int]]], hard: frozenset[str] = frozenset()) -> NegativeRows:
        """From family → rows."""
        rows = [row for ids in families.values() for row in ids]
        return cls(rows, [name for name, ids in families.items() for _ in ids], hard)

    @property
    def names(self) -> list[str]:
        """The families, in the order of their numbers."""
        return sorted(set(self.families))

    @property
    def can_make_a_rule(self) -> bool:
        """Whether there are enough background prompts for a decision rule."""
        return sum(family not in self.hard for family in self.families) >= _FEWEST_BACKGROUND

    def with_features(self, features: Tensor, basis: Tensor | None = None) -> Negatives | None:
        """With (M, H) features of the rows, and the basis; None where there are too few for a decision rule."""
        if not self.can_make_a_rule:
            return None
        background = torch.tensor([family not in self.hard for family in self.families])
        kinds = torch.tensor(kind_numbers(self.families))
        return Negatives(features, family_numbers(self.families), background, basis, kinds)


class ReferenceRows(NamedTuple):
    """Token ids of requests in many wordings; see :mod:`~mediator_peft.routing.wording`."""

    rows: list[list[int]]
    """One a prompt."""

    tasks: Tensor
    """(P,) number of each prompt's task."""

    wordings: Tensor
    """(P,) number of its wording."""


def token_rows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text."""
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return rows


def reference_rows(tokenizer: Any, seed: int, max_length: int) -> ReferenceRows | None:
    """The reference prompts; None where the tokenizer does not know their words."""
    texts, tasks, wordings = reference_prompts(seed)
    rows = token_rows(tokenizer, texts, max_length)
    return None if _are_unknown(unwrapped(tokenizer), rows) else ReferenceRows(rows, tasks, wordings)


def negative_rows(
    config: MediatorConfig,
    tokenizer: Any,
    data: LabelledTexts,
    rows: list[list[int]],
    background: Any,
    hard_negatives: bool,
    max_length: int,
) -> NegativeRows:
    """Background prompts of all families that the tokenizer can read, and hard negatives beside them.

    Args:
        config: of the model whose experts the texts belong to.
        tokenizer: of its backbone.
        data: the calibration texts.
        rows: their token ids.
        background: the user's own, added to the library's; an empty list for none at all.
        hard_negatives: whether to ask other things about the texts' words and numbers.
        max_length: longer prompts are cut after this many tokens.
    """
    seed = config.seed
    read = background_rows(seed, tokenizer, background, max_length, is_reduced=True)
    hard: list[list[int]] = []
    if hard_negatives and read:
        chosen = _some_of_each(data, seed)
        hard = hard_negative_rows(
            config, tokenizer, [rows[place] for place in chosen], [data.labels[place] for place in chosen], max_length
        )
    size = len(hard) // len(HARD_NEGATIVE_FORMS)
    near = {name: hard[way * size : (way + 1) * size] for way, name in enumerate(_HARD_FAMILIES)} if hard else {}
    if near and RANDOM_TOKENS in read:
        near[NUMBERS_ALONE] = token_rows(tokenizer, numbers_alone(seed), max_length)
    return NegativeRows.of({**read, **near}, frozenset(near))


def background_rows(
    seed: int, tokenizer: Any, background: Any, max_length: int, is_reduced: bool = False
) -> dict[str, list[list[int]]]:
    """Family → token ids of its prompts, of all background families that the tokenizer can read.

    Args:
        seed: chooses the library's prompts.
        tokenizer: of the backbone.
        background: the user's own, added to the library's; an empty list for none at all.
        max_length: longer prompts are cut after this many tokens.
        is_reduced: whether fewer tokens of the library's prompts are read: none is longer than 24 tokens, and a family
            with more than 14 tokens a prompt has at most 12 prompts. Our choice; ``docs/routing.md`` has what it costs.
    """
    own = {} if background is None else user_families(background)
    if background is not None and not own:
        return {}
    plain = unwrapped(tokenizer)
    read: dict[str, list[list[int]]] = {}
    most_tokens = min(max_length, _BACKGROUND_TOKENS) if is_reduced else max_length
    for name, some in background_families(seed).items():
        ids = token_rows(tokenizer, some, most_tokens)
        if not _are_unknown(plain, ids):
            is_long = is_reduced and sum(map(len, ids)) > _LONG_PROMPTS * len(ids)
            read[name] = ids[:_OF_LONG_FAMILIES] if is_long else ids
    read |= {name: token_rows(tokenizer, some, max_length) for name, some in own.items()}
    if set(read) - set(own):
        read[RANDOM_TOKENS] = random_token_rows(_ordinary_tokens(plain), seed)
    return read


def hard_negative_rows(
    config: MediatorConfig, tokenizer: Any, rows: list[list[int]], labels: Sequence[int], max_length: int
) -> list[list[int]]:
    """Other requests about what each text is about, each way of putting them as long as ``rows``.

    Nothing comes of it where the tokenizer does not know the words of these requests.
    """
    plain, markers = unwrapped(tokenizer), config.turn_markers
    if not hasattr(plain, "decode"):
        return []
    texts = [_user_text(plain, row, markers) for row in rows]
    asked = [request for way in hard_negatives(texts, labels, config.seed) for request in way]
    if _are_unknown(plain, plain(asked)["input_ids"]):
        return []
    return token_rows(tokenizer, _in_the_form_of(config, tokenizer, rows[0], asked), max_length)


def augmented_rows(
    config: MediatorConfig,
    tokenizer: Any,
    rows: list[list[int]],
    max_length: int,
    labels: Sequence[int] | None = None,
) -> list[list[int]]:
    """Altered copies of prompts, at most ``COPIES`` times as many as ``rows``; what users wrote is altered alone.

    The ways in which a prompt is altered follow from its text and the seed. A way is left out where the tokenizer does
    not know the words that come of it: its copies would all look alike. With ``labels``, every other prompt has the
    words of its task recombined instead, every fourth one has them in another language, and beyond
    ``_COPIED_PER_EXPERT`` prompts of an expert a copy is the prompt itself, which need not be read again.
    """
    plain, seed, markers = unwrapped(tokenizer), config.seed, config.turn_markers
    if not hasattr(plain, "decode"):
        return []
    texts = [_user_text(plain, row, markers) for row in rows]
    ways = _readable_ways(plain, texts, seed)
    num_copies = min(COPIES, len(ways))
    copies: list[list[list[int]]] = [[list(row) for row in rows] for _ in range(num_copies)]
    ranks = _ranks_by_hash(texts, labels, seed)
    by_task = [None] * len(rows) if labels is None else _changes_by_task(plain, texts, labels, ranks, seed)
    for number, row in enumerate(rows):
        if ranks[number] >= _COPIED_PER_EXPERT:
            continue
        by_words = by_task[number]
        # From the last turn on, so that the places of the others stay as they are.
        for start, stop in reversed(_user_places(row, markers)):
            text = plain.decode(row[start:stop], skip_special_tokens=True)
            changed = vary_in_turn(text, seed, num_copies, ways)
            first = by_words(text) if by_words is not None and changed else None
            changed = changed if first is None else [first, *changed[1:]]
            ids = [] if not changed else plain(changed, add_special_tokens=(start, stop) == (0, len(row)))["input_ids"]
            for copy, new in zip(copies, ids, strict=True):
                copy[number][start:stop] = new
    return [row[:max_length] for copy in copies for row in copy]


def _changes_by_task(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[int], ranks: Sequence[int], seed: int
) -> list[Callable[[str], str | None] | None]:
    """For every other text how its task's words are recombined, for every fourth one how they are translated.

    Neither where the tokenizer does not know the words that come of it.
    """
    shared = shared_words(texts, labels)

    def recombined(words: frozenset[str], text: str) -> str:
        return recombine(text, words, Random(f"{seed} recombine {text}"))

    def translated(words: frozenset[str], language: int, text: str) -> str | None:
        return in_other_words(text, words, language)

    changes: list[Callable[[str], str | None] | None] = [None] * len(texts)
    for every, rest in ((2, 1), (4, 0)):
        chosen = [number for number, rank in enumerate(ranks) if rank % every == rest]
        for number in chosen:
            words, language = shared[labels[number]], ranks[number] // 4 % len(LANGUAGES_OF_TABLE)
            changes[number] = partial(recombined, words) if rest else partial(translated, words, language)
        tried = [change(texts[number]) for number in chosen[:_TRIED] if (change := changes[number]) is not None]
        readable = [text for text in tried if text is not None]
        if readable and _are_unknown(tokenizer, tokenizer(readable)["input_ids"]):
            for number in chosen:
                changes[number] = None
    return changes


def _ranks_by_hash(texts: Sequence[str], labels: Sequence[int] | None, seed: int) -> list[int]:
    """Place of each text among those of its expert, whatever their order; 0 for all without labels."""
    ranks = [0] * len(texts)
    if labels is None:
        return ranks
    seen: dict[int, int] = {}
    for place in sorted(range(len(texts)), key=lambda place: content_hash(texts[place], seed)):
        ranks[place] = seen[labels[place]] = seen.get(labels[place], -1) + 1
    return ranks


def _readable_ways(tokenizer: Any, texts: Sequence[str], seed: int) -> list[int]:
    """Places in ``AUGMENTATIONS`` of the ways whose copies the tokenizer knows the words of."""
    some = sorted(texts, key=lambda text: content_hash(text, seed))[:_TRIED]
    by_way = zip(*(augment(text, seed) for text in some), strict=True)
    return [
        number
        for number, copies in enumerate(by_way)
        if not _are_unknown(tokenizer, tokenizer(list(copies))["input_ids"])
    ]


def _some_of_each(data: LabelledTexts, seed: int) -> list[int]:
    """Numbers of at most ``_HARD_PER_EXPERT`` texts an expert, whatever their order."""
    chosen: list[int] = []
    for label in sorted(set(data.labels)):
        places = [place for place, own in enumerate(data.labels) if own == label]
        places.sort(key=lambda place: content_hash(data.texts[place], seed))
        chosen += places[:_HARD_PER_EXPERT]
    return sorted(chosen)


def _ordinary_tokens(tokenizer: Any) -> list[int]:
    """Ids of the vocabulary that are no special tokens."""
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    return [number for number in range(len(tokenizer)) if number not in special]


def _in_the_form_of(config: MediatorConfig, tokenizer: Any, row: list[int], prompts: list[str]) -> list[str]:
    """Prompts as chats, if the tokens of a calibration text are a chat's."""
    markers = config.turn_markers
    if markers is None or not user_turns(row, markers):
        return prompts
    template = unwrapped(tokenizer).apply_chat_template
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def _are_unknown(tokenizer: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether too many tokens of some texts are unknown ones."""
    unknown = getattr(unwrapped(tokenizer), "unk_token_id", None)
    ids = [token for row in rows for token in row]
    return unknown is not None and ids.count(unknown) > _MOST_UNKNOWN * len(ids)


def _user_text(tokenizer: Any, row: list[int], markers: Any) -> str:
    """What the user wrote in a prompt, all turns."""
    return "\n".join(
        tokenizer.decode(row[slice(*turn)], skip_special_tokens=True) for turn in _user_places(row, markers)
    )


def _user_places(row: list[int], markers: Any) -> list[tuple[int, int]]:
    """(start, stop) of what the user wrote in a prompt; all of it where there are no turns."""
    turns = turn_contents(row, markers) if markers is not None else []
    return turns or [(0, len(row))]
