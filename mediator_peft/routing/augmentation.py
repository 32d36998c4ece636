"""Calibration texts as other people would have put them: words left out, letters mistyped, something said around it.

An expert's calibration prompts share a wording or two, and the router cannot know which of what they have in common is
chance. Fitted on altered copies as well, it learns in which directions prompts of one expert vary. Our choice, measured
in ``docs/routing.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

_SHARE_OF_WORDS = 0.3
_SHARE_OF_LETTERS = 0.1
_AROUND = (
    "Hi there! {}",
    "{} Many thanks!",
    "Sorry to bother you. {}",
    "I have got one more for you. {}",
    "{} It is urgent.",
    "Good morning. {} Have a nice day!",
    "Next one, then. {}",
    "{} Take your time.",
    "As promised, here it comes: {}",
    "We talked about this before. {}",
    "{} (sent from my phone)",
    "Someone asked me this yesterday. {}",
)

_FORMS = (
    "Please {lower}",
    "Could you {lower}",
    "I need help with this. {}",
    "Q: {}\nA:",
    "Task: {}",
    "Can you help me? {}",
    "Hello, {lower}",
    "{}\nGive only the answer.",
    "Here is my question: {}",
    "{} - how do I do that?",
    "Can somebody {lower}",
    "Input: {}\nOutput:",
    "{}, quickly",
    "Bitte: {}",
    "Hola, {lower} Gracias.",
    "S'il te plaît : {}",
)


def leave_words_out(text: str, rng: Random) -> str:
    """About three words in ten are missing; at least one stays."""
    words = text.split()
    kept = [word for word in words if rng.random() >= _SHARE_OF_WORDS]
    return " ".join(kept or [rng.choice(words)] if words else [])


def mistype(text: str, rng: Random) -> str:
    """About one letter in ten is left out, replaced by another of the text, or followed by one."""
    letters = [letter for letter in text if letter.isalpha()]
    typed = []
    for letter in text:
        if letter.isalpha() and rng.random() < _SHARE_OF_LETTERS:
            other = rng.choice(letters)
            typed.append(rng.choice(("", other, letter + other)))
        else:
            typed.append(letter)
    return "".join(typed) or text


def say_more(text: str, rng: Random) -> str:
    """Something is said before or after it that does not belong to the matter, in English."""
    return rng.choice(_AROUND).format(text) if text.strip() else text


def put_differently(text: str, rng: Random) -> str:
    """As a polite request, a task with input and output, or with a word of another language before it."""
    return rng.choice(_FORMS).format(text, lower=text[:1].lower() + text[1:]) if text.strip() else text


_SHARED_BY_AT_LEAST = 0.5
_EDGES = ".,:;!?\"'()"
_RECOMBINED = (
    "{shared} {own}",
    "{own} {shared}",
    "{own}: {shared}?",
    "What is the {shared} of {own}?",
    "How do I {shared} {own}?",
    "I need {shared} for {own}.",
    "{own} - {shared}",
    "Can you {shared} {own}?",
    "{shared}? {own}",
    "{shared}: {own}",
    "My {shared} is {own}, please help.",
    "{own}, {shared} please",
    "Give me {shared}, {own}",
    "Which {shared} has {own}?",
    "Someone wrote {own}. {shared}?",
    "I am looking for {shared}. {own}",
)


def bare_word(word: str) -> str:
    """Without punctuation around it, in lower case."""
    return word.strip(_EDGES).lower()


def shared_words(texts: Sequence[str], labels: Sequence[int]) -> dict[int, frozenset[str]]:
    """Words that at least half of an expert's texts have in common: how its task is asked for, not what about.

    Args:
        texts: as users wrote them.
        labels: number of each text's expert.

    Returns:
        Expert → words without punctuation, in lower case.
    """
    sizes = Counter(labels)
    pairs = [
        (label, word) for text, label in zip(texts, labels, strict=True) for word in set(map(bare_word, text.split()))
    ]
    often = [(label, word) for (label, word), n in Counter(pairs).items() if n >= _SHARED_BY_AT_LEAST * sizes[label]]
    return {label: frozenset(word for owner, word in often if owner == label and word) for label in sizes}


def recombine(text: str, shared: frozenset[str], rng: Random) -> str:
    """One to three of the words by which a task is asked for, put in another way around what the text is about.

    It shows that "spelling" makes a request one about spelling, in whatever sentence it stands. A text that has no
    words of its own, or none that it shares, stays as it is.

    Args:
        text: as a user wrote it.
        shared: words of :func:`shared_words`.
        rng: draws words and sentence.
    """
    words = text.split()
    own = " ".join(word for word in words if bare_word(word) not in shared)
    task = sorted({word.strip(_EDGES) for word in words if bare_word(word) in shared and len(bare_word(word)) > 2})
    if not own or not task:
        return text
    count = rng.choice((1, 1, 2, 2, 3))
    chosen = rng.sample(task, min(count, len(task)))
    longest = max(task, key=len)
    if count < 3 and longest not in chosen and rng.random() < 0.5:
        chosen[0] = longest
    form = rng.choice(_RECOMBINED)
    about = own if form.endswith("{own}") else own.rstrip(".:")
    changed = form.format(shared=" ".join(chosen).lower(), own=about)
    return changed[:1].upper() + changed[1:] if rng.random() < 0.7 else changed


AUGMENTATIONS: tuple[Callable[[str, Random], str], ...] = (
    leave_words_out,
    mistype,
    say_more,
    put_differently,
)


def vary_in_turn(text: str, seed: int, copies: int, ways: Sequence[int] = range(len(AUGMENTATIONS))) -> list[str]:
    """Altered copies of a text, each made in another way, drawn by the text and the seed.

    Args:
        text: as a user wrote it.
        seed: gives other copies.
        copies: how many; at most as many as ``ways``.
        ways: places in ``AUGMENTATIONS`` to draw from.
    """
    chosen = Random(f"{seed} ways {text}").sample(list(ways), copies)
    return [AUGMENTATIONS[number](text, Random(f"{seed} {number} {text}")) for number in chosen]


def augment(text: str, seed: int) -> list[str]:
    """The text once by each of ``AUGMENTATIONS``; what comes out follows from the text and the seed alone."""
    return [change(text, Random(f"{seed} {number} {text}")) for number, change in enumerate(AUGMENTATIONS)]
