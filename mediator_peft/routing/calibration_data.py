"""Calibration data in any of its forms → texts with expert numbers."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from ..data_files import DataFileError, csv_records, json_array, json_lines, open_file, surrogate_fault
from ..errors import RoutingError

Render = Callable[[Any], str]


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
    for where, text, name, group in _rows(dataset, columns, split, list(experts)):
        if not isinstance(text, str):
            if render is None or not isinstance(text, (list, tuple)):
                raise RoutingError(
                    f"{where}: column {columns.text!r} must hold strings or chats, found {type(text).__name__}."
                )
            try:
                text = render(list(text))
            except Exception as fault:  # whatever a template may raise
                raise RoutingError(f"{where}: the tokenizer's template cannot render this chat: {fault}") from fault
        if (odd := surrogate_fault(text)) is not None:
            raise RoutingError(f"{where}: column {columns.text!r} {odd}.")
        chosen.add(name, (text, group))
    unknown = sorted(set(chosen.kept) - set(experts))
    if unknown:
        raise RoutingError(f"calibration labels {unknown} are no experts of this model; it has {list(experts)}.")
    few = {name: len(chosen.kept.get(name, ())) for name in experts if len(chosen.kept.get(name, ())) < 2}
    if few:
        source = f" in {os.fspath(dataset)!r}" if isinstance(dataset, (str, os.PathLike)) else ""
        raise RoutingError(f"each expert needs at least 2 calibration texts, better 50; too few{source}: {few}.")
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


def _rows(dataset: Any, columns: Columns, split: str, experts: list[str]) -> Iterator[tuple[str, Any, str, str]]:
    """(place, text, expert name, group) of each row; the place is for messages."""
    if isinstance(dataset, (str, os.PathLike)):
        dataset = _open_file(Path(dataset))
    if isinstance(dataset, Mapping) and not _is_dataset_dict(dataset):
        for name, texts in dataset.items():
            for where, text, group in _texts_of(texts, columns, split, str(name)):
                yield where, text, str(name), group
        return
    dataset = _one_split(dataset, split)
    names = _check_columns(dataset, (columns.text, columns.label, columns.group))
    to_name = _label_names(dataset, columns.label, experts, names)
    for where, row in _placed(dataset, "the data"):
        _check_row(where, row, columns.text, columns.label, columns.group)
        try:
            name = to_name(row[columns.label])
        except (ValueError, TypeError, IndexError, KeyError) as fault:
            raise RoutingError(
                f"{where}: column {columns.label!r} holds {short(row[columns.label])}, which is no expert: {fault}"
            ) from fault
        yield where, row[columns.text], name, str(row[columns.group]) if columns.group else ""


def _texts_of(texts: Any, columns: Columns, split: str, name: str) -> Iterator[tuple[str, Any, str]]:
    """(place, text, group) of one expert's texts: strings, chats, rows, a dataset or a file of these."""
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and Path(texts).suffix in _READERS):
        texts = _open_file(Path(texts))
    if isinstance(texts, (str, bytes)):
        raise RoutingError("an expert's texts must be a list of texts or a file, not one string.")
    for where, row in _placed(_one_split(texts, split), f"texts of expert {name!r}"):
        if isinstance(row, Mapping):
            _check_row(where, row, columns.text, columns.group)
            yield where, row[columns.text], str(row[columns.group]) if columns.group else ""
        else:
            yield where, row, ""


class _FileRows:
    """Rows of a file with their places, read anew each time."""

    def __init__(
        self,
        path: Path,
        read: Callable[[], Iterator[tuple[int, Any]]],
        unit: str,
        features: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._read, self._unit = path, read, unit
        self.features = features
        """Column → type, where the file says so; a ``ClassLabel`` names its labels."""

    @property
    def column_names(self) -> list[str]:
        """Empty where only the rows tell."""
        return list(self.features or ())

    def placed(self) -> Iterator[tuple[str, Any]]:
        """(file and line, row) of each."""
        try:
            for number, row in self._read():
                yield f"{self._path}, {self._unit} {number}", row
        except DataFileError as fault:
            raise RoutingError(str(fault)) from fault


def _placed(rows: Any, what: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each row.

    Raises:
        RoutingError: these are no rows.
    """
    if isinstance(rows, _FileRows):
        yield from rows.placed()
        return
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise RoutingError(f"{what} must be a list of rows, a dataset or a file, got {type(rows).__name__}.")
    is_table = hasattr(rows, "columns") and hasattr(rows, "to_dict")  # a pandas DataFrame
    listed: Any = rows
    for number, row in enumerate(listed.to_dict("records") if is_table else listed):
        yield f"{what}, row {number}", row


def _is_dataset_dict(dataset: Any) -> bool:
    # Both DatasetDict and IterableDatasetDict know their columns; a plain dict does not.
    return hasattr(dataset, "column_names")


def _one_split(dataset: Any, split: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if split not in dataset:
        raise RoutingError(f"the data has no split {split!r}; it has {sorted(map(str, dataset))}. Set split.")
    return dataset[split]


def _check_columns(dataset: Any, wanted: Iterable[str | None]) -> list[str]:
    names = list(getattr(dataset, "column_names", None) or [])
    missing = [name for name in wanted if name and names and name not in names]
    if missing:
        raise RoutingError(
            f"the dataset has no column {missing}; it has {names}. Set text_column, label_column, group_column."
        )
    return names


def _check_row(where: str, row: Any, *wanted: str | None) -> None:
    if not isinstance(row, Mapping):
        raise RoutingError(f"{where}: an object with columns was expected, found {short(row)}.")
    missing = [name for name in wanted if name and name not in row]
    if missing:
        raise RoutingError(f"{where}: a row has no column {missing}; it has {sorted(map(str, row))}.")


def _label_names(dataset: Any, column: str, experts: list[str], names: list[str]) -> Callable[[Any], str]:
    feature: Any = (getattr(dataset, "features", None) or {}).get(column)
    return feature.int2str if hasattr(feature, "int2str") else str


def _open_file(path: Path) -> Any:
    """Rows of a file, streamed.

    Raises:
        RoutingError: it is missing, no ordinary file, damaged or of another kind.
    """
    if path.suffix not in _READERS:
        raise RoutingError(f"calibration data {str(path)!r}: has an unknown ending; use one of {sorted(_READERS)}.")
    try:
        open_file(path).close()
        return _READERS[path.suffix](path)
    except DataFileError as fault:
        raise RoutingError(f"calibration data: {fault}") from fault


def _json_lines(path: Path) -> _FileRows:
    return _FileRows(path, lambda: _strict_json_lines(path), "line")


def _strict_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    faults: list[str] = []
    for number, row in json_lines(path, faults):
        if faults:
            break
        yield number, row
    if faults:
        raise DataFileError(f"{path}, {faults[0]}.")


def _json(path: Path) -> _FileRows:
    rows = json_array(path)
    if rows is None:
        return _json_lines(path)
    return _FileRows(path, lambda: iter(enumerate(rows)), "element")


def _csv(path: Path) -> _FileRows:
    return _FileRows(path, lambda: csv_records(path), "line")


def _parquet(path: Path) -> _FileRows:
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    def read() -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield number, row
                        number += 1
        except Exception as fault:  # whatever pyarrow may raise for damaged bytes
            raise DataFileError(f"{path}, after row {number}: damaged ({fault}). Write the file again.") from fault

    try:
        with ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
    except Exception as fault:  # as above
        raise DataFileError(f"{path}: no Parquet file, or a damaged one ({fault}). Write it again.") from fault
    return _FileRows(path, read, "row", features)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


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
