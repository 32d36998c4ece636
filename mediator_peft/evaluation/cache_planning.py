"""How many experts to hold in memory, from a log of routes: hit rates of every cache size by one pass over the log."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..data_files import DataFileError, json_lines, surrogate_fault
from ..setting_checks import is_finite

WINDOWS = (4, 16, 64)
"""Requests in a window of :func:`routing_persistence`, and of the look-ahead."""

ENOUGH = 0.95
"""The recommended size has this share of the hits that LRU reaches at any size."""

_LISTED = 5
_MOST_PINNED = 16
_MOST_NAMES = 1000
"""Of one line: reading a log takes time in proportion to their square."""

Request = tuple[str, ...]
"""Columns that one request uses."""


def read_routes(path: str | os.PathLike[str]) -> list[Request]:
    """The experts of each request, in the order in which they came.

    Args:
        path: a JSONL file. A line is a name, a list of names, or an object with ``expert_weights`` (name → weight;
            those above 0 count, as ``generate --json`` prints them), ``experts`` (names) or ``expert`` (a name).

    Raises:
        DataFileError: it cannot be read, holds no requests, or a line names no experts.
    """
    faults: list[str] = []
    found = []
    for number, value in json_lines(path, faults):
        names = _names(value)
        if names is None:
            faults.append(f"line {number}: names no experts (expert_weights, experts or expert)")
        elif len(names) > _MOST_NAMES:
            faults.append(f"line {number}: names {len(names)} experts, the most is {_MOST_NAMES}")
        elif fault := next(filter(None, map(surrogate_fault, names)), None):
            faults.append(f"line {number}: a name {fault}")
        else:
            found.append(tuple(sorted(set(names))))
    if faults:
        more = f"\nand {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise DataFileError(f"{os.fspath(path)}:\n" + "\n".join(faults[:_LISTED]) + more)
    if not any(found):
        raise DataFileError(f"{os.fspath(path)} holds no requests. Write one a line.")
    return found


def _names(value: Any) -> list[str] | None:
    if isinstance(value, Mapping):
        weights = value.get("expert_weights")
        if isinstance(weights, Mapping):
            is_number = all(isinstance(weight, bool) or is_finite(weight) for weight in weights.values())
            return [str(name) for name, weight in weights.items() if weight > 0] if is_number else None
        return _names(value.get("experts", value.get("expert")))
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def stored_requests(
    requests: Sequence[Request], rows: Mapping[str, Mapping[str, float]] | None, columns: Sequence[str] = ()
) -> list[Request]:
    """What requests read of a bank with a column map; None for a bank without.

    Experts that are equal are one, and members of a family also read what it shares. What every request reads is left
    out.

    Args:
        requests: as they were logged.
        rows: the column map.
        columns: of a bank without a map; none where it is not at hand.

    Raises:
        DataFileError: a request names an expert that the bank has not.
    """
    known = {name for row in rows.values() for name in row} if rows is not None else set(columns)
    strangers = sorted({name for request in requests for name in request} - known) if known else []
    if strangers:
        raise DataFileError(f"the log names {strangers}, which the bank has no deltas of; it has {sorted(known)}.")
    if rows is None:
        return list(requests)
    return [
        tuple(sorted(stored for stored, row in rows.items() if any(name in row for name in request)))
        for request in requests
    ]


def accesses(requests: Sequence[Request]) -> list[str]:
    """One access after the other: a request takes first what was used last, as a cache that holds all of it does."""
    last: dict[str, int] = {}
    stream: list[str] = []
    for request in requests:
        stream += sorted(request, key=lambda name: (-last.get(name, -1), name))
        used = stream[len(stream) - len(request) :]
        last.update((name, len(stream) - place) for place, name in enumerate(reversed(used)))
    return stream


def lru_distances(stream: Sequence[str]) -> list[int | None]:
    """Stack distance of each access: it is a hit in a cache of the last used at every size from there on.

    One plus the number of other experts since the last access to the same; None for the first one. Mattson et al.
    (1970).
    """
    stack: list[str] = []
    found: list[int | None] = []
    for name in stream:
        place = stack.index(name) if name in stack else None
        found.append(None if place is None else place + 1)
        if place is not None:
            stack.pop(place)
        stack.insert(0, name)
    return found


class Priority(Protocol):
    """Which experts a cache keeps: the ones with the larger value."""

    def access(self, time: int, name: str) -> None:
        """Be told of the next access."""

    def of(self, name: str) -> tuple[float, ...]:
        """Of an expert, after the last access that was told."""


class _NextUse:
    """What is wanted sooner goes first."""

    def __init__(self, stream: Sequence[str]) -> None:
        self._places: dict[str, deque[int]] = {}
        for time, name in enumerate(stream):
            self._places.setdefault(name, deque()).append(time)

    def access(self, time: int, name: str) -> None:
        self._places[name].popleft()

    def of(self, name: str) -> tuple[float, ...]:
        places = self._places[name]
        return (-places[0] if places else float("-inf"),)


class _UsesAhead:
    """What is used more often in the next accesses goes first, of equal ones the last used."""

    def __init__(self, stream: Sequence[str], ahead: int) -> None:
        self._stream, self._ahead = stream, ahead
        self._counts: Counter[str] = Counter(stream[:ahead])
        self._last: dict[str, int] = {}

    def access(self, time: int, name: str) -> None:
        # The window is what comes after this access.
        self._counts[name] -= 1
        if time + self._ahead < len(self._stream):
            self._counts[self._stream[time + self._ahead]] += 1
        self._last[name] = time

    def of(self, name: str) -> tuple[float, ...]:
        return (self._counts[name], self._last.get(name, -1))


def optimal_distances(stream: Sequence[str]) -> list[int | None]:
    """As :func:`lru_distances`, for a cache that knows the future and drops what is used last of all (Belady's)."""
    return _stack_distances(stream, _NextUse(stream))


def lookahead_distances(stream: Sequence[str], ahead: int) -> list[int | None]:
    """As :func:`lru_distances`, for a cache that knows the next accesses and drops what is least used in them.

    The last used stays where these are equal: SCH of arXiv 2505.16056, with requests in place of tokens.

    Args:
        stream: of accesses.
        ahead: how many accesses it knows beyond the present one.
    """
    return _stack_distances(stream, _UsesAhead(stream, ahead))


def _stack_distances(stream: Sequence[str], priority: Priority) -> list[int | None]:
    """Stack distances of a cache that drops what has the least priority at that time.

    The priority stack of Mattson et al. (1970): the accessed expert goes on top, and what it pushes down is, at each
    place, the one with less priority of what stood there and what came from above.
    """
    stack: list[str] = []
    found: list[int | None] = []
    for time, name in enumerate(stream):
        priority.access(time, name)
        depth = stack.index(name) if name in stack else None
        found.append(None if depth is None else depth + 1)
        end, rest = (len(stack), []) if depth is None else (depth, stack[depth + 1 :])
        above, pushed = [name], stack[:1]
        for other in stack[1:end]:
            stays, goes = sorted((other, pushed[0]), key=priority.of, reverse=True)
            above.append(stays)
            pushed = [goes]
        stack = above + (pushed if end > 0 else []) + rest
    return found


def hits_by_size(distances: Sequence[int | None], largest: int) -> list[int]:
    """Hits of a cache of 1, 2, ..., ``largest`` experts."""
    counts = Counter(distance for distance in distances if distance is not None)
    hits, total = [], 0
    for size in range(1, largest + 1):
        total += counts[size]
        hits.append(total)
    return hits


def routing_persistence(requests: Sequence[Request], window: int) -> float | None:
    """SRP: how well one choice of experts serves the requests of a window (segment routing best performance).

    Over all windows of ``window`` requests, experts used at least j times are chosen, with the j that is best for all:
    the largest F1 of (request, expert) pairs chosen and used. arXiv 2505.16056, Section 3, with requests in place of
    tokens. 1 means that neighbouring requests use the same experts.

    Returns:
        In [0, 1]; None for a log shorter than a window.
    """
    if len(requests) < window:
        return None
    used: Counter[int] = Counter()
    for counts in _windows(requests, window):
        used.update(counts)
    num_used = sum(times * number for times, number in used.items())
    best = 0.0
    for least in range(1, window + 1):
        chosen = [(times, number) for times, number in used.items() if times >= least]
        matches = sum(times * number for times, number in chosen)
        predicted = window * sum(number for _, number in chosen)
        best = max(best, 2 * matches / (predicted + num_used) if matches else 0.0)
    return best


def _windows(requests: Sequence[Request], window: int) -> Iterator[list[int]]:
    """How often each expert is used, for every window of neighbouring requests."""
    counts: Counter[str] = Counter()
    for number, request in enumerate(requests):
        counts.update(request)
        if number >= window:
            counts.subtract(requests[number - window])
        if number >= window - 1:
            yield [count for count in counts.values() if count > 0]


@dataclass(frozen=True)
class CacheSize:
    """One line of the table."""

    experts: int
    """``max_resident_experts``."""

    lru: float
    """Share of accesses that find their expert in memory, where the last used stay."""

    lookahead: float
    """The same where the next 16 accesses are known."""

    optimal: float
    """The same where all are known: no cache of this size has more."""

    loads_a_request: float
    """Experts read from disk for a request, with LRU."""

    pinned: tuple[str, ...]
    """Most used experts that are best pinned in it (``pinned_experts``); none where that has no more hits."""

    with_pinned: float
    """Share of accesses that find their expert in memory where these are pinned, beside the last used of the others."""

    memory_bytes: int | None
    """Of that many experts' deltas; None where the bank is not at hand."""


@dataclass(frozen=True)
class CachePlan:
    """What a log of routes says about ``max_resident_experts``."""

    num_requests: int
    experts: dict[str, int]
    """Expert → number of requests that use it, the most used first."""

    sizes: tuple[CacheSize, ...]
    recommended: int
    """The smallest size that has 95 % of the hits of the best one."""

    persistence: dict[int, float]
    """Requests in a window → SRP."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def pinned_hits(stream: Sequence[str], largest: int) -> list[tuple[int, int]]:
    """How many of the most used experts are best pinned in a cache of 1, 2, ..., ``largest`` experts, and its hits.

    The last used of the others share the rest of the cache. The first access to a pinned expert counts as a load.
    """
    order = most_used(stream)
    best = [(0, hits) for hits in hits_by_size(lru_distances(stream), largest)]
    for number in range(1, min(len(order), largest - 1, _MOST_PINNED) + 1):
        rest = [name for name in stream if name not in order[:number]]
        found = hits_by_size(lru_distances(rest), largest - number)
        for size, hits in enumerate(found, start=number + 1):
            hits += len(stream) - len(rest) - number
            if hits > best[size - 1][1]:
                best[size - 1] = number, hits
    return best


def most_used(stream: Sequence[str]) -> list[str]:
    """Experts by their number of accesses, the largest first."""
    return [name for name, _ in sorted(Counter(stream).items(), key=lambda item: (-item[1], item[0]))]


def plan_cache(requests: Sequence[Request], expert_bytes: Mapping[str, int] | None = None) -> CachePlan:
    """Hit rates of every cache size, and how many experts to hold.

    Args:
        requests: experts of each request, in order.
        expert_bytes: bytes of each expert's deltas in memory; the largest counts for all.
    """
    used = Counter(name for request in requests for name in request)
    stream, largest = accesses(requests), len(used)
    lru, optimal, ahead = (
        hits_by_size(distances, largest)
        for distances in (lru_distances(stream), optimal_distances(stream), lookahead_distances(stream, 16))
    )
    each = max((size for name, size in (expert_bytes or {}).items() if name in used), default=None)
    total, order, pinned = len(stream), most_used(stream), pinned_hits(stream, largest)
    sizes = tuple(
        CacheSize(
            size,
            lru[size - 1] / total,
            ahead[size - 1] / total,
            optimal[size - 1] / total,
            (total - lru[size - 1]) / len(requests),
            tuple(order[: pinned[size - 1][0]]),
            pinned[size - 1][1] / total,
            None if each is None else each * size,
        )
        for size in range(1, largest + 1)
    )
    recommended = next(size.experts for size in sizes if size.lru >= ENOUGH * sizes[-1].lru)
    known = {window: routing_persistence(requests, window) for window in WINDOWS}
    return CachePlan(
        len(requests),
        dict(sorted(used.items(), key=lambda item: (-item[1], item[0]))),
        sizes,
        recommended,
        {window: value for window, value in known.items() if value is not None},
    )
