"""Hit rates of every cache size: worked examples, brute force, and the store that is used."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from typer.testing import CliRunner

from mediator_peft.bank.expert_store import ExpertStore
from mediator_peft.cli.app import app
from mediator_peft.data_files import DataFileError
from mediator_peft.evaluation.cache_planning import (
    accesses,
    hits_by_size,
    lookahead_distances,
    lru_distances,
    optimal_distances,
    pinned_hits,
    plan_cache,
    read_routes,
    routing_persistence,
    stored_requests,
)


def requests_of(text):
    return [(name,) for name in text]


def test_worked_stack_distances():
    stream = list("AABACABD")
    assert lru_distances(stream) == [None, 1, None, 2, None, 2, 3, None]
    assert hits_by_size(lru_distances(stream), 4) == [1, 3, 4, 4]
    assert hits_by_size(optimal_distances(stream), 4) == [1, 3, 4, 4]


@pytest.mark.parametrize(
    ("text", "lru", "optimal"),
    [("ABCABCAB", [0, 0, 5], [0, 3, 5]), ("AAABBBAA", [5, 6], [5, 6])],
)
def test_worked_hits(text, lru, optimal):
    stream = list(text)
    assert hits_by_size(lru_distances(stream), len(lru)) == lru
    assert hits_by_size(optimal_distances(stream), len(lru)) == optimal


def test_worked_lookahead():
    stream = list("ABCABCAB")
    assert hits_by_size(lookahead_distances(stream, 3), 3)[1:] == [1, 5]


@pytest.mark.parametrize(
    ("text", "window", "value"),
    [
        ("AABACABD", 1, 1.0), ("AABACABD", 2, 0.7), ("AABACABD", 4, 0.5),
        ("AAABBBAA", 2, 0.875), ("AAABBBAA", 4, 17 / 24),
    ],
)  # fmt: skip
def test_worked_persistence(text, window, value):
    assert routing_persistence(requests_of(text), window) == pytest.approx(value)


def brute_lru(stream, size):
    held, hits = [], 0
    for name in stream:
        hits += name in held
        held = ([name] + [other for other in held if other != name])[:size]
    return hits


def brute_best(stream, size):
    """Most hits of any choice of what to drop."""

    @cache
    def most(time, held):
        if time == len(stream):
            return 0
        name = stream[time]
        if name in held:
            return 1 + most(time + 1, held)
        if len(held) < size:
            return most(time + 1, held | {name})
        return max(most(time + 1, (held - {gone}) | {name}) for gone in held)

    return most(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force(seed):
    chance = random.Random(seed)
    stream = [chance.choice("ABCDE") for _ in range(24)]
    lru, optimal = (hits_by_size(found(stream), 5) for found in (lru_distances, optimal_distances))
    ahead = hits_by_size(lookahead_distances(stream, 6), 5)
    for size in range(1, 6):
        assert lru[size - 1] == brute_lru(stream, size)
        assert optimal[size - 1] == brute_best(tuple(stream), size)
        assert ahead[size - 1] <= optimal[size - 1]
    assert lru == sorted(lru)


def test_the_store_hits_what_is_predicted(tmp_path):
    chance = random.Random(3)
    requests = [tuple(sorted(chance.sample("ABCDE", chance.choice((1, 1, 2))))) for _ in range(60)]
    distances = lru_distances(accesses(requests))
    for size in (2, 3, 4):
        store, hits = ExpertStore(size, tmp_path), 0
        store.make_room(dict.fromkeys("ABCDE", 64))
        for request in requests:
            hits += sum(name in store.resident for name in request)
            # In the order in which a request takes them.
            known = store.resident
            store.use(sorted(request, key=lambda name: (-known.index(name) if name in known else 1, name)))
        assert abs(hits_by_size(distances, size)[-1] - hits) <= 2


def test_pinned_experts_stay(tmp_path):
    store = ExpertStore(2, tmp_path, pinned=["A"])
    store.make_room(dict.fromkeys("ABC", 64))
    store.release()
    assert store.resident == ["A"]
    gone = []
    for name in "BCBC":
        gone += store.use([name])
    assert "A" in store.resident
    assert gone == ["B", "C", "B"]


def test_the_recommendation_is_the_smallest_that_is_nearly_as_good():
    plan = plan_cache(requests_of("ABABABABABABABABABABABABABABABABABABABABABABC"), {"A": 7, "B": 9, "C": 3})
    assert plan.recommended == 2
    assert plan.sizes[1].memory_bytes == 18
    assert plan.sizes[0].lru == 0
    assert all(size.lru <= size.optimal for size in plan.sizes)
    assert next(iter(plan.experts)) == "A"


def brute_pinned(stream, pinned, size):
    held, hits = [], -len(pinned)
    for name in stream:
        hits += name in pinned or name in held
        if name not in pinned:
            held = [name, *(other for other in held if other != name)][: size - len(pinned)]
    return hits


def test_worked_pinning():
    """Others pass by between the requests for A: the last used alone never hold it."""
    stream = list("ABCADEAFGA")
    assert hits_by_size(lru_distances(stream), 2) == [0, 0]
    assert pinned_hits(stream, 2) == [(0, 0), (1, 3)]
    assert pinned_hits(list("AABBCCDD"), 2) == [(0, 4), (0, 4)]
    size = plan_cache(requests_of("ABCADEAFGA")).sizes[1]
    assert (size.pinned, size.with_pinned) == (("A",), 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_pinning_against_brute_force(seed):
    drawn = random.Random(seed)
    stream = drawn.choices("ABCDEFGH", weights=[9, 6, 3, 2, 2, 1, 1, 1], k=60)
    order = sorted(set(stream), key=lambda name: (-stream.count(name), name))
    found = pinned_hits(stream, 6)
    for size in range(1, 7):
        every = [brute_pinned(stream, order[:number], size) for number in range(size)]
        assert found[size - 1] == (every.index(max(every)), max(every))


def test_a_log_of_another_bank_is_refused():
    assert stored_requests([("a",), ("base",)], None, ["a", "base"]) == [("a",), ("base",)]
    with pytest.raises(DataFileError, match="names \\['b'\\]"):
        stored_requests([("a",), ("b",)], None, ["a", "base"])


def test_a_bank_with_a_column_map_reads_stored_deltas():
    family = {"_family 1": {"a": 1.0, "b": 1.0}, "a": {"a": 1.0}, "b": {"b": 1.0}}
    rows = {**family, "c": {"c": 1.0, "d": 1.0}, "s": {"*": 1.0}}
    found = stored_requests([("a",), ("d",), ("b", "c")], rows)
    assert found == [("_family 1", "a"), ("c",), ("_family 1", "b", "c")]
    with pytest.raises(DataFileError, match="stranger"):
        stored_requests([("stranger",)], rows)
    assert stored_requests([("x",)], None) == [("x",)]


def test_every_form_of_a_line_is_read(tmp_path):
    path = tmp_path / "routes.jsonl"
    lines = ["math", ["code", "math"], {"expert": "law"}, {"experts": ["law"]}, {"expert_weights": {"a": 0.5, "b": 0}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_routes(path) == [("math",), ("code", "math"), ("law",), ("law",), ("a",)]
    path.write_text('{"prompt": "x"}\nnot json\n')
    with pytest.raises(DataFileError, match="line 1") as refused:
        read_routes(path)
    assert "line 2" in str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"expert_weights": {"a": NaN, "b": 1}}', "names no experts"),
        ('{"expert_weights": {"a": 1e999}}', "names no experts"),
        (r'"\ud800"', "half of a character"),
        (json.dumps([f"n{number}" for number in range(1001)]), "names 1001 experts"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(line, said, tmp_path):
    (tmp_path / "routes.jsonl").write_text(f'"a"\n{line}\n')
    with pytest.raises(DataFileError, match=f"line 2: .*{said}"):
        read_routes(tmp_path / "routes.jsonl")


def test_a_request_of_no_expert_changes_no_order():
    requests = [("a",), ("b",), ("a",), ("a", "b"), ("a", "b", "c")]
    with_empty = [requests[0], (), *requests[1:3], (), *requests[3:]]
    assert accesses(with_empty) == accesses(requests) == ["a", "b", "a", "a", "b", "b", "a", "c"]


def test_the_command_prints_a_table_without_a_model(tmp_path):
    path = tmp_path / "routes.jsonl"
    path.write_text("".join(json.dumps(name) + "\n" for name in "AABACABD"))
    printed = CliRunner().invoke(app, ["bench", "--routes", str(path)])
    assert printed.exit_code == 0, printed.output
    assert "max_resident_experts" in printed.stdout
    found = json.loads(CliRunner().invoke(app, ["bench", "--routes", str(path), "--json"]).stdout)
    assert found["recommended"] == 3
    assert [size["lru"] for size in found["sizes"]] == [1 / 8, 3 / 8, 4 / 8, 4 / 8]
    assert CliRunner().invoke(app, ["bench"]).exit_code == 2
