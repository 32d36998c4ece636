"""What each part of the method is good for: answer losses with one part changed, and with deltas in some blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluation.report import write_json
from ..evaluation.statistics import bootstrap_mean
from ..methods.merging import MERGE_METHODS
from ..tables import lookup
from .conflict import DENSITY as CONFLICT_DENSITY
from .conflict import conflict_table, rankings, routed_matrices
from .forms import Pack, packed, whole
from .lab import Lab, State, block_of, merge_states
from .scores import Scores, Sizes
from .systems import Bench

SHARES = (0.5, 0.25, 0.1, 0.75)
"""Shares of blocks that are routed, beside none and all; the most important first."""

DENSITY = 0.2
"""The library's default."""

THIN = 0.05
"""Density of all blocks whose bytes fewer blocks may take."""

NUM_LOSSES, NUM_LONG = 20, 5
"""Items of a task, and of word problems, which are long."""

OWN = "experts themselves"
DENSE = "sign of all entries"
"""Ranking by sign conflict without denoising."""

RANDOM = "random "
"""Begin of the names of random rankings."""

NUM_RANDOM = 3

Blocks = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """How the weights of an expert are made from backbone and delta."""

    name: str
    """Scores are kept under it."""

    pack: Pack
    backbone: str = "average"
    """A merge method; ``base`` is θ0."""

    embedding: Pack | None = None
    """The delta of the embedding, where it gets one."""

    experts: tuple[str, ...] | None = None
    """Those that are averaged; None for all."""


DEFAULT = Variant(f"sign {DENSITY}", packed(DENSITY))
VARIANTS = (
    DEFAULT,
    Variant("sign 0.1", packed(0.1)),
    Variant("sign 0.4", packed(0.4)),
    Variant("whole deltas", whole),
    Variant("whole deltas, embedding too", whole, embedding=whole),
    Variant("backbone is the base", packed(DENSITY), "base"),
    Variant("scale of the mean", packed(DENSITY, rescale="mean")),
    Variant("random entries", packed(DENSITY, sparsifier="dare", encoding="float")),
    Variant("encoding nf4", packed(DENSITY, encoding="nf4")),
    Variant("encoding factors_sign 0.04", packed(0.04, encoding="factors_sign")),
)
"""One part changed at a time, in the order of the table."""


@dataclass(frozen=True)
class Choice:
    """How much of the ablation is measured."""

    rankings: tuple[str, ...] | None = None
    """None for all."""

    shares: tuple[float, ...] = SHARES
    """Shares of blocks, the most important first."""

    blocks_only: bool = False
    """Whether only the curves over blocks are measured, at equal numbers of blocks."""


