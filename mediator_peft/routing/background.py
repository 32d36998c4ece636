"""Background prompts by family: what people write that belongs to no expert, for outlier exposure.

The families cover what prompts are made of rather than what they are about: questions and requests, other languages
and scripts, code, data, documents, small talk, and garbage. The decision rule is validated on families that were left
out of its fit, so each family should differ from the others as a whole.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from ..errors import RoutingError
from . import background_texts as texts
from .background_kinds import KIND_OF_FAMILY, KINDS, LANGUAGES

Background = Mapping[str, Sequence[str]] | Sequence[str]
"""Family → prompts; or prompts of one kind."""

_USER_GROUPS = 5
"""Into how many groups a user's prompts without families are split, so that each part can be left out."""

BACKGROUND_PROMPTS: tuple[str, ...] = (
    "Summarize the following paragraph in one sentence: The harbour was built in 1890 and enlarged twice since.",
    "Translate this sentence into Italian: The train leaves at noon.",
    "How long should I boil an egg?",
    "Write a short poem about the sea.",
    "Who painted the Mona Lisa?",
    "Explain photosynthesis to a ten-year-old.",
    "Give me three tips for sleeping better.",
    "What causes thunder?",
    "Write an email to my landlord asking to repair the heating.",
    "Which planet is the largest in the solar system?",
    "Is a tomato a fruit or a vegetable?",
    "Rewrite this sentence in a more formal tone: Gotta go, see you later!",
    "List five things to pack for a camping trip.",
    "When did the First World War begin?",
    "What is the difference between a virus and a bacterium?",
    "Suggest a name for a small bakery.",
    "How do I remove a coffee stain from a shirt?",
    "Is this review positive or negative? The service was slow and the soup was cold.",
    "What does the word serendipity mean?",
    "Name the longest river in Africa.",
    "Plan a two-day trip to Rome.",
    "Why is the sky blue?",
    "Write a short story that begins with a locked door.",
    "How many bones does an adult human have?",
    "Can you give me a recipe for pancakes?",
    "Who wrote Pride and Prejudice?",
    "What should I say in a job interview about my weaknesses?",
    "Describe the water cycle.",
    "Turn this into a bullet list: milk, bread, two lemons and a bag of rice.",
    "Which language is spoken in Brazil?",
    "Give an example of a metaphor.",
    "How does a refrigerator work?",
    "Write a birthday wish for a colleague.",
    "What is the boiling point of water in Fahrenheit?",
    "Should I learn the piano or the guitar first?",
    "Find the subject of this sentence: The old dog slept by the fire.",
    "What happened on 20 July 1969?",
    "Compare electric cars with petrol cars.",
    "What are the symptoms of a cold?",
    "Make a headline for an article on urban gardening.",
    "Thank you very much!",
    "What can you do?",
    "Write a regular expression that matches an email address.",
    "What is a binary search tree?",
    "How do I open a text file from the command line?",
    "Extract the names from this text: Yesterday Maria met Tom and his sister Ann.",
    "Complete the sentence: A rolling stone",
    "Which animal is the fastest on land?",
    "How do plants survive in the desert?",
    "Rank these by size: ant, horse, whale, cat.",
    "Give me a synonym for happy.",
    "What is the chemical symbol of gold?",
    "Explain the rules of tennis briefly.",
    "Write a slogan for a shoe shop.",
    "How far is the moon from the earth?",
    "What is the plot of Romeo and Juliet?",
    "Convert this to the past tense: She walks to school.",
    "Which is healthier, butter or olive oil?",
    "What time zone is Tokyo in?",
    "Create a quiz question about ancient Egypt.",
    "How do I tie a tie?",
    "Who was the first president of the United States?",
    "Quel temps fait-il en automne à Paris ?",
    "Erkläre mir kurz, was ein Vertrag ist.",
    "¿Cuáles son los colores del arco iris?",
    "Give me feedback on this sentence: I has went to the shop.",
    "What is inflation in economics?",
    "Write a dialogue between a customer and a waiter.",
    "Tell me about the history of chocolate.",
    "What are prime numbers used for?",
    "Draft a tweet announcing a new library opening.",
    "How can I save money every month?",
    "Which instrument has 88 keys?",
    "Give two arguments for and against homework.",
    "What do bees eat?",
    "Classify this animal: salmon. Mammal, fish or bird?",
    "Fill in the blank: The sun rises in the ___.",
    "How should I water a cactus?",
    "What is a leap year?",
    "Write the opening line of a mystery novel.",
)
"""None of them is from a benchmark, nor from the demo's tasks and test sets."""


