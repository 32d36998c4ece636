"""Calibration data in any of its forms → texts with expert numbers."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RoutingError

Render = Callable[[Any], str]
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class LabelledTexts(NamedTuple):
    """Texts, their experts' numbers and, where a column names them, their groups."""

    texts: list[str]
    labels: list[int]
    groups: list[str] | None
    """Texts of one group (a template, a source) are held out together."""


class Columns(NamedTuple):
    """Which column holds what."""

    text: str = "prompt"
    label: str = "expert"
    group: str | None = None


def labelled_texts(
    dataset: Any,
    experts: Sequence[str],
    columns: Columns | None = None,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    split: str = "train",
    render: Render | None = None,
) -> LabelledTexts:
    """Read calibration data.

    Args:
        dataset: a ``datasets.Dataset``, ``DatasetDict`` or streaming ``IterableDataset``; a list of rows; the path of a
            JSONL, CSV or Parquet file; or a dict expert → any of these or plain texts.
        experts: names of the experts.
        columns: names of the columns.
        max_samples: at most so many texts of each expert, drawn evenly over the data by ``seed``; None takes all.
        seed: of that draw.
        split: which one of a ``DatasetDict``.
        render: makes a text of a chat (a list of messages); without it, texts must be strings.

    Raises:
        RoutingError: a file, column or expert is unknown, a text is no string, or an expert has fewer than two texts.
    """
    columns = columns or Columns()
    chosen = _Sampler(max_samples, seed)
    for text, name, group in _rows(dataset, columns, split, list(experts)):
        if not isinstance(text, str):
            if render is None or not isinstance(text, (list, tuple)):
                raise RoutingError(f"column {columns.text!r} must hold strings or chats, found {type(text).__name__}.")
            text = render(list(text))
        chosen.add(name, (text, group))
    unknown = sorted(set(chosen.kept) - set(experts))
    if unknown:
        raise RoutingError(f"calibration labels {unknown} are no experts of this model; it has {list(experts)}.")
    few = {name: len(chosen.kept.get(name, ())) for name in experts if len(chosen.kept.get(name, ())) < 2}
    if few:
        raise RoutingError(f"each expert needs at least 2 calibration texts, better 50; too few: {few}.")
    rows = [(text, number, group) for number, name in enumerate(experts) for text, group in chosen.kept[name]]
    texts, labels, groups = (list(column) for column in zip(*rows, strict=True))
    return LabelledTexts(texts, labels, groups if columns.group else None)


class _Sampler:
    """Keeps at most ``limit`` rows of each name, every row with the same chance: algorithm R, Vitter 1985."""

    def __init__(self, limit: int | None, seed: int) -> None:
        if limit is not None and limit < 2:
            raise RoutingError(f"max_samples must be 2 or more, got {limit}.")
        self.limit, self.kept, self._seen = limit, {}, {}  # type: ignore[var-annotated]
        self._rng = random.Random(seed)

    def add(self, name: str, row: tuple[str, str]) -> None:
        kept = self.kept.setdefault(name, [])
        self._seen[name] = self._seen.get(name, 0) + 1
        if self.limit is None or len(kept) < self.limit:
            kept.append(row)
            return
        place = self._rng.randrange(self._seen[name])
        if place < self.limit:
            kept[place] = row


def _rows(dataset: Any, columns: Columns, split: str, experts: list[str]) -> Iterator[tuple[Any, str, str]]:
    """(text, expert name, group) of each row."""
    if isinstance(dataset, (str, os.PathLike)):
        dataset = _open_file(Path(dataset))
    if isinstance(dataset, Mapping) and not _is_dataset_dict(dataset):
        for name, texts in dataset.items():
            for row in _texts_of(texts, columns, split):
                yield row[0], str(name), row[1]
        return
    dataset = _one_split(dataset, split)
    names = _check_columns(dataset, (columns.text, columns.label, columns.group))
    to_name = _label_names(dataset, columns.label, experts, names)
    for row in dataset:
        _check_row(row, columns.text, columns.label, columns.group)
        yield row[columns.text], to_name(row[columns.label]), str(row[columns.group]) if columns.group else ""


