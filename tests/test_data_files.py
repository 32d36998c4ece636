"""Odd data files given to the API: each is refused with our error, file and place."""

from __future__ import annotations

import json
import os
import threading
import time

import datasets
import pytest

from mediator_peft.data_files import DataFileError, csv_records, json_lines, open_file, read_text, special_files
from mediator_peft.errors import RoutingError
from mediator_peft.routing.calibration_data import Columns, labelled_texts
from mediator_peft.time_limit import TimeLimitExceeded, time_limit

ROWS = [{"prompt": f"{name} {number}", "expert": name} for name in "ab" for number in range(3)]
BOM = b"\xef\xbb\xbf"


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CSV = b"prompt,expert\n" + b"".join(f"{row['prompt']},{row['expert']}\n".encode() for row in ROWS)

# Name → (file's name, its bytes, what is said). Every file is read both as rows with labels and as one expert's texts.
ODD = {
    "empty jsonl": ("x.jsonl", b"", "at least 2"),
    "blank jsonl": ("x.jsonl", b"\n\n", "at least 2"),
    "no json": ("x.jsonl", jsonl(*ROWS) + b"oops\n", "line 7: not JSON"),
    "cut short": ("x.jsonl", jsonl(*ROWS)[:-5], "line 6: not JSON"),
    "huge integer": ("x.jsonl", jsonl(*ROWS) + b"9" * 5000, "line 7: not JSON .a number has too many digits"),
    "deep": ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "surrogate": ("x.jsonl", jsonl(*ROWS) + rb'{"prompt": "\ud800", "expert": "a"}', "line 7: .* half of a character"),
    "numbers": ("x.jsonl", b"1\n2\n3\n", "line 1: "),
    "nulls": ("x.jsonl", b"null\nnull\n", "line 1: "),
    "number as prompt": ("x.jsonl", jsonl(*ROWS, {"prompt": 5, "expert": "a"}), "line 7: .* strings or chats"),
    "null as prompt": ("x.jsonl", jsonl(*ROWS, {"prompt": None, "expert": "a"}), "line 7: .* strings or chats"),
    "object as prompt": ("x.jsonl", jsonl(*ROWS, {"prompt": {}, "expert": "a"}), "line 7: .* strings or chats"),
    "no prompt": ("x.jsonl", jsonl(*ROWS, {"expert": "a"}), "line 7: a row has no column"),
    "latin-1 jsonl": ("x.jsonl", jsonl(*ROWS) + '{"prompt": "ü"}'.encode("latin-1"), "line 7: not UTF-8"),
    "utf-16 jsonl": ("x.jsonl", jsonl(*ROWS).decode().encode("utf-16"), "UTF-16"),
    "binary jsonl": ("x.jsonl", bytes(range(256)), "not UTF-8"),
    "empty json": ("x.json", b"", "at least 2"),
    "damaged json": ("x.json", b'[{"prompt": "a"}, {"pro', "not JSON"),
    "deep json": ("x.json", b"[" * 100_000, "not JSON"),
    "json of numbers": ("x.json", b"[1, 2]", "element 0: "),
    "json object": ("x.json", b'{"data": []}', "line 1: a row has no column"),
    "json number": ("x.json", b"5", "line 1: "),
    "latin-1 json": ("x.json", '[{"prompt": "ü"}]'.encode("latin-1"), "not UTF-8"),
    "empty csv": ("x.csv", b"", "is empty"),
    "csv header alone": ("x.csv", b"prompt,expert\n", "at least 2"),
    "latin-1 csv": ("x.csv", CSV + "ü,a\n".encode("latin-1"), "line 8: not UTF-8"),
    "utf-16 csv": ("x.csv", CSV.decode().encode("utf-16"), "UTF-16"),
    "csv with an open quote": ("x.csv", CSV + b'"open,a\nnext,b\n', "no CSV"),
    "csv with a stray quote": ("x.csv", CSV + b'"a"b,a\n', "line 8: no CSV"),
    "csv with too many cells": ("x.csv", CSV + b"one,two,three\n", "line 8: 3 cells"),
    "csv with too few cells": ("x.csv", CSV + b"one\n", "line 8: 1 cells"),
    "csv with a column twice": ("x.csv", b"prompt,prompt\na,b\n", "two columns have one name"),
    "csv of another column": ("x.csv", CSV.replace(b"prompt", b"text", 1), "line 2: a row has no column"),
    "binary csv": ("x.csv", bytes(range(256)), "."),
    "zeros csv": ("x.csv", bytes(1000), "."),
    "empty parquet": ("x.parquet", b"", "no Parquet file"),
    "text parquet": ("x.parquet", b"PAR1 this is no Parquet file PAR1", "no Parquet file"),
    "zeros parquet": ("x.parquet", bytes(1000), "no Parquet file"),
    "unknown ending": ("x.txt", b"a\nb\n", "."),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_our_error(kind, tmp_path):
    name, data, message = ODD[kind]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RoutingError, match=message) as rows:
        labelled_texts(path, ["a", "b"])
    with pytest.raises(RoutingError, match=None if "surrogate" in kind else "."):
        labelled_texts({"a": path, "b": ["x", "y"]}, ["a", "b"])
    assert name in str(rows.value)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("way", ["cut", "flip"])