def background_families(seed: int, per_family: int = 16) -> dict[str, list[str]]:
    """The library's background prompts: family → prompts.

    Args:
        seed: of the generated ones. Each family is drawn on its own, so another family changes nothing.
        per_family: at most so many prompts of each.
    """

    def some(name: str, prompts: Sequence[str], count: int) -> list[str]:
        return Random(f"{seed} {name}").sample(list(prompts), min(count, len(prompts)))

    first = "requests of many kinds"
    families: dict[str, list[str]] = {first: some(first, BACKGROUND_PROMPTS, 2 * per_family)}
    fixed: dict[str, Sequence[str]] = {
        **texts.OTHER_LANGUAGES,
        "code": texts.CODE,
        "small talk": texts.SMALL_TALK,
        "very short": texts.VERY_SHORT,
        "reviews and mail": texts.REVIEWS_AND_MAIL,
        **KINDS,
    }
    families.update({name: some(name, prompts, per_family) for name, prompts in fixed.items()})
    for name, draw in _GENERATED.items():
        rng = Random(f"{seed} {name}")
        families[name] = list(dict.fromkeys(draw(rng) for _ in range(per_family)))
    return families


def kind_numbers(families: Sequence[str]) -> list[int]:
    """(M,) number of each prompt's kind: families of a kind are left out of a fit together.

    How a rule decides on a kind of prompts that it was not fitted on shows only if no family like it stays in.
    """
    kinds = [KIND_OF_FAMILY.get(name, name) for name in families]
    order = {name: number for number, name in enumerate(sorted(set(kinds)))}
    return [order[name] for name in kinds]


def user_families(background: Background | str | Path) -> dict[str, list[str]]:
    """A user's own background prompts by family.

    Args:
        background: family → prompts, prompts without families, or a JSONL or text file of them: a line holds a prompt,
            or an object with ``prompt`` and, if need be, ``family``. Prompts without families are split by their hash.

    Raises:
        RoutingError: the file cannot be read.
    """
    if isinstance(background, (str, Path)):
        background = _read(Path(background))
    if isinstance(background, Mapping):
        return {str(name): list(prompts) for name, prompts in background.items() if prompts}
    return families_by_hash(background, "yours")


def families_by_hash(prompts: Sequence[str], name: str) -> dict[str, list[str]]:
    """Prompts of one kind as several families, so that others of the kind are in the fit when some are left out."""
    families: dict[str, list[str]] = {}
    for prompt in prompts:
        group = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % _USER_GROUPS
        families.setdefault(f"{name}, part {group + 1}", []).append(prompt)
    return families


def _read(path: Path) -> dict[str, list[str]] | list[str]:
    if not path.is_file():
        raise RoutingError(f"background prompts {str(path)!r}: there is no such file.")
    plain: list[str] = []
    families: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            plain.append(line)
            continue
        try:
            row = json.loads(line)
            prompt = row if isinstance(row, str) else row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as fault:
            raise RoutingError(f"{path}, line {number}: no JSON object with a field 'prompt' ({fault}).") from fault
        family = row.get("family") if isinstance(row, dict) else None
        if family is None:
            plain.append(prompt)
        else:
            families.setdefault(str(family), []).append(prompt)
    if families and plain:
        families["without a family"] = plain
    return families or plain


def random_token_rows(vocabulary: Sequence[int], seed: int, count: int = 40) -> list[list[int]]:
    """Token ids drawn at random, 3 to 24 a prompt.

    Args:
        vocabulary: ids that may be drawn.
        seed: gives other rows.
        count: how many prompts.
    """
    rng = Random(f"{seed} random tokens")
    return [[rng.choice(vocabulary) for _ in range(rng.randint(3, 24))] for _ in range(count)]


def numbers_alone(seed: int, count: int = 16) -> list[str]:
    """Telephone numbers, dates, coordinates, columns of amounts: digits without a request.

    They lie close to experts that work on numbers, so they are trained on and take no part in the stated rate.

    Args:
        seed: gives other prompts.
        count: at most so many.
    """
    rng = Random(f"{seed} numbers alone")

    def digits(size: int) -> str:
        return "".join(rng.choice(string.digits) for _ in range(size))

    def several(least: int, most: int, draw: Callable[[], str], between: str) -> str:
        return between.join(draw() for _ in range(rng.randint(least, most)))

    forms: tuple[Callable[[], str], ...] = (
        lambda: several(3, 5, lambda: digits(4), " "),
        lambda: f"+{digits(2)} {digits(3)} {digits(7)}",
        lambda: f"{rng.randint(1, 28)}.{rng.randint(1, 12)}.20{digits(2)} {rng.randint(0, 23)}:{digits(2)}",
        lambda: several(2, 5, lambda: f"{rng.randint(0, 9)}:{rng.randint(0, 9)}", ", "),
        lambda: f"{rng.randint(1, 89)}.{digits(4)}, {rng.randint(1, 179)}.{digits(4)}",
        lambda: f"978-{digits(1)}-{digits(2)}-{digits(6)}-{digits(1)}",
        lambda: several(3, 9, lambda: str(rng.randint(1, 999)), "; "),
        lambda: several(2, 4, lambda: f"{rng.randint(1, 99)} {digits(3)},{digits(2)}", "\n"),
    )
    return list(dict.fromkeys(rng.choice(forms)() for _ in range(count)))


