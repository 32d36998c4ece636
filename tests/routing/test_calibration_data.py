"""Calibration data in all its forms; splits that do not leak; features that are computed once."""

import json

import datasets
import pytest
import torch

from mediator_peft.errors import RoutingError
from mediator_peft.routing.calibration import calibrate, cross_fit
from mediator_peft.routing.calibration_data import Columns, content_hash, hash_folds, labelled_texts
from mediator_peft.routing.feature_cache import FeatureCache
from mediator_peft.routing.routers import ROUTERS

ROWS = [
    {"prompt": f"{name} {number}", "expert": name, "kind": f"k{number % 3}"} for name in "ab" for number in range(6)
]


def as_file(folder, ending):
    path = folder / f"rows.{ending}"
    table = datasets.Dataset.from_list(ROWS)
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif ending == "csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    return path


def forms(folder):
    table = datasets.Dataset.from_list(ROWS)
    names = datasets.ClassLabel(names=["b", "a"])
    yield "rows", ROWS
    yield "dataset", table
    yield "class labels", table.cast_column("expert", names)
    yield "dataset dict", datasets.DatasetDict(train=table, test=table.select([0]))
    yield "streaming", table.to_iterable_dataset()
    yield "dict", {name: [row["prompt"] for row in ROWS if row["expert"] == name] for name in "ab"}
    yield "dict of datasets", {name: table.filter(lambda row, name=name: row["expert"] == name) for name in "ab"}
    for ending in ("jsonl", "csv", "parquet"):
        yield ending, as_file(folder, ending)
        yield f"{ending} as a string", str(as_file(folder, ending))


def test_every_form_gives_the_same_texts(tmp_path):
    expected = [row["prompt"] for row in ROWS]
    for name, form in forms(tmp_path):
        found = labelled_texts(form, ["a", "b"])
        assert found.texts == expected, name
        assert found.labels == [0] * 6 + [1] * 6, name
        assert found.groups is None


def test_columns_can_have_other_names(tmp_path):
    table = datasets.Dataset.from_list(ROWS).rename_columns({"prompt": "question", "expert": "who"})
    found = labelled_texts(table, ["a", "b"], Columns("question", "who", "kind"))
    assert found.texts[:2] == ["a 0", "a 1"]
    assert found.groups[:4] == ["k0", "k1", "k2", "k0"]


def test_chats_are_rendered():
    chats = {name: [[{"role": "user", "content": f"{name}{n}"}] for n in range(3)] for name in "ab"}
    found = labelled_texts(chats, ["a", "b"], render=lambda chat: f"<{chat[0]['content']}>")
    assert found.texts[0] == "<a0>"
    with pytest.raises(RoutingError, match="strings or chats"):
        labelled_texts(chats, ["a", "b"])


def test_samples_are_drawn_evenly_and_by_seed():
    many = {"a": [f"a{n}" for n in range(200)], "b": ["b0", "b1"]}
    one, same, other = (labelled_texts(many, ["a", "b"], max_samples=20, seed=seed).texts for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 22
    assert any(int(text[1:]) >= 150 for text in one if text[0] == "a")


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        ({"a": ["x", "y"], "c": ["z", "w"]}, None, "are no experts"),
        ({"a": ["x", "y"], "b": ["z"]}, None, "at least 2"),
        ({"a": "xy", "b": ["z", "w"]}, None, "not one string"),
        ({"a": ["x", 3], "b": ["z", "w"]}, None, "strings or chats"),
        (datasets.Dataset.from_list(ROWS), Columns("question"), "no column"),
        (datasets.Dataset.from_list(ROWS), Columns(group="nothing"), "no column"),
        (datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)), None, "no split"),
        ("missing.jsonl", None, "no file"),
        ("rows.txt", None, "unknown ending"),
    ],
)
def test_faults_say_what_is_wrong(data, columns, message):
    with pytest.raises(RoutingError, match=message):
        labelled_texts(data, ["a", "b"], columns)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "expert": "a"}\n{"prompt"\n', encoding="utf-8")
    with pytest.raises(RoutingError, match="line 2"):
        labelled_texts(path, ["a"])


def test_duplicates_share_a_fold_whatever_the_order():
    texts = [f"text {n}" for n in range(40)] + ["Text  3", "text 3 "] + [f"other {n}" for n in range(10)]
    labels = [0] * 42 + [1] * 10
    folds = hash_folds(texts, labels, 5, seed=1)
    assert folds[3] == folds[40] == folds[41]
    assert content_hash("A  b") == content_hash("a b")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = hash_folds([texts[row] for row in order], [labels[row] for row in order], 5, seed=1)
    assert [folds[row] for row in order] == shuffled
    for label in (0, 1):
        sizes = [sum(f == fold and own == label for f, own in zip(folds, labels, strict=True)) for fold in range(5)]
        assert min(sizes) >= 2
    assert folds != hash_folds(texts, labels, 5, seed=2)
    with pytest.raises(RoutingError, match="different"):
        hash_folds(["x", "x"], [0, 0], 5)


def test_nothing_is_judged_by_a_router_that_saw_it():
    seen = []

    class Spy(ROUTERS["gaussian"]):
        def fit(self, features, labels, background=None, hard_negatives=None):
            # While it is fitted it may look at what it is fitted on.
            self.rows = set()
            super().fit(features, labels, background, hard_negatives)
            self.rows = set(features[:, 0].tolist()) | (set() if background is None else set(background[:, 0].tolist()))

        def scores(self, features):
            seen.append(self.rows & set(features[:, 0].tolist()))
            return super().scores(features)

    features = torch.randn(60, 5)
    labels = torch.arange(60) % 2
    folds = torch.arange(60) % 5
    held_out, ordinary = cross_fit(lambda: Spy(2, 5), features, labels, folds, torch.randn(20, 5), torch.arange(20) % 5)
    assert seen
    assert not any(seen)
    assert held_out.scores.shape == (60, 2)
    assert ordinary.ood_score.shape == (20,)


def test_a_report_counts_by_hand():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 4, generator=generator) + 20.0 * labels.unsqueeze(1)
    labels[0] = 1  # one text of the wrong expert
    router = ROUTERS["gaussian"](2, 4)
    keys = [f"t{n}" for n in range(200)]
    report = calibrate(lambda: ROUTERS["gaussian"](2, 4), router, features, labels, keys, ["a", "b"], 0, 0.05)
    assert report.num_texts == {"a": 99, "b": 101}
    assert report.confusion == [[99, 0], [1, 100]]
    assert report.accuracy == 199 / 200
    assert report.per_expert["b"]["recall"] == pytest.approx(100 / 101)
    assert report.per_expert["a"]["precision"] == pytest.approx(99 / 100)
    assert 0.01 < report.false_fallback < 0.12
    assert float(router.temperature) == pytest.approx(report.temperature)
    assert json.dumps(report._asdict())


def test_features_are_kept_by_content_in_memory_and_on_disk(tmp_path):
    cache = FeatureCache("backbone 3", tmp_path / "cache")
    one, two = cache.key([1, 2]), cache.key([1, 22])
    assert one != two != cache.key([12, 2])
    assert cache.get(one) is None
    cache.put({one: torch.tensor([1.0, 2.0]), two: torch.tensor([3.0, 4.0])})
    again = FeatureCache("backbone 3", tmp_path / "cache")
    assert again.get(two).tolist() == [3.0, 4.0]
    other = FeatureCache("backbone 4", tmp_path / "cache")
    assert other.get(other.key([1, 2])) is None
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert FeatureCache("backbone 3", tmp_path / "cache").get(one) is None
