"""How near an expert comes back from each form of its delta, against the bytes that the form takes on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bank.packed_arrays import PackedArrays, to_disk
from ..bank.sparse_delta import SparseDelta
from ..checkpoints.replacing import write_replacing
from ..demo.tasks import Item
from ..evaluation.answer_batches import AnswerBatch
from ..evaluation.prompts import answer_ids, render, token_ids
from ..evaluation.scale_fitting import ScaleFit, fit_factors, log_probabilities
from ..merge.delta_packing import pack_delta
from ..methods.encoding.factors_sign import LEVELS, factor_rank, nearest_levels
from ..methods.encoding.scales import SIGN_SCALES, RowSums
from ..methods.merging import MERGE_METHODS
from ..methods.sparsifying.svd import low_rank
from ..storage import BFLOAT16
from ..tuner.config import MediatorConfig
from .lab import Lab, State, merge_states
from .systems import Bench

FIRST_TASKS = ("maths", "cron", "spelling")
"""Experts on which forms were compared before; the others are new to every form."""

NUM_ITEMS = {"maths": 4}
_OTHERWISE = 20
"""Test items a task."""

NUM_FITTED = 24
"""Calibration items a task, on which scales are fitted."""

_BATCH, _FITTED_BATCH = 20, 6


class Stored(NamedTuple):
    """What a form makes of one delta."""

    dense: Tensor
    """(O, I) float32, as it comes back."""

    num_bytes: float
    """On disk."""


Pack = Callable[[Tensor, str], Stored]
"""(delta (O, I) float32, name of its weight) → what is stored."""


@dataclass(frozen=True)
class Form:
    """One way to store all deltas of an expert."""

    kind: str
    """Points of one kind are joined in the figure."""

    setting: str
    pack: Pack
    embedding: Pack | None = None
    """The delta of the embedding, where it is stored too."""

    fit: ScaleFit | None = None
    """How the scales are fitted afterwards."""

    on_all: bool = True
    """Whether it is measured on all experts, or only on those that no form was chosen on."""

    @property
    def name(self) -> str:
        """Its row in the table."""
        return f"{self.kind} {self.setting}".strip()


def whole(delta: Tensor, name: str) -> Stored:
    """The delta as it is, in 16 bits."""
    return Stored(delta, 2.0 * delta.numel())


def packed(density: float, **settings: Any) -> Pack:
    """The library's own encoding, with the bytes that its files hold."""
    config = MediatorConfig(density=density, **settings)

    def pack(delta: Tensor, name: str) -> Stored:
        stored = pack_delta(config, name, delta, density, BFLOAT16, None)
        return Stored(stored.dense(), size_on_disk(stored))

    return pack


def size_on_disk(delta: SparseDelta) -> float:
    """Bytes of a delta in an adapter file."""
    return float(sum(to_disk(key, array).nbytes for key, array in PackedArrays.of(delta).buffers("expert").items()))


def three_bit_factors(density: float) -> Pack:
    """Singular vectors of 3 bits alone, with the bytes of signs of a density (compare Delta-CoMe, arXiv 2406.08903)."""

    def pack(delta: Tensor, name: str) -> Stored:
        rank = factor_rank((delta.shape[0], delta.shape[1]), density)
        product = rounded_factors(delta, rank)
        return Stored(product, rank * (3 * sum(delta.shape) + 48) / 8)

    return pack


def components(rank: int) -> Pack:
    """Some singular vectors of 3 bits."""
    return lambda delta, name: Stored(rounded_factors(delta, rank), rank * (3 * sum(delta.shape) + 48) / 8)


def rounded_factors(delta: Tensor, rank: int) -> Tensor:
    """Leading singular vectors rounded to 8 levels, the size of each component fitted to the delta: (O, I)."""
    left, right = low_rank(delta, rank, torch.Generator().manual_seed(0))
    levels = torch.tensor(LEVELS)
    left, right = levels[nearest_levels(left)], levels[nearest_levels(right.T)]
    squares = left.square().sum(dim=0) * right.square().sum(dim=0)
    return (left * (((left.T @ delta) * right.T).sum(dim=1) / squares)) @ right.T


def signs_and_factors(first: float, second: float) -> Pack:
    """Signs of density ``first``, then 3-bit factors of what they leave, with the bytes of signs of ``second``."""
    signs, factors = packed(first), three_bit_factors(second)

    def pack(delta: Tensor, name: str) -> Stored:
        kept = signs(delta, name)
        rest = factors(delta - kept.dense, name)
        return Stored(kept.dense + rest.dense, kept.num_bytes + rest.num_bytes)

    return pack