def _texts_of(texts: Any, columns: Columns, split: str) -> Iterator[tuple[Any, str]]:
    """(text, group) of one expert's texts: strings, chats, rows, a dataset or a file of these."""
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and Path(texts).suffix in _READERS):
        texts = _open_file(Path(texts))
    if isinstance(texts, str):
        raise RoutingError("an expert's texts must be a list of texts or a file, not one string.")
    for row in _one_split(texts, split):
        if isinstance(row, Mapping):
            _check_row(row, columns.text, columns.group)
            yield row[columns.text], str(row[columns.group]) if columns.group else ""
        else:
            yield row, ""


def _is_dataset_dict(dataset: Any) -> bool:
    # Both DatasetDict and IterableDatasetDict know their columns; a plain dict does not.
    return hasattr(dataset, "column_names")


def _one_split(dataset: Any, split: str) -> Iterable[Any]:
    if not isinstance(dataset, Mapping):
        return dataset
    if split not in dataset:
        raise RoutingError(f"the data has no split {split!r}; it has {sorted(dataset)}. Set split.")
    return dataset[split]


def _check_columns(dataset: Any, wanted: Iterable[str | None]) -> list[str]:
    names = list(getattr(dataset, "column_names", None) or [])
    missing = [name for name in wanted if name and names and name not in names]
    if missing:
        raise RoutingError(
            f"the dataset has no column {missing}; it has {names}. Set text_column, label_column, group_column."
        )
    return names


def _check_row(row: Any, *wanted: str | None) -> None:
    missing = [name for name in wanted if name and name not in row]
    if missing:
        raise RoutingError(f"a row has no column {missing}; it has {sorted(row)}.")


def _label_names(dataset: Any, column: str, experts: list[str], names: list[str]) -> Callable[[Any], str]:
    feature: Any = (getattr(dataset, "features", None) or {}).get(column)
    return feature.int2str if hasattr(feature, "int2str") else str


def _open_file(path: Path) -> Any:
    """Rows of a file, streamed.

    Raises:
        RoutingError: it is missing or of another kind.
    """
    kind = _READERS.get(path.suffix)
    if kind is None or not path.is_file():
        problem = "is no file" if kind else f"has an unknown ending; use one of {sorted(_READERS)}"
        raise RoutingError(f"calibration data {str(path)!r}: {problem}.")
    if path.suffix == ".jsonl":
        return _jsonl(path)
    from datasets import load_dataset

    return load_dataset(kind, data_files=str(path), split="train", streaming=True)


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as fault:
                    raise RoutingError(f"{path}, line {number}: no JSON ({fault.msg}).") from fault


def content_hash(text: str, seed: int = 0) -> str:
    """A text's hash, upper or lower case and white space aside; the same in every run and for every order."""
    plain = " ".join(text.lower().split())
    return hashlib.sha256(f"{seed}\n{plain}".encode()).hexdigest()


def hash_folds(keys: Sequence[str], labels: Sequence[int], num_folds: int, seed: int = 0) -> list[int]:
    """Number of the fold that holds each row out: rows of equal key always share one, and every class is spread.

    Args:
        keys: (N,) texts, or groups of texts.
        labels: (N,)
        num_folds: at most so many.
        seed: gives other folds.

    Raises:
        RoutingError: a class has a single key only.
    """
    rank_of: dict[tuple[int, str], int] = {}
    for label in sorted(set(labels)):
        hashes = sorted({content_hash(key, seed) for key, own in zip(keys, labels, strict=True) if own == label})
        if len(hashes) < 2:
            raise RoutingError(
                "each expert needs at least 2 different calibration texts (or groups, if groups are given)."
            )
        rank_of.update({(label, value): rank for rank, value in enumerate(hashes)})
    # A key that two classes share gets the fold of the first class.
    fold_of: dict[str, int] = {}
    for (_, value), rank in rank_of.items():
        fold_of.setdefault(value, rank % num_folds)
    return [fold_of[content_hash(key, seed)] for key in keys]
