"""Other requests about the things that calibration texts are about: near to an expert's task, and not its task.

Calibration texts show what a task is and not where it ends. A question about the same word or number that asks for
something else shows that: a router that is fitted on such ones as well tells a task from its subject. Our choice,
measured in ``docs/routing.md``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random

_SHARED_BY_AT_MOST = 0.15
_WORDS = re.compile(r"[^\W\d_]+|\d+")

_ASKED = (
    (
        "What does {} mean?",
        "Use {} in a sentence.",
        "Translate {} into Spanish.",
        "What rhymes with {}?",
        "Where does the word {} come from?",
        "How many letters are there in {}?",
        "Is {} a noun or a verb?",
        "Write a short rhyme about {}.",
        "Tell me something about {}.",
        "Put {} into capital letters.",
    ),
    (
        "Is {} a prime number?",
        "Round {} to the nearest ten.",
        "Write {} in Roman numerals.",
        "What is half of {}?",
        "Which number comes after {}?",
        "Is {} even or odd?",
        "What is {} squared?",
        "Count down from {}.",
        "What is special about the number {}?",
        "Which is larger, {} or {}?",
    ),
)
_TOLD = (
    (
        "Translate this word into German: {}",
        "Give the meaning of this word: {}",
        "Write a sentence with this word: {}",
        "Write this word backwards: {}",
        "Name the first letter of this word: {}",
        "Make a rhyme on this word: {}",
        "Explain this word to a child: {}",
        "Find another word for this: {}",
    ),
    (
        "Name a year that ends like this number: {}",
        "Name the next number: {}",
        "Give the square root of this number: {}",
        "Round this to the nearest hundred: {}",
        "Multiply this by itself: {}",
        "Sort these numbers: {}, {}",
        "Find the divisors of this number: {}",
        "Count from this number upwards: {}",
    ),
)
HARD_NEGATIVE_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (_ASKED, _TOLD)
"""Ways of asking, each for words and for numbers. Each has a mean of its own in the router: questions and commands with
a colon lie far apart."""


def own_words(texts: Sequence[str], labels: Sequence[int]) -> list[list[str]]:
    """Words and numbers of each text that few of its expert's texts share: what it is about, not how it is put.

    Args:
        texts: as users wrote them.
        labels: number of each text's expert.

    Returns:
        For each text one word at least; all of its words where it shares them all.
    """
    found = [_WORDS.findall(text) for text in texts]
    sizes = Counter(labels)
    counts = Counter((label, word) for words, label in zip(found, labels, strict=True) for word in set(words))

    def is_own(word: str, label: int) -> bool:
        return len(word) > 1 and counts[label, word] <= max(1.0, _SHARED_BY_AT_MOST * sizes[label])

    own = [[word for word in words if is_own(word, label)] for words, label in zip(found, labels, strict=True)]
    return [few or words or ["this"] for few, words in zip(own, found, strict=True)]


def hard_negatives(texts: Sequence[str], labels: Sequence[int], seed: int) -> list[list[str]]:
    """Other requests about a word or number of each text, by each of ``HARD_NEGATIVE_FORMS``.

    Args:
        texts: as users wrote them; their order does not matter.
        labels: number of each text's expert.
        seed: gives other requests.

    Returns:
        One list a way, each as long as ``texts``.
    """
    about = own_words(texts, labels)
    return [
        [_request(way, words, Random(f"{seed} {text}")) for text, words in zip(texts, about, strict=True)]
        for way in HARD_NEGATIVE_FORMS
    ]


def _request(way: tuple[tuple[str, ...], tuple[str, ...]], words: list[str], rng: Random) -> str:
    of_words, of_numbers = way
    word = rng.choice(words)
    if not word.isdigit():
        return rng.choice(of_words).format(word)
    others = [other for other in words if other.isdigit() and other != word]
    return rng.choice(of_numbers).format(word, rng.choice(others or [word]))
