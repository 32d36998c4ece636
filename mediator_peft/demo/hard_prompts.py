"""Prompt sets that are hard for a router: other wordings, languages, typos, mixtures, and kinds nobody knows.

Known tasks come as seen wordings (fresh items), unseen wordings, unseen templates, and shifted ones. Unknown ones are
far from, or near to, a known task. Everything follows from the seed; nothing is fetched but the demo's own packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from ..errors import MissingPackageError
from . import phrasings, tasks

TASKS = ("maths", "cron", "spelling")
_PREFIX = {"maths": "", "cron": "Write a cron expression for this schedule: ", "spelling": "Correct the spelling: "}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Messages = tuple[dict[str, str], ...]


class HardPrompt(NamedTuple):
    """One conversation, and who should answer it."""

    messages: Messages
    """Chat turns, the last one the user's."""

    experts: tuple[str, ...]
    """Experts that may answer; empty for a kind no expert knows."""

    answer: str | None
    """The right answer; None where answers are not judged."""

    match: str
    """A key of ``evaluation.scoring.MATCHERS``."""

    group: str
    """Task and wording (or template), so that whole ones can be held out together."""


class PromptSet(NamedTuple):
    """Prompts of one kind."""

    kind: str
    """``seen``, ``unseen``, ``shifted``, ``mixed``, ``near`` or ``far``."""

    prompts: list[HardPrompt]