def neurons(density: float) -> Pack:
    """Signs of every entry of the neurons that changed most: rows of a matrix, or columns where it leads back.

    A bit a neuron for positions, a bit an entry for signs, 16 bits a row for scales (by projection).
    """

    def pack(delta: Tensor, name: str) -> Stored:
        by_column = name.endswith(("o_proj.weight", "down_proj.weight"))
        norms = delta.norm(dim=0 if by_column else 1)
        chosen = torch.zeros_like(norms, dtype=torch.bool)
        chosen[norms.topk(max(1, round(density * len(norms)))).indices] = True
        kept = (chosen[None] if by_column else chosen[:, None]).expand_as(delta) & (delta != 0)
        exact = delta.double()
        sums = RowSums(
            exact.square().sum(dim=1).numpy(), (exact.abs() * kept).sum(dim=1).numpy(), kept.sum(dim=1).numpy()
        )
        scales = torch.from_numpy(SIGN_SCALES["projection"](sums)).float()
        num_rows = delta.shape[0] if by_column else int(chosen.sum())
        num_bytes = len(norms) / 8 + int(chosen.sum()) * delta.numel() / len(norms) / 8 + 2 * num_rows
        return Stored(kept * delta.sign() * scales[:, None], num_bytes)

    return pack


DENSITIES = (0.05, 0.1, 0.2, 0.4)

FORMS: tuple[Form, ...] = (
    Form("whole delta", "", whole),
    *(Form("sign", str(density), packed(density)) for density in DENSITIES),
    *(Form("factors_sign", str(density), packed(density, encoding="factors_sign")) for density in (0.02, 0.04)),
    Form("factors_sign", "0.1", packed(0.1, encoding="factors_sign"), on_all=False),
    Form("3-bit factors alone", "as signs 0.05", three_bit_factors(0.05), on_all=False),
    Form("signs, then 3-bit factors", "0.1 and 0.02", signs_and_factors(0.1, 0.02), on_all=False),
    Form("neurons", "0.5", neurons(0.5), on_all=False),
    *(
        Form("sign, scales fitted", str(density), packed(density), fit=ScaleFit(), on_all=False)
        for density in (0.05, 0.1, 0.2)
    ),
    Form("whole delta, embedding too", "", whole, whole),
    Form("sign, 8 components of the embedding", "0.2", packed(0.2), components(8), on_all=False),
    Form(
        "factors_sign, embedding too",
        "0.04",
        packed(0.04, encoding="factors_sign"),
        packed(0.04, encoding="factors_sign"),
    ),
)


class Measures(NamedTuple):
    """One expert from one form, on test items of its task."""

    divergence: float
    """From the expert's own distribution, in nats a token of the answers."""

    loss: float
    """Of the reference answers, in nats a token."""

    right: float
    """Share of items of which every token of the answer is the most likely one."""

    same: float
    """Share of tokens of which the most likely one is that of the expert."""


class Trial:
    """The experts' deltas, their test items, and one model that takes any weights."""

    def __init__(self, bench: Bench, lab: Lab) -> None:
        self._bench, self._lab = bench, lab
        self.mean: State = merge_states(lab.base, lab.experts, MERGE_METHODS["average"])
        self.targets = [name for name in lab.base if ".layers." in name and name.endswith("proj.weight")]
        self._references: dict[tuple[str, str], tuple[list[AnswerBatch], list[list[Tensor]]]] = {}
        self.num_routed = sum(lab.base[name].numel() for name in self.targets)

    def encoded(self, items: Sequence[Item], size: int = _BATCH) -> list[AnswerBatch]:
        """Prompts and reference answers as batches."""
        tokenizer = self._lab.tokenizer
        rows = [
            (
                list(token_ids(tokenizer, render(tokenizer, item.prompt, True))),
                answer_ids(tokenizer, item.answer),
            )
            for item in items
        ]
        return [AnswerBatch.of(rows[start : start + size]) for start in range(0, len(rows), size)]

    def measure(self, task: str, form: Form) -> tuple[float, Measures]:
        """Bytes a routed parameter, and how near one expert comes back."""
        test, expected = self._reference(task, "test")
        calibration = [] if form.fit is None else list(zip(*self._reference(task, "calibration"), strict=True))
        state, deltas, num_bytes = self._restored(task, form)
        with self._lab.holding(state) as model:
            if form.fit is not None:
                fit_factors(model, deltas, calibration, form.fit)
            with torch.no_grad():
                return num_bytes / self.num_routed, measured(model, test, expected)

    def _reference(self, task: str, split: str) -> tuple[list[AnswerBatch], list[list[Tensor]]]:
        """Items of a task, and the distributions of its expert before each token of their answers."""
        if (task, split) not in self._references:
            found = self._bench.sample.tasks[task]
            items = found.test[: num_items(task)] if split == "test" else found.calibration[:NUM_FITTED]
            batches = self.encoded(items, _BATCH if split == "test" else _FITTED_BATCH)
            with self._lab.holding(self._lab.experts[task]) as model, torch.no_grad():
                self._references[task, split] = batches, [log_probabilities(model, batch) for batch in batches]
        return self._references[task, split]

    def _restored(self, task: str, form: Form) -> tuple[State, dict[str, Tensor], float]:
        """All weights, the deltas of those whose scales are fitted, and bytes."""
        state, deltas, num_bytes = dict(self.mean), {}, 0.0
        packs = dict.fromkeys(self.targets, form.pack)
        if form.embedding is not None:
            packs |= {name: form.embedding for name in state if name.endswith("embed_tokens.weight")}
        for name, pack in packs.items():
            mean = self.mean[name].float()
            stored = pack(self._lab.experts[task][name].float() - mean, name)
            state[name], num_bytes = mean + stored.dense, num_bytes + stored.num_bytes
            if form.fit is not None:
                deltas[name] = stored.dense
        return state, deltas, num_bytes


