"""Tasks of the study beside the demo's: numbers in words, WordNet categories, inflected forms, other misspellings.

Each takes its data from a package: num2words (LGPL), WordNet 3.0 as the Debian package ``wordnet-base`` ships it
(WordNet licence), LemmInflect (MIT, after the NIH's SPECIALIST lexicon), codespell (CC BY-SA 3.0). Splits share no
prompt, and everything follows from the seed.
"""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from random import Random

from ..demo import materials
from ..demo.data import is_plain_misspelling
from ..demo.tasks import Item, Task
from ..errors import MissingPackageError

WORDNET_FOLDER = Path("/usr/share/wordnet")
_DATA_FILE = "data.noun"

# Lexicographer files of nouns (lexnames(5WN) of WordNet 3.0) whose nouns a model of 135 M parameters can tell apart;
# the other sixteen, such as act, state and cognition, are left out.
CATEGORIES = {
    5: "animal",
    6: "artifact",
    8: "body",
    10: "communication",
    12: "feeling",
    13: "food",
    15: "location",
    18: "person",
    20: "plant",
    27: "substance",
}
_MOST_PER_CATEGORY = 260
"""Nouns of one category that are used: animals, plants, persons and artifacts would be half of all otherwise."""


def numbers(rng: Random, folder: Path) -> Iterator[Item]:
    """A number below a million → its English words."""
    num2words = _import_num2words()
    while True:
        number = rng.randrange(10 ** rng.randint(2, 5), 10**6) % 10 ** rng.randint(3, 6)
        yield Item(f"Write {number} in words.", num2words(number), "numbers")


def _import_num2words() -> Callable[[int], str]:
    try:
        from num2words import num2words
    except ImportError:
        raise MissingPackageError("the study needs num2words: pip install 'mediator_peft[study]'") from None
    words: Callable[[int], str] = num2words
    return words


def wordnet(rng: Random, folder: Path) -> Iterator[Item]:
    """A noun with one meaning → the lexicographer file it stands in, such as animal or artifact."""
    by_category: dict[str, list[str]] = {}
    for noun, category in one_meaning_nouns(find_wordnet(folder)):
        by_category.setdefault(category, []).append(noun)
    pairs = []
    for category, nouns in sorted(by_category.items()):
        rng.shuffle(nouns)
        pairs += [(noun, category) for noun in nouns[:_MOST_PER_CATEGORY]]
    rng.shuffle(pairs)
    for noun, category in pairs:
        yield Item(f"Which kind of thing is this: {noun}", category, "wordnet")


def find_wordnet(folder: Path) -> Path:
    """Folder with WordNet's ``data.noun``: the system's, or one unpacked below ``folder``, else fetched by apt-get.

    Raises:
        MissingPackageError: WordNet is not installed, and apt-get could not fetch it.
    """
    unpacked = folder / "wordnet"
    for place in (WORDNET_FOLDER, unpacked / "usr" / "share" / "wordnet"):
        if (place / _DATA_FILE).exists():
            return place
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise MissingPackageError(
            f"the study needs WordNet 3.0: put its file {_DATA_FILE} into {WORDNET_FOLDER} (Debian: apt-get install "
            "wordnet-base)."
        )
    unpacked.mkdir(parents=True, exist_ok=True)
    fetched = subprocess.run(
        ["apt-get", "download", "wordnet-base"], cwd=unpacked, capture_output=True, text=True, check=False
    )
    for package in unpacked.glob("wordnet-base_*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=unpacked, check=True)
    if not (unpacked / "usr" / "share" / "wordnet" / _DATA_FILE).exists():
        raise MissingPackageError(f"apt-get could not fetch wordnet-base, which the study needs:\n{fetched.stderr}")
    return unpacked / "usr" / "share" / "wordnet"


def one_meaning_nouns(wordnet_folder: Path) -> list[tuple[str, str]]:
    """(noun, category) of all nouns in lower-case ASCII letters that stand in one synset only, in order of the file.

    A line of ``data.noun``: offset, number of the lexicographer file, ``n``, number of words in hexadecimal, then
    word and id by turns (wndb(5WN)).
    """
    found: dict[str, str | None] = {}
    for line in (wordnet_folder / _DATA_FILE).read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split()
        category, num_words = CATEGORIES.get(int(fields[1])), int(fields[3], 16)
        for word in fields[4 : 4 + 2 * num_words : 2]:
            found[word] = None if word in found else category
    return [
        (word, category)
        for word, category in found.items()
        if category and word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 12
    ]


def inflection(rng: Random, folder: Path) -> Iterator[Item]:
    """A verb → its past tense, or a noun → its plural."""
    questions = {"verb": "What is the past tense of {}?", "noun": "What is the plural of {}?"}
    pairs = inflected_words()
    rng.shuffle(pairs)
    for kind, word, form in pairs:
        yield Item(questions[kind].format(word), form, f"inflection-{kind}")


def inflected_words() -> list[tuple[str, str, str]]:
    """(``verb`` or ``noun``, word, past tense or plural) of LemmInflect's table, where there is one form only."""
    spec = importlib.util.find_spec("lemminflect")
    if spec is None or spec.origin is None:
        raise MissingPackageError("the study needs lemminflect: pip install 'mediator_peft[study]'")
    table = Path(spec.origin).parent / "resources" / "infl_lu.csv.gz"
    found = []
    for line in gzip.decompress(table.read_bytes()).decode().splitlines():
        word, kind, form = line.split(",")[:3]
        is_plain = all(text.isascii() and text.isalpha() and text.islower() for text in (word, form))
        if kind in ("verb", "noun") and is_plain and 3 <= len(word) <= 9 and word != form:
            found.append((kind, word, form))
    return found


def spelling(rng: Random, folder: Path) -> Iterator[Item]:
    """The demo's plain misspellings, in another order for another seed: a family with the demo's own expert."""
    pairs = materials.misspellings()
    rng.shuffle(pairs)
    for wrong, right in pairs:
        item = Item(f"Correct the spelling: {wrong}", right, "spelling")
        if is_plain_misspelling(item):
            yield item


STUDY_TASKS: dict[str, Callable[[Random, Path], Iterator[Item]]] = {
    "numbers": numbers,
    "wordnet": wordnet,
    "inflection": inflection,
    "spelling": spelling,
}


def make_study_task(
    name: str,
    num_train: int,
    num_calibration: int,
    num_test: int,
    seed: int,
    folder: Path,
    taken: Set[str] = frozenset(),
) -> Task:
    """Items of one task of the study, in three splits that share no prompt; all are judged by exact match.

    Args:
        name: a key of ``STUDY_TASKS``.
        num_train: most items of the training split, which is drawn last and is shorter where the data run out.
        num_calibration: items of the split that the router is fitted on.
        num_test: items of the test split, drawn first.
        seed: of everything random.
        folder: where data are unpacked that are not installed.
        taken: prompts that no split may hold.
    """
    source, seen = STUDY_TASKS[name](Random(f"study-{name}-{seed}"), folder), set(taken)
    splits: list[list[Item]] = []
    for count in (num_test, num_calibration, num_train):
        split: list[Item] = []
        while len(split) < count and (item := next(source, None)) is not None:
            if item.prompt not in seen:
                seen.add(item.prompt)
                split.append(item)
        splits.append(split)
    return Task(splits[2], splits[1], splits[0], "exact")
