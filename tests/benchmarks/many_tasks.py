# ruff: noqa: E501
"""Up to 50 kinds of requests from own generators, for the router on many tasks; no answers, only prompts."""

from __future__ import annotations

from random import Random

_WORDS = [
    "house",
    "tree",
    "river",
    "angry",
    "bread",
    "quick",
    "window",
    "garden",
    "silver",
    "mother",
    "summer",
    "doctor",
    "letter",
    "table",
    "simple",
    "bright",
    "sugar",
    "horse",
    "winter",
    "engine",
    "market",
    "pencil",
    "bottle",
    "yellow",
    "carpet",
    "thunder",
    "planet",
    "forest",
    "kitchen",
    "shadow",
]
_PLACES = [
    "Peru",
    "Norway",
    "Kenya",
    "Japan",
    "Chile",
    "Poland",
    "Egypt",
    "Canada",
    "Nepal",
    "Cuba",
    "Spain",
    "Ghana",
    "Fiji",
    "Iran",
    "Laos",
    "Malta",
    "Oman",
    "Togo",
]
_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
]
_SENTENCES = (
    "The shop closes at six.", "My parcel never arrived.", "Bees visit many flowers.", "He sold his old car.",
    "The concert was wonderful.", "Nobody answers the phone.", "We moved to the coast.", "Rain is expected tomorrow.",
    "The lift is out of order.", "She speaks four languages.", "Dinner was late again.", "The team lost the final.",
)  # fmt: skip
_FORMS = (
    "Write {n} in Roman numerals.", "Convert {n} to binary.", "Factorise {n}.", "Is {n} a prime number?",
    "Add {n} and {m}.", "Divide {n} by {d}.", "What is {d} percent of {n}?", "Solve for x: {d}x + {m} = {n}",
    "Convert {n} kilometres to miles.", "Convert {m} degrees Celsius to Fahrenheit.", "Convert {n} euros to dollars.",
    "Which weekday is {day} {month} {year}?", "Write {day}.{mo}.{year} in ISO format.",
    "How many days are there between {day} {month} {year} and today?", "Write a cron expression: every {d} hours on weekdays",
    "Translate into German: {s}", "Translate into Spanish: {s}", "Translate into Japanese: {s}",
    "Give the plural of this noun: {w}", "Give the past tense: {v}", "Name a synonym for this word: {w}",
    "Name the opposite of this word: {w}", "What rhymes with this word? {w}", "Split into syllables: {w}",
    "Correct the spelling: {typo}", "Write this word backwards: {w}", "Count the vowels of: {w}",
    "Is the mood of this text positive or negative? {s}", "Find the verb: {s}", "Put this into the passive voice: {s}",
    "Rewrite in capital letters: {s}", "Make this more polite: {s}", "Capital city of {p}?", "Which currency is used in {p}?",
    "Who was the first president of {p}?", "What is the population of {p}?", "Which languages are spoken in {p}?",
    "Write an SQL query that counts the rows of table {w} per {w2}.", "Write a regular expression that matches {w} or {w2}.",
    "Write a Python function named {w} that sorts a list by {w2}.", "Write a bash command that finds files named {w}.txt.",
    "Write the CSS for a {w} box with a border of {d} pixels.", "Make JSON of this: {name} is {m} years old and lives in {p}.",
    "Extract the name: {name} called from {p} about the {w}.", "Write an email to {name} about the {w}.",
    "Write a birthday greeting for {name}, who turns {m}.", "Compose a haiku on: {w}", "Recipe with {w} and {w2}, please.",
    "Suggest a chess opening against {d} pawn moves.", "Write a product description for a {w} made in {p}.",
)  # fmt: skip
_MONTHS = ["January", "March", "May", "July", "August", "October", "December"]


def many_tasks(count: int, size: int, seed: int) -> dict[str, list[str]]:
    """Task → at most ``size`` different prompts.

    Args:
        count: of tasks, at most 50, spread over the list.
        size: prompts a task.
        seed: gives other items.
    """
    chosen = [_FORMS[round(place * (len(_FORMS) - 1) / max(1, count - 1))] for place in range(count)]
    return {form: _drawn(form, size, seed) for form in chosen}


def _drawn(form: str, size: int, seed: int) -> list[str]:
    rng, found = Random(f"{seed} {form}"), {}
    for _ in range(50 * size):
        word, other = rng.sample(_WORDS, 2)
        place = rng.randrange(1, len(word))
        text = form.format(
            n=rng.randint(100, 9999), m=rng.randint(11, 99), d=rng.randint(2, 9), day=rng.randint(1, 28), mo=rng.randint(1, 12),
            month=rng.choice(_MONTHS), year=rng.randint(1950, 2030), s=_sentence(rng), w=word, w2=other,
            v=f"{rng.choice(_NAMES)} {rng.choice(('walks', 'sings', 'thinks', 'goes', 'writes'))} to the {word}.",
            typo=word[:place] + rng.choice("etaoin") + word[place:], p=rng.choice(_PLACES), name=rng.choice(_NAMES),
        )  # fmt: skip
        found[text] = None
        if len(found) == size:
            break
    return list(found)


def _sentence(rng: Random) -> str:
    return f"{rng.choice(_NAMES)} said: {rng.choice(_SENTENCES)}" if rng.random() < 0.6 else rng.choice(_SENTENCES)