def _user(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def bare_items(task: str, seed: int, folder: Path, unseen_templates: bool = False) -> Iterator[tasks.Item]:
    """Endless or finite items of a task without its instruction.

    A quarter of the maths templates is set aside as unseen.
    """
    source = tasks.EXPERT_TASKS[task][0]
    for item in source(Random(f"hard-{task}-{seed}"), folder):
        if task == "maths" and (int(item.template.split("-")[1]) % 4 == 3) != unseen_templates:
            continue
        yield item._replace(prompt=item.prompt.removeprefix(_PREFIX[task]))


def _worded(task: str, item: tasks.Item, wordings: tuple[str, ...], number: int) -> HardPrompt:
    chosen = number % len(wordings)
    text = wordings[chosen].replace("{x}", item.prompt)
    kind = "seen" if wordings is phrasings.SEEN[task] else "unseen"
    return HardPrompt(_user(text), (task,), item.answer, tasks.EXPERT_TASKS[task][1], f"{task}-{kind}-{chosen}")


def calibration_prompts(per_expert: int, seed: int, folder: Path) -> list[HardPrompt]:
    """Prompts to fit a router on: every task in its seen wordings, maths without the templates set aside.

    Args:
        per_expert: prompts of each task.
        seed: another seed than that of the test sets gives other items.
        folder: where the demo's data packages lie.
    """
    prompts = []
    for task in TASKS:
        items = bare_items(task, seed, folder)
        prompts += [_worded(task, next(items), phrasings.SEEN[task], number) for number in range(per_expert)]
    return prompts


def hard_sets(size: int, seed: int, folder: Path) -> dict[str, PromptSet]:
    """All test sets by name, ``size`` prompts each (fewer where the material runs out).

    Raises:
        MissingPackageError: a package of the demo is not installed.
    """
    rng = Random(f"hard-sets-{seed}")
    sets: dict[str, PromptSet] = {}
    for task in TASKS:
        items = bare_items(task, seed, folder)
        sets[f"{task}, seen wording"] = PromptSet("seen", _all_worded(task, items, phrasings.SEEN, size))
        sets[f"{task}, unseen wording"] = PromptSet("unseen", _all_worded(task, items, phrasings.UNSEEN, size))
        if task == "maths":
            unseen = bare_items(task, seed, folder, unseen_templates=True)
            sets["maths, unseen template"] = PromptSet("unseen", _all_worded(task, unseen, phrasings.SEEN, size))
        sets[f"{task}, other language"] = PromptSet("shifted", _other_language(task, rng, folder, size))
        sets[f"{task}, multi-turn"] = PromptSet("shifted", _multi_turn(task, items, size))
        sets[f"{task}, short"] = PromptSet("shifted", _short(task, items, rng, size))
        for percent in (3, 10, 20):
            sets[f"{task}, {percent} % typos"] = PromptSet("shifted", _with_typos(task, items, rng, percent, size))
    sets["two tasks in one"] = PromptSet("mixed", _mixed(rng, seed, folder, size))
    for name, source, kind in (
        ("capitals", _unknown_task("capitals"), "far"),
        ("opposites", _unknown_task("opposites"), "far"),
        ("chat", _topics("chat"), "far"),
        ("code", _topics("code"), "far"),
        ("plurals", _plurals, "near"),
        ("sums", _sums, "near"),
        ("cron read aloud", _cron_backwards, "near"),
    ):
        sets[name] = PromptSet(kind, _take(source(rng, folder), size))
    return sets


def _take(prompts: Iterator[HardPrompt], size: int) -> list[HardPrompt]:
    found: dict[str, HardPrompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.messages[-1]["content"], prompt)
        if len(found) == size:
            break
    return list(found.values())


def _all_worded(
    task: str, items: Iterator[tasks.Item], wordings: dict[str, tuple[str, ...]], size: int
) -> list[HardPrompt]:
    return [_worded(task, next(items), wordings[task], number) for number in range(size)]


def _other_language(task: str, rng: Random, folder: Path, size: int) -> list[HardPrompt]:
    match = tasks.EXPERT_TASKS[task][1]
    items = tasks.EXPERT_TASKS[task][0](rng, folder)
    prompts = []
    for number in range(size):
        language, wording = phrasings.OTHER_LANGUAGE[task][number % 3]
        if task == "maths":
            a, b = rng.randint(12, 60), rng.randint(2, 11)
            text, answer = wording.format(a=a, b=b), str(2 * a - b)
        else:
            item = next(items)
            answer = item.answer
            bare = item.prompt.removeprefix(_PREFIX[task])
            text = wording.replace("{x}", _described(answer, language) if task == "cron" else bare)
        prompts.append(HardPrompt(_user(text), (task,), answer, match, f"{task}-{language}"))
    return prompts


def _described(expression: str, locale: str) -> str:
    try:
        from cron_descriptor import Options, get_description
    except ImportError:
        raise MissingPackageError("the demo needs cron-descriptor: pip install 'mediator_peft[demo]'") from None
    options = Options()
    options.locale_code = locale
    described: str = get_description(expression, options)
    return described


def _multi_turn(task: str, items: Iterator[tasks.Item], size: int) -> list[HardPrompt]:
    prompts = []
    for number in range(size):
        plain = _worded(task, next(items), phrasings.SEEN[task], number)
        earlier: list[dict[str, str]] = []
        for turn in range(1 + number % 2):
            asked, said = phrasings.EARLIER_TURNS[(number // 2 + turn) % len(phrasings.EARLIER_TURNS)]
            earlier += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        prompts.append(plain._replace(messages=(*earlier, *plain.messages), group=f"{task}-turns"))
    return prompts


def _short(task: str, items: Iterator[tasks.Item], rng: Random, size: int) -> list[HardPrompt]:
    match = tasks.EXPERT_TASKS[task][1]
    prompts = []
    for number in range(size):
        if task == "maths":
            a, b = rng.randint(12, 60), rng.randint(2, 11)
            text = phrasings.SHORT_MATHS[number % 3].format(a=a, b=b)
            answer = str((2 * a - b, a * b, a * b)[number % 3])
        else:
            item = next(items)
            text, answer = item.prompt, item.answer
        prompts.append(HardPrompt(_user(text), (task,), answer, match, f"{task}-short"))
    return prompts


def with_typos(text: str, percent: float, rng: Random) -> str:
    """Swap, drop, double or replace letters: ``percent`` of them. Digits stay, for they carry the answer."""
    letters = list(text)
    places = [place for place, letter in enumerate(letters) if letter.isalpha()]
    for place in rng.sample(places, min(len(places), round(len(places) * percent / 100))):
        kind = rng.randrange(4)
        if kind == 0 and place + 1 < len(letters) and letters[place + 1].isalpha():
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        elif kind == 1:
            letters[place] = ""
        elif kind == 2:
            letters[place] *= 2
        else:
            letters[place] = rng.choice(_LETTERS)
    return "".join(letters)


def _with_typos(task: str, items: Iterator[tasks.Item], rng: Random, percent: int, size: int) -> list[HardPrompt]:
    prompts = []
    for number in range(size):
        item = next(items)
        if task == "spelling":  # the word itself is misspelt already: only the instruction gets worse
            wording = phrasings.SEEN[task][number % 4]
            before, after = (with_typos(part, percent, rng) for part in wording.split("{x}"))
            text = f"{before}{item.prompt}{after}"
        else:
            text = with_typos(phrasings.SEEN[task][number % 4].replace("{x}", item.prompt), percent, rng)
        prompts.append(HardPrompt(_user(text), (task,), item.answer, tasks.EXPERT_TASKS[task][1], f"{task}-typos"))
    return prompts


def _mixed(rng: Random, seed: int, folder: Path, size: int) -> list[HardPrompt]:
    sources = {task: bare_items(task, seed + 1, folder) for task in TASKS}
    prompts = []
    for number in range(size):
        pair = rng.sample(TASKS, 2)
        texts = [
            _worded(task, next(sources[task]), phrasings.SEEN[task], number).messages[0]["content"] for task in pair
        ]
        prompts.append(HardPrompt(_user(" And also: ".join(texts)), tuple(pair), None, "contains", "mixed"))
    return prompts


def _unknown_task(name: str) -> Callable[[Random, Path], Iterator[HardPrompt]]:
    source, match = tasks.UNKNOWN_TASKS[name]

    def prompts(rng: Random, folder: Path) -> Iterator[HardPrompt]:
        for item in source(rng, folder):
            yield HardPrompt(_user(item.prompt), (), item.answer, match, name)

    return prompts


def _topics(name: str) -> Callable[[Random, Path], Iterator[HardPrompt]]:
    def prompts(rng: Random, folder: Path) -> Iterator[HardPrompt]:
        for topic in phrasings.TOPICS:
            for wording in phrasings.FAR_UNKNOWN[name]:
                yield HardPrompt(_user(wording.replace("{x}", topic)), (), None, "contains", name)

    return prompts


def _plurals(rng: Random, folder: Path) -> Iterator[HardPrompt]:
    pairs = [pair.split() for line in phrasings.PLURALS.splitlines() for pair in line.split("|")]
    for number, (one, many) in enumerate(pairs * 2):
        wording = ("Write the plural of this word: {x}", "What is the plural of {x}?")[
            (number + number // len(pairs)) % 2
        ]
        yield HardPrompt(_user(wording.replace("{x}", one)), (), many, "contains", "plurals")


def _sums(rng: Random, folder: Path) -> Iterator[HardPrompt]:
    while True:
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        sign, result = rng.choice((("+", a + b), ("-", a - b)))
        yield HardPrompt(_user(f"What is {a} {sign} {b}?"), (), str(result), "last_number", "sums")


def _cron_backwards(rng: Random, folder: Path) -> Iterator[HardPrompt]:
    for item in tasks.cron(rng, folder):
        yield HardPrompt(_user(f"What does the cron expression {item.answer} mean?"), (), None, "contains", "cron-read")
