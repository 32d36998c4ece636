"""Wordings, languages and unknown kinds that were written after the gate's constants had been chosen.

``mediator_peft/demo/hard_prompts.py`` has the sets on which a gate may be developed. These are for the verdict: no
wording and no kind of theirs stands there, none was looked at before the gate was final.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from mediator_peft.demo.hard_prompts import TASKS, HardPrompt, PromptSet, _described, bare_items, with_typos
from mediator_peft.demo.tasks import EXPERT_TASKS

WORDINGS = {
    "maths": (
        "Could you work this out for me? {x}",
        "{x} Give just the number at the end.",
        "Exercise 7. {x}",
        "My daughter has to solve this, and I am stuck: {x}",
    ),
    "cron": (
        "Set up a cron job. When: {x}",
        "What would I put in my crontab to run something like so: {x}?",
        "{x} -> cron",
        "I need the five fields for this timing. {x}",
    ),
    "spelling": (
        "Is this right: {x}? If not, how do you spell it?",
        "I am not sure how to write {x}, please correct me.",
        "{x} - typo, what is the proper word?",
        "Autocorrect this: {x}",
    ),
}
LANGUAGES = {
    "maths": (
        "Anna ha {a} mele. Suo fratello ha {b} mele in meno. Quante mele hanno insieme?",
        "A Ana tem {a} maçãs. O irmão tem menos {b} maçãs. Quantas maçãs têm juntos?",
        "Anna heeft {a} appels. Haar broer heeft {b} appels minder. Hoeveel appels hebben ze samen?",
    ),
    "cron": (
        ("it_IT", "Scrivi un'espressione cron per questo orario: {x}"),
        ("pt_PT", "Escreve uma expressão cron para este horário: {x}"),
        ("nl_NL", "Schrijf een cron-expressie voor dit schema: {x}"),
    ),
    "spelling": (
        "Correggi l'ortografia di questa parola inglese: {x}",
        "Corrige a ortografia desta palavra inglesa: {x}",
        "Verbeter de spelling van dit Engelse woord: {x}",
    ),
}
SHORT_MATHS = (
    "{a} eggs, {b} broken. How many whole ones?",
    "{b} boxes of {a} nails: how many nails?",
    "Bus with {a} people, {b} get on. How many now?",
)
PLACES = (
    "Lisbon", "Oslo", "Kyoto", "Montreal", "Nairobi", "Lima", "Dublin", "Prague", "Seville", "Hanoi", "Cairo",
    "Boston", "Zurich", "Naples", "Tallinn", "Perth", "Quito", "Bergen", "Malta", "Corfu", "Bruges", "Delhi",
    "Porto", "Krakow", "Athens",
)  # fmt: skip
FAR = {
    "travel": (
        "What should I see in {x} on a rainy day?",
        "Is it easy to get around {x} without a car?",
        "Suggest a small hotel in {x}.",
        "Which month is best for a visit to {x}?",
    ),
    "letters": (
        "Write a postcard from {x} to my grandmother.",
        "Draft a polite complaint to a hotel in {x} about the noise.",
        "Compose a toast for a wedding in {x}.",
        "Help me apologise to a friend because I missed our trip to {x}.",
    ),
    "science": (
        "Why do {x} sink or float?",
        "Explain to a child where {x} come from.",
        "How are {x} made?",
        "What is the most surprising thing about {x}?",
    ),
    "rewriting": (
        "Make this friendlier: Send me the {x} today.",
        "Shorten this: I was wondering whether you could possibly send me the {x} at some point.",
        "Put this into French: Where are the {x}?",
        "Say this more clearly: The {x}, being what was asked for, was not what they had been.",
    ),
}
THINGS = (
    "candles", "clouds", "magnets", "pearls", "bubbles", "glaciers", "diamonds", "tides", "mirrors", "crystals",
    "rainbows", "volcanoes", "icebergs", "feathers", "batteries", "tornadoes", "comets", "mushrooms", "fossils",
    "geysers", "coral reefs", "snowflakes", "spiders", "dunes", "lasers",
)  # fmt: skip
PAST_TENSES = """go went|eat ate|write wrote|begin began|buy bought|catch caught|choose chose|come came|draw drew
drink drank|drive drove|fall fell|feel felt|find found|fly flew|forget forgot|get got|give gave|grow grew|hear heard
hold held|keep kept|know knew|leave left|lose lost|make made|meet met|pay paid|ride rode|ring rang|rise rose|run ran
say said|see saw|sell sold|send sent|sing sang|sit sat|sleep slept|speak spoke|spend spent|stand stood|swim swam
take took|teach taught|tell told|think thought|throw threw|understand understood|wear wore|win won"""


COMPARATIVES = """big bigger|small smaller|fast faster|slow slower|tall taller|short shorter|old older|young younger
long longer|cold colder|warm warmer|hard harder|soft softer|strong stronger|weak weaker|rich richer|poor poorer
happy happier|easy easier|heavy heavier|good better|bad worse|deep deeper|clean cleaner|dark darker"""
YOUNG_ANIMALS = """dog puppy|cat kitten|cow calf|sheep lamb|horse foal|hen chick|duck duckling|bear cub|deer fawn
goat kid|frog tadpole|butterfly caterpillar|kangaroo joey|goose gosling|swan cygnet|pig piglet|owl owlet
eagle eaglet|fish fry"""
FEMININE = """king queen|prince princess|actor actress|father mother|brother sister|son daughter|uncle aunt|boy girl
husband wife|nephew niece|waiter waitress|host hostess|duke duchess|emperor empress|god goddess|lion lioness|man woman
hero heroine|heir heiress|widower widow|grandfather grandmother|bull cow|rooster hen|wizard witch"""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def fresh_sets(size: int, seed: int, folder: Path) -> dict[str, PromptSet]:
    """The sets by name, ``size`` prompts each (fewer where the material runs out)."""
    rng = Random(f"fresh-{seed}")
    sets: dict[str, PromptSet] = {}
    for task in TASKS:
        items = bare_items(task, seed, folder)
        match = EXPERT_TASKS[task][1]

        def known(text: str, answer: str, task: str = task, match: str = match) -> HardPrompt:
            return HardPrompt(_user(text), (task,), answer, match, f"{task}-fresh")

        worded = [next(items) for _ in range(size)]
        sets[f"{task}, fresh wording"] = PromptSet(
            "unseen",
            [
                known(WORDINGS[task][number % 4].replace("{x}", item.prompt), item.answer)
                for number, item in enumerate(worded)
            ],
        )
        languages, short, typos = [], [], []
        for number in range(size):
            item, a, b = next(items), rng.randint(12, 60), rng.randint(2, 11)
            if task == "maths":
                languages.append(known(LANGUAGES[task][number % 3].format(a=a, b=b), str(2 * a - b)))
                answer = str((a - b, a * b, a + b)[number % 3])
                short.append(known(SHORT_MATHS[number % 3].format(a=a, b=b), answer))
            elif task == "cron":
                locale, wording = LANGUAGES[task][number % 3]
                languages.append(known(wording.replace("{x}", _described(item.answer, locale)), item.answer))
                short.append(known(f"cron: {item.prompt}", item.answer))
            else:
                languages.append(known(LANGUAGES[task][number % 3].replace("{x}", item.prompt), item.answer))
                short.append(known(f"{item.prompt}?", item.answer))
            before, after = WORDINGS[task][number % 4].split("{x}")
            middle = item.prompt if task == "spelling" else with_typos(item.prompt, 10, rng)
            typos.append(known(with_typos(before, 10, rng) + middle + with_typos(after, 10, rng), item.answer))
        sets[f"{task}, fresh language"] = PromptSet("shifted", languages)
        sets[f"{task}, fresh short"] = PromptSet("shifted", short)
        sets[f"{task}, fresh wording, 10 % typos"] = PromptSet("shifted", typos)
    sets |= _unknown(size, rng, folder)
    return sets


def _unknown(size: int, rng: Random, folder: Path) -> dict[str, PromptSet]:
    sets = {}
    for name, wordings in FAR.items():
        words = PLACES if name in ("travel", "letters") else THINGS
        texts = [wording.replace("{x}", word) for word in words for wording in wordings]
        sets[name] = PromptSet("far", [HardPrompt(_user(text), (), None, "contains", name) for text in texts[:size]])
    verbs = [pair.split() for line in PAST_TENSES.splitlines() for pair in line.split("|")] * 2
    near = {
        "past tenses": iter(
            (f"{('Write the past tense of this verb:', 'What is the past tense of')[n % 2]} {verb}", past, "contains")
            for n, (verb, past) in enumerate(verbs)
        ),
        "percentages": _percentages(rng),
        "times": _times(rng),
        "equations": _equations(rng),
    }
    for name, source in near.items():
        some = [HardPrompt(_user(text), (), answer, match, name) for text, answer, match in _first(source, size)]
        sets[name] = PromptSet("near", some)
    return sets


def _first(source: Iterator[tuple[str, str, str]], size: int) -> list[tuple[str, str, str]]:
    found: dict[str, tuple[str, str, str]] = {}
    for entry, _ in zip(source, range(20 * size)):  # noqa: B905  endless sources of few different prompts
        found.setdefault(entry[0], entry)
        if len(found) == size:
            break
    return list(found.values())


def _percentages(rng: Random) -> Iterator[tuple[str, str, str]]:
    while True:
        percent, whole = rng.choice((10, 20, 25, 50)), 20 * rng.randint(2, 40)
        yield f"What is {percent} % of {whole}?", str(percent * whole // 100), "last_number"


def _times(rng: Random) -> Iterator[tuple[str, str, str]]:
    while True:
        hour, minutes = rng.randint(1, 12), 5 * rng.randint(2, 11)
        yield f"It is {hour}:00. What time is it {minutes} minutes later?", f"{hour}:{minutes:02}", "contains"


def _equations(rng: Random) -> Iterator[tuple[str, str, str]]:
    while True:
        a, x, b = rng.randint(2, 9), rng.randint(1, 12), rng.randint(1, 20)
        yield f"Solve for x: {a}x + {b} = {a * x + b}", str(x), "last_number"


def later_sets(size: int, seed: int) -> dict[str, PromptSet]:
    """Near unknown kinds that were written after the router had been given neighbours, and before it saw any of these.

    None of their requests is among ``mediator_peft/routing/neighbours.py``'s.
    """
    rng = Random(f"later-{seed}")
    sources = {
        "comparatives": _pairs(COMPARATIVES, "Write the comparative of {x}.", "What is the comparative of {x}?"),
        "young animals": _pairs(YOUNG_ANIMALS, "What is a young {x} called?", "Name the young of this animal: {x}"),
        "feminine forms": _pairs(FEMININE, "What is the feminine of {x}?", "Give the feminine form of this noun: {x}"),
        "products": _products(rng),
        "hours": _hours(rng),
        "next in the calendar": _next_in_the_calendar(),
    }
    return {
        name: PromptSet("later", [HardPrompt(_user(t), (), answer, m, name) for t, answer, m in _first(source, size)])
        for name, source in sources.items()
    }


def _pairs(words: str, *wordings: str) -> Iterator[tuple[str, str, str]]:
    pairs = [pair.split() for line in words.splitlines() for pair in line.split("|")]
    for turn in range(len(wordings)):
        for number, (word, answer) in enumerate(pairs):
            yield wordings[(number + turn) % len(wordings)].replace("{x}", word), answer, "contains"


def _products(rng: Random) -> Iterator[tuple[str, str, str]]:
    while True:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        yield f"{('What is', 'Compute')[(a + b) % 2]} {a} times {b}", str(a * b), "last_number"


def _hours(rng: Random) -> Iterator[tuple[str, str, str]]:
    while True:
        number, big, small, each = rng.choice(
            [(rng.randint(2, 12), "hours", "minutes", 60), (rng.randint(2, 9), "weeks", "days", 7),
             (rng.randint(2, 6), "days", "hours", 24), (rng.randint(2, 9), "years", "months", 12)]
        )  # fmt: skip
        yield f"How many {small} are {number} {big}?", str(number * each), "last_number"


def _next_in_the_calendar() -> Iterator[tuple[str, str, str]]:
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for number, name in enumerate(names):
            yield f"Which {kind} comes after {name}?", names[(number + 1) % len(names)], "contains"
            yield f"Which {kind} comes before {name}?", names[number - 1], "contains"