class Ablation:
    """Weights of every expert with deltas in some blocks, and their losses."""

    def __init__(self, bench: Bench, lab: Lab) -> None:
        self.bench, self._lab = bench, lab
        self.targets = routed_matrices(lab.base)
        self.num_blocks = 1 + max(block for name in self.targets if (block := block_of(name)) is not None)
        self.num_routed = sum(lab.base[name].numel() for name in self.targets)
        self._backbones: dict[Any, State] = {}
        # The last variant's deltas of each task: rankings come one after the other.
        self._deltas: dict[str, tuple[str, dict[str, Tensor], dict[str, float]]] = {}

    def backbone(self, variant: Variant) -> State:
        """Its weights, in bfloat16 as they are stored."""
        key = variant.backbone, variant.experts
        if key not in self._backbones:
            chosen = {name: self._lab.experts[name] for name in variant.experts or self._lab.experts}
            self._backbones[key] = merge_states(self._lab.base, chosen, MERGE_METHODS[variant.backbone])
        return self._backbones[key]

    def deltas(self, variant: Variant, task: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Delta and bytes on disk of each matrix."""
        known = self._deltas.get(task)
        if known is None or known[0] != variant.name:
            backbone, expert = self.backbone(variant), self._lab.experts[task]
            packs = dict.fromkeys(self.targets, variant.pack)
            if variant.embedding is not None:
                packs |= {name: variant.embedding for name in backbone if name.endswith("embed_tokens.weight")}
            dense, num_bytes = {}, {}
            for name, pack in packs.items():
                dense[name], num_bytes[name] = pack(expert[name].float() - backbone[name].float(), name)
            known = self._deltas[task] = variant.name, dense, num_bytes
        return known[1], known[2]

    def weights(self, variant: Variant, task: str, blocks: Blocks | None) -> State:
        """All weights of one expert; None takes all blocks."""
        backbone = self.backbone(variant)
        state = dict(backbone)
        for name, delta in self.deltas(variant, task)[0].items():
            if blocks is None or block_of(name) in blocks or block_of(name) is None:
                state[name] = backbone[name].float() + delta
        return state

    def losses(self, variant: Variant, blocks: Blocks | None, task: str) -> Scores:
        """Of a task's own expert."""

        def ready() -> dict[str, Any]:
            weights = self.weights(variant, task, blocks) if blocks != () else self.backbone(variant)
            with self._lab.holding(weights) as model:
                return {"model": model, "tokenizer": self._lab.tokenizer}

        depends = [self.bench.hashes, variant.name, variant.backbone, variant.experts, blocks]
        return self.bench.scored(f"ablation {variant.name}", task, Sizes(0, num_losses(task)), depends, ready)

    def own_losses(self, task: str) -> Scores:
        """Of a whole expert."""

        def ready() -> dict[str, Any]:
            with self._lab.holding(self._lab.experts[task]) as model:
                return {"model": model, "tokenizer": self._lab.tokenizer}

        return self.bench.scored(OWN, task, Sizes(0, num_losses(task)), self.bench.hashes, ready)

    def measured(self, variant: Variant, blocks: Blocks | None = None) -> dict[str, Scores]:
        """Task → losses of its expert."""
        return {task: self.losses(variant, blocks, task) for task in variant.experts or self.bench.sample.known}

    def num_bytes(self, variant: Variant, blocks: Blocks | None = None) -> float:
        """Of one expert's deltas, mean over experts, a parameter of all blocks' matrices; kept with the scores."""
        path = self.bench.folder.scores / "ablation-bytes.json"
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key = json.dumps([self.bench.hashes, variant.name, variant.backbone, blocks])
        if key not in known:
            write_json({**known, key: self._counted_bytes(variant, blocks)}, path)
            known = json.loads(path.read_text(encoding="utf-8"))
        return known[key]

    def _counted_bytes(self, variant: Variant, blocks: Blocks | None) -> float:
        total = 0.0
        for task in self.bench.sample.known:
            sizes = self.deltas(variant, task)[1]
            total += sum(size for name, size in sizes.items() if blocks is None or block_of(name) in blocks)
        return total / len(self.bench.sample.known) / self.num_routed


def num_losses(task: str) -> int:
    """Items of a task."""
    return NUM_LONG if task == "maths" else NUM_LOSSES


def ablate(
    bench: Bench, lab: Lab, save: Callable[[dict[str, Any]], object], choice: Choice | None = None
) -> dict[str, Any]:
    """All tables of the ablation.

    Args:
        bench: what is measured.
        lab: the model and its weights.
        save: takes what there is after each part, so that a stopped run has it.
        choice: None measures everything.

    Returns:
        ``curves``, ``none``, ``all``, ``against_random``: see :func:`block_curves`; ``variants``: name → losses and
        bytes; ``equal_bytes``: see :func:`equal_bytes`; ``num_experts``: see :func:`by_number`.

    Raises:
        ConfigError: a chosen ranking is unknown.
    """
    choice = choice or Choice()
    run = Ablation(bench, lab)
    found: dict[str, Any] = {
        "num_losses": {task: num_losses(task) for task in bench.sample.known},
        "num_blocks": run.num_blocks,
    }
    orders = chosen_rankings(bench, lab, choice.rankings)
    first, shares = choice.shares[:2], choice.shares
    # The most important first: a stopped run has them.
    steps: list[Callable[[], dict[str, Any]]] = [lambda: block_curves(run, orders, first)]
    if not choice.blocks_only:
        steps += [
            lambda: {"variants": variants(run)},
            lambda: {"equal_bytes": equal_bytes(run, orders, first)},
            lambda: {"num_experts": by_number(run)},
        ]
    if len(shares) > len(first):
        steps.append(lambda: block_curves(run, orders, shares))
    for step in steps:
        found |= step()
        save(found)
    return found


def chosen_rankings(bench: Bench, lab: Lab, names: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Ranking → blocks; beside those of the conflict table, sign conflict of all entries (without denoising).

    Args:
        bench: what is measured.
        lab: the experts' weights.
        names: the rankings that are wanted; None for all.

    Raises:
        ConfigError: a ranking is unknown.
    """
    found = rankings(_conflicts(bench, lab, CONFLICT_DENSITY), num_random=NUM_RANDOM)
    if names is None or DENSE in names:
        dense = rankings(_conflicts(bench, lab, 1.0))["sign"]
        found = {"sign": found.pop("sign"), DENSE: dense, **found}
    for name in names or ():
        lookup(found, name, kind="ranking")
    return {name: order for name, order in found.items() if names is None or name in names}


def _conflicts(bench: Bench, lab: Lab, density: float) -> list[dict[str, object]]:
    """The conflict table, kept in the study's folder."""
    path, key = bench.folder.scores / f"conflict-{density}.json", [bench.hashes, density]
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        table: list[dict[str, object]] = kept["table"]
        return table
    table = conflict_table(lab.base, lab.experts, density)
    write_json({"key": key, "table": table}, path)
    return table


def block_sets(
    orders: Mapping[str, Sequence[int]], num_blocks: int, shares: Sequence[float]
) -> dict[str, dict[int, Blocks]]:
    """Ranking → number of blocks → their numbers, ascending."""
    counts = [count for share in shares if 0 < (count := round(share * num_blocks)) < num_blocks]
    return {
        name: {count: tuple(sorted(order[:count])) for count in dict.fromkeys(counts)} for name, order in orders.items()
    }


def block_curves(run: Ablation, orders: Mapping[str, Sequence[int]], shares: Sequence[float]) -> dict[str, Any]:
    """Losses with the default's deltas in a number of blocks.

    Returns:
        ``curves``: ranking → number of blocks → mean loss over tasks, each task's, bytes a routed parameter; ``none``
        and ``all``: the same; ``against_random``: ranking → number → mean difference from the random rankings, where
        there are any.
    """
    sets = block_sets(orders, run.num_blocks, shares)
    none, every = run.measured(DEFAULT, ()), run.measured(DEFAULT)
    counts = sorted({count for chosen in sets.values() for count in chosen})
    scores: dict[str, dict[int, dict[str, Scores]]] = {name: {} for name in sets}
    # Number by number, so that a stopped run has all rankings of the first ones.
    for count in next(iter(sets.values())):
        for name, chosen in sets.items():
            scores[name][count] = run.measured(DEFAULT, chosen[count])
    return {
        "none": {**_mean(none), "bytes": 0.0},
        "all": {**_mean(every), "bytes": run.num_bytes(DEFAULT)},
        "curves": {
            name: {
                str(count): {**_mean(scores[name][count]), "bytes": run.num_bytes(DEFAULT, sets[name][count])}
                for count in counts
            }
            for name in sets
        },
        "against_random": _against_random(scores),
    }


def _against_random(scores: Mapping[str, Mapping[int, Mapping[str, Scores]]]) -> dict[str, Any]:
    """Paired over items, every task with the same weight; positive is worse than random blocks."""
    drawn = [name for name in scores if name.startswith(RANDOM)]
    if not drawn:
        return {}
    return {
        name: {
            str(count): bootstrap_mean(_differences(found, [scores[each][count] for each in drawn]))._asdict()
            for count, found in curve.items()
        }
        for name, curve in scores.items()
        if name not in drawn
    }


def _differences(found: Mapping[str, Scores], drawn: Sequence[Mapping[str, Scores]]) -> list[float]:
    num_items = sum(len(score.losses) for score in found.values())
    values: list[float] = []
    for task, score in found.items():
        others = np.mean([each[task].losses for each in drawn], axis=0)
        weight = num_items / len(found) / len(score.losses)
        values += (weight * (np.array(score.losses) - others)).tolist()
    return values


def variants(run: Ablation) -> dict[str, Any]:
    """Mean loss over tasks, each task's, and bytes a routed parameter, with one part changed."""
    own = _mean({task: run.own_losses(task) for task in run.bench.sample.known})
    return {OWN: {**own, "bytes": 2.0}} | {
        variant.name: {**_mean(run.measured(variant)), "bytes": run.num_bytes(variant)} for variant in VARIANTS
    }


def equal_bytes(run: Ablation, orders: Mapping[str, Sequence[int]], shares: Sequence[float]) -> dict[str, Any]:
    """Few blocks with dense deltas against all blocks with thin ones, of the same bytes.

    Returns:
        ``all``: mean loss over tasks, each task's, density, bytes a routed parameter; ``curves``: ranking → number of
        blocks → the same.
    """
    thin = Variant(f"sign {THIN}", packed(THIN))
    size = _sizes(run)
    drawn = [name for name in orders if name.startswith(RANDOM)]
    chosen = {name: orders[name] for name in ("sign", "sign reversed", "spread", *drawn) if name in orders}
    sets = block_sets(chosen, run.num_blocks, shares)
    found: dict[str, dict[str, Any]] = {name: {} for name in sets}
    whole_model = {**_mean(run.measured(thin)), "density": THIN, "bytes": run.num_bytes(thin)}
    for count in sorted(next(iter(sets.values())), reverse=True):
        if count < run.num_blocks / 4 - 1:
            continue  # Signs of any density take fewer bytes.
        density = _density(size, size(THIN) * run.num_blocks / count)
        dense = Variant(f"sign {density}", packed(density))
        for name in sets:
            blocks = sets[name][count]
            losses = _mean(run.measured(dense, blocks))
            found[name][str(count)] = {**losses, "density": density, "bytes": run.num_bytes(dense, blocks)}
    return {"all": whole_model, "curves": found}


def _sizes(run: Ablation) -> Callable[[float], float]:
    """Density → bytes a parameter, of the matrices of the middle block of one expert."""
    task = run.bench.sample.known[0]
    names = [name for name in run.targets if block_of(name) == run.num_blocks // 2]
    backbone, expert = run.backbone(DEFAULT), run.weights(Variant("whole", whole), task, None)
    deltas = {name: expert[name].float() - backbone[name].float() for name in names}

    @cache
    def size(density: float) -> float:
        pack = packed(density)
        return sum(pack(delta, name).num_bytes for name, delta in deltas.items()) / sum(
            delta.numel() for delta in deltas.values()
        )

    return size


def _density(size: Callable[[float], float], wanted: float) -> float:
    """The largest density, in thousandths up to a half, that takes no more than these bytes a parameter."""
    low, high = 1, 500
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle / 1000) <= wanted else (low, middle - 1)
    return low / 1000


def by_number(run: Ablation) -> dict[str, Any]:
    """Number of experts → losses of the first two, and of all, above those of the whole experts."""
    known = list(run.bench.sample.known)
    own = {task: run.own_losses(task) for task in known}
    found = {}
    for count in range(2, len(known) + 1):
        experts = tuple(known[:count])
        variant = Variant(f"{DEFAULT.name} of {count}", DEFAULT.pack, experts=experts)
        if count == len(known):
            variant = DEFAULT
        scores = run.measured(variant)
        above = {task: scores[task].loss - own[task].loss for task in experts}
        found[str(count)] = {
            "above": above,
            "first_two": sum(above[task] for task in experts[:2]) / 2,
            "all": sum(above.values()) / count,
        }
    return found


def _mean(scores: Mapping[str, Scores]) -> dict[str, Any]:
    by_task = {task: score.loss for task, score in scores.items()}
    return {"mean": sum(by_task.values()) / len(by_task), "by_task": by_task}
