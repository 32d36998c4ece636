"""Calibration texts as other people would have put them: words left out, letters mistyped, something said around it.

An expert's calibration prompts share a wording or two, and the router cannot know which of what they have in common is
chance. Fitted on altered copies as well, it learns in which directions prompts of one expert vary. Our choice, measured
in ``docs/routing.md``.
"""

from __future__ import annotations

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