def _about(forms: Sequence[str], subjects: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(forms).format(rng.choice(subjects))


def _characters(rng: Random) -> str:
    alphabets = (
        string.ascii_lowercase + " ",
        string.ascii_letters + string.digits + string.punctuation + " ",
        string.punctuation + " ",
        string.hexdigits,
        string.ascii_uppercase + "   ",
    )
    alphabet = rng.choice(alphabets)
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(4, 60))).strip() or "x"


def _unknown_words(rng: Random) -> str:
    def word() -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 9)))

    return " ".join(word() for _ in range(rng.randint(1, 9)))


def _key_mashing(rng: Random) -> str:
    rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "sdfjkl", "jkhgfd")
    keys = (rng.choice(rng.choice(rows)) * rng.choice((1, 1, 1, 2)) for _ in range(rng.randint(4, 40)))
    return "".join(key if rng.random() < 0.9 else " " for key in keys).strip() or "asdf"


def _repeated(rng: Random) -> str:
    short = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 4)))
    unit = rng.choice(
        [rng.choice(texts.WORDS), short, rng.choice("!?.-=*#a0"), rng.choice(["ha", "na", "test", "the"])]
    )
    return rng.choice([" ", "", " ", ", "]).join([unit] * rng.randint(4, 40))


def _random_words(rng: Random) -> str:
    return " ".join(rng.choice(texts.WORDS) for _ in range(rng.randint(2, 14)))


def _data(rng: Random) -> str:
    def word() -> str:
        return rng.choice(texts.WORDS)

    def number() -> int:
        return rng.randint(0, 9999)

    def record() -> str:
        return f'{{"id": {number()}, "{word()}": "{word()}"}}'

    forms: tuple[Callable[[], str], ...] = (
        lambda: (
            f'{{"{word()}": {number()}, "{word()}": "{word()}", "{word()}": {rng.choice(["true", "null", "[1, 2]"])}}}'
        ),
        lambda: f"[{', '.join(record() for _ in range(rng.randint(1, 3)))}]",
        lambda: "\n".join(f"{word()},{number()},{word()}" for _ in range(rng.randint(2, 4))),
        lambda: f'<div class="{word()}"><a href="/{word()}">{word()}</a></div>',
        lambda: f"{word()}:\n  - {word()}: {number()}\n  - {word()}: {word()}",
        lambda: f"| {word()} | {word()} |\n|---|---|\n| {number()} | {word()} |",
        lambda: f"{word()} = {number()}\n{word()} = '{word()}'",
    )
    return rng.choice(forms)()


def _log_or_address(rng: Random) -> str:
    word, number = rng.choice(texts.WORDS), rng.randint(0, 9999)
    other, third = rng.choice(texts.WORDS), rng.choice(texts.WORDS)
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
    day = f"20{rng.randint(10, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    level = rng.choice(["INFO", "ERROR", "WARN", "DEBUG"])
    return rng.choice(
        (
            f"{day} {clock} {level} {word}: {other} {third} id={number}",
            f"[{clock}] {level.lower()} {word}[{number}]: {other} {third}",
            f"https://www.{word}{other}.{rng.choice(['com', 'org', 'net'])}/{third}/{number}?{other}={word}",
            f"/usr/{word}/{other}-{number}.{rng.choice(['txt', 'log', 'so', 'cfg'])}",
            f"{word}.{other}@{third}.org",
        )
    )


def _document(rng: Random) -> str:
    def sentence() -> str:
        if rng.random() < 0.4:
            return rng.choice(texts.FURTHER)
        line = f"{rng.choice(texts.WHO)} {rng.choice(texts.DID)} {rng.choice(texts.WHERE)}."
        return line[0].upper() + line[1:]

    text = " ".join(sentence() for _ in range(rng.randint(2, 5)))
    return text + rng.choice(["", "", "", "\n\nSummarise the text above.", "\n\nWhat is this about?"])


def _several(sentences: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: " ".join(rng.sample(list(sentences), rng.randint(1, 3)))


_GENERATED: dict[str, Callable[[Random], str]] = {
    "questions": _about(texts.QUESTIONS, texts.TOPICS),
    "writing requests": _about(texts.WRITING_REQUESTS, texts.TOPICS),
    "requests about a text": _about(texts.TEXT_REQUESTS, texts.SENTENCES),
    "questions about code": _about(texts.CODE_QUESTIONS, texts.PROGRAMMING_LANGUAGES),
    "data and markup": _data,
    "logs and addresses": _log_or_address,
    "random characters": _characters,
    "unknown words": _unknown_words,
    "key mashing": _key_mashing,
    "repetitions": _repeated,
    "random words": _random_words,
    "news": _document,
    "narrative": _several(texts.NARRATIVE),
    "encyclopedic": _several(texts.ENCYCLOPEDIC),
    **{name: _about(*parts) for name, parts in LANGUAGES.items()},
}
