"""Items of the demo's tasks: generated, split, written as JSONL."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.replacing import write_replacing
from .settings import DemoSettings
from .tasks import EXPERT_TASKS, UNKNOWN_TASKS, Item, Task, make_task

_LARGEST_NUMBER = 60
_LONGEST_ANSWER = 180


def is_easy_problem(item: Item) -> bool:
    """Whether a word problem is short and stays among small numbers, which a model of this size learns in minutes."""
    numbers = re.findall(r"\d+(?:\.\d+)?", item.prompt + item.answer)
    return len(item.answer) <= _LONGEST_ANSWER and max(map(float, numbers), default=0.0) <= _LARGEST_NUMBER


def is_plain_misspelling(item: Item) -> bool:
    """Whether a word of moderate length is a letter or so away from its misspelling, and begins with the same one."""
    wrong, right = item.prompt.split()[-1], item.answer
    return len(right) <= 10 and wrong[0] == right[0] and SequenceMatcher(None, wrong, right).ratio() >= 0.9


def has_answer(item: Item) -> bool:
    """Whether there is an answer at all; some territories of ``countryinfo`` have no capital."""
    return bool(item.answer.strip())


USABLE: dict[str, Callable[[Item], bool]] = {
    "maths": is_easy_problem,
    "spelling": is_plain_misspelling,
    "capitals": has_answer,
}
"""Task → which of its items the demo takes; all of a task that is not here."""


class Sizes(NamedTuple):
    """Items in each split."""

    train: int
    calibration: int
    test: int


def make_tasks(settings: DemoSettings, materials: Path) -> dict[str, Task]:
    """Items of all tasks, known and unknown; train, calibration and test share no prompt.

    Args:
        settings: how many of each.
        materials: folder where packages are unpacked that are not installed.
    """
    tasks = {}
    for name in [*EXPERT_TASKS, *UNKNOWN_TASKS]:
        recipe = settings.recipes.get(name)
        num_test = settings.num_test[name]
        if recipe:
            sizes = Sizes(recipe.num_steps * recipe.batch_size, settings.num_calibration, num_test)
            tasks[name] = _usable_items(name, sizes, settings.seed, materials)
        else:
            drawn = _usable_items(name, Sizes(1, 1, num_test), settings.seed, materials)
            tasks[name] = Task([], [], drawn.test, drawn.match)
    return tasks


def _usable_items(name: str, sizes: Sizes, seed: int, materials: Path) -> Task:
    """The first usable items of each split of a task, of which as many are drawn as it takes, or as there are."""
    is_usable = USABLE.get(name, lambda item: True)
    times = 1
    while True:
        train, calibration, test = (size * times for size in sizes)
        drawn = make_task(name, train, calibration, test, seed, materials)
        splits = [[item for item in items if is_usable(item)] for items in (drawn.train, drawn.calibration, drawn.test)]
        is_enough = all(len(split) >= size for split, size in zip(splits, sizes, strict=True))
        # The training split is drawn last: it is short where the source has run dry.
        if is_enough or len(drawn.train) < train:
            kept = [split[:size] for split, size in zip(splits, sizes, strict=True)]
            return Task(kept[0], kept[1], kept[2], drawn.match)
        times *= 2


def write_data(tasks: dict[str, Task], folder: Path) -> None:
    """Calibration and test splits as the files that ``mediator-peft calibrate`` and ``eval`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        if task.calibration:
            _write_lines(folder / f"{name}.calibration.jsonl", [{"prompt": item.prompt} for item in task.calibration])
        test = [{"prompt": item.prompt, "answer": item.answer, "match": task.match} for item in task.test]
        _write_lines(folder / f"{name}.test.jsonl", test)


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    write_replacing(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