def measured(model: nn.Module, batches: Sequence[AnswerBatch], references: Sequence[Sequence[Tensor]]) -> Measures:
    """Compare a model with an expert, token by token of the reference answers.

    Args:
        model: plain.
        batches: prompts with their answers.
        references: the expert's log probabilities before each token: (n, V) for each row of each batch.
    """
    divergence = loss = right = same = 0.0
    tokens = items = 0
    for batch, experts in zip(batches, references, strict=True):
        for target, ours, theirs in zip(batch.answers, log_probabilities(model, batch), experts, strict=True):
            divergence += float((theirs.exp() * (theirs - ours)).sum())
            loss -= float(ours.gather(1, target[:, None]).sum())
            right += bool((ours.argmax(-1) == target).all())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tokens, items = tokens + len(target), items + 1
    return Measures(divergence / tokens, loss / tokens, right / items, same / tokens)


def compare_forms(bench: Bench, lab: Lab, forms: Sequence[Form], kept: Path) -> dict[str, Any]:
    """Every form on its experts; what was measured before is taken from ``kept``.

    Args:
        bench: experts and items.
        lab: their weights.
        forms: in the order of the table.
        kept: a JSON file of single measurements.
    """
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    trial = Trial(bench, lab)
    new = [task for task in bench.experts if task not in FIRST_TASKS]
    rows: dict[str, Any] = {}
    for form in forms:
        tasks = {}
        for task in bench.experts if form.on_all else new:
            key = _key(bench, task, form)
            if key not in known:
                num_bytes, measures = trial.measure(task, form)
                known[key] = {"bytes": num_bytes, **measures._asdict()}
                bench.say(f"{form.name:40} {task:12} {num_bytes:.4f} " + " ".join(f"{each:.4f}" for each in measures))
                write_replacing(kept, json.dumps(known, indent=1))
            tasks[task] = known[key]
        rows[form.name] = _row(form, tasks, new)
    items = {task: trial.encoded(bench.sample.tasks[task].test[: num_items(task)]) for task in bench.experts}
    sizes = {task: sum(len(each) for batch in batches for each in batch.answers) for task, batches in items.items()}
    about = {"num_routed": trial.num_routed, "num_tokens": sizes, "num_fitted": NUM_FITTED, "new": new}
    return {**about, "forms": rows}


def _row(form: Form, tasks: Mapping[str, Mapping[str, float]], new: Sequence[str]) -> dict[str, Any]:
    def means(some: Sequence[str]) -> dict[str, float]:
        return {key: sum(tasks[task][key] for task in some) / len(some) for key in ("bytes", *Measures._fields)}

    found = {"kind": form.kind, "setting": form.setting, "new": means(new), "tasks": dict(tasks)}
    return {**found, "all": means(list(tasks))} if form.on_all else found


def num_items(task: str) -> int:
    """Test items of a task; word problems are long."""
    return NUM_ITEMS.get(task, _OTHERWISE)


def _key(bench: Bench, task: str, form: Form) -> str:
    """What one measurement depends on."""
    num = num_items(task)
    fit = None if form.fit is None else [form.fit.num_steps, form.fit.learning_rate, _FITTED_BATCH, NUM_FITTED]
    return json.dumps([task, form.name, num, fit, sorted(bench.hashes)])