def test_a_damaged_parquet_file_is_our_error(place, way, tmp_path):
    path = tmp_path / "x.parquet"
    many = [{"prompt": f"{row['prompt']} {number}", "expert": row["expert"]} for number in range(200) for row in ROWS]
    datasets.Dataset.from_list(many).to_parquet(path)
    data = bytearray(path.read_bytes())
    start = int(len(data) * place)
    if way == "cut":
        data = data[:start]
    else:
        data[start : start + 40] = bytes(byte ^ 255 for byte in data[start : start + 40])
    path.write_bytes(data)
    try:
        found = labelled_texts(path, ["a", "b"])
    except RoutingError:  # any other exception is a failure
        return
    assert way == "flip"  # the flipped bytes were a statistic, or text
    assert len(found.texts) == len(many)


def test_class_labels_of_a_parquet_file_have_their_names(tmp_path):
    table = datasets.Dataset.from_list(ROWS).cast_column("expert", datasets.ClassLabel(names=["b", "a"]))
    table.to_parquet(tmp_path / "x.parquet")
    assert labelled_texts(tmp_path / "x.parquet", ["a", "b"]).texts == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_taken_off_everywhere(ending, tmp_path):
    data = {"jsonl": jsonl(*ROWS), "json": json.dumps(ROWS).encode(), "csv": CSV}[ending]
    (tmp_path / f"x.{ending}").write_bytes(BOM + data)
    assert labelled_texts(tmp_path / f"x.{ending}", ["a", "b"]).texts == [row["prompt"] for row in ROWS]


def test_csv_cells_hold_commas_quotes_and_line_breaks(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'prompt,expert\r\n"a, ""b""\nc",5\r\n\r\nd,6\r\n')
    rows = [row for _, row in csv_records(tmp_path / "x.csv")]
    assert rows == [{"prompt": 'a, "b"\nc', "expert": "5"}, {"prompt": "d", "expert": "6"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2, 3], "row 0: an object with columns"),
        (5, "must be a list of rows"),
        (None, "must be a list of rows"),
        (b"bytes", "must be a list of rows"),
        ({"a": None, "b": ["x", "y"]}, "texts of expert 'a' must be a list"),
        ({"a": 5, "b": ["x", "y"]}, "texts of expert 'a' must be a list"),
        ({"a": ["x", "\ud800"], "b": ["x", "y"]}, "half of a character"),
        ({"a": [{"text": "x"}], "b": ["x", "y"]}, "row 0: a row has no column"),
        (ROWS + ["text"], "row 6: an object"),
    ],
)
def test_rows_in_memory_that_are_no_rows_are_our_error(data, message):
    with pytest.raises(RoutingError, match=message):
        labelled_texts(data, ["a", "b"], Columns())


def test_a_label_beyond_its_names_is_our_error():
    table = datasets.Dataset.from_list(ROWS).cast_column("expert", datasets.ClassLabel(names=["a", "b"]))
    rows = table.to_list()
    rows[0]["expert"] = 99

    class Labelled(list):
        features = table.features

    with pytest.raises(RoutingError, match=r"row 0.*99"):
        labelled_texts(Labelled(rows), ["a", "b"])


@pytest.mark.parametrize("reader", [open_file, read_text, lambda path: list(json_lines(path, []))])
def test_a_pipe_is_refused_at_once(reader, tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    started = time.perf_counter()
    with pytest.raises(DataFileError, match="pipe"):
        reader(tmp_path / "x.jsonl")
    assert time.perf_counter() - started < 5
    assert special_files(tmp_path) == [str(tmp_path / "x.jsonl")]


def test_a_large_document_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"x" * 101)
    with pytest.raises(DataFileError, match="larger than 100"):
        read_text(tmp_path / "x.json", limit=100)


def test_a_time_limit_interrupts_its_block_and_nothing_after_it():
    found = []

    def work():
        started = time.perf_counter()
        try:
            with time_limit(0.2):
                while True:
                    pass
        except TimeLimitExceeded:
            found.append(time.perf_counter() - started)

    thread = threading.Thread(target=work)
    thread.start()
    work()
    thread.join(30)
    assert len(found) == 2
    with time_limit(0.05):
        pass
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        pass
