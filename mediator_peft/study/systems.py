"""Systems of the study and their scores: base, experts, single-model merges, Mediator named and routed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.adapter_files import find_adapter
from ..checkpoints.adapter_sizes import read_adapter_info
from ..demo.tasks import Item, Task
from ..demo.training import TrainedExpert
from ..errors import AdapterError, CheckpointError
from ..evaluation.fit_and_save import fit_and_save
from ..evaluation.generation import ROUTED, Memo, answer_losses, route_prompts
from ..evaluation.report import write_json
from ..merge.offline import build_mediator
from ..methods.merging import MERGE_METHODS
from ..tuner.config import MediatorConfig
from .experts import StudyFolder, trained_experts, validation_items
from .lab import Lab, State, merge_states
from .scores import CONTINUATION, GENERAL, ScoreBook, Scores, Sizes, put_together, score_items
from .settings import StudySettings

BASE, NAMED, ROUTED_SYSTEM = "base", "Mediator, expert named", "Mediator, routed"
COEFFICIENTS = (0.2, 0.3, 0.5, 0.8)
"""Of task arithmetic, tried on validation items."""

NUM_ROUTED = 100
"""Test prompts of each task whose routes are counted."""

NUM_VALIDATION = 10
"""Validation items a task."""

MARKER = "study.json"
"""File in a built model's folder: what the model depends on."""

_ROUTES = "study-routes.json"
_PACKAGE = Path(__file__).parents[1]

Say = Callable[[str], None]

Part = tuple[list[int], dict[str, Any]]
"""(places of items, ascending; ``model``, ``tokenizer`` and other arguments of ``score_items`` for these)"""

Parts = Callable[[Sequence[Item]], Iterator[Part]]


@dataclass(frozen=True)
class Sample:
    """What systems are measured on."""

    tasks: Mapping[str, Task]
    """Tasks that have an expert, then those that have none."""

    known: Sequence[str]
    """The tasks with an expert."""

    sizes: Mapping[str, Sizes]
    """Task → how many items."""


def make_sample(
    tasks: Mapping[str, Task],
    known: Sequence[str],
    unknown: Mapping[str, Task],
    num_answers: int,
    num_losses: int,
) -> Sample:
    """The items of the study, the first ones of each test split, the same for all systems.

    Args:
        tasks: all tasks that may have an expert.
        known: those that have one.
        unknown: tasks without an expert.
        num_answers: greedy answers a task.
        num_losses: answer losses a task; half of them for word problems, which are long, and for unknown tasks; the
            base's own answers are all measured.
    """

    def sizes(answers: int, losses: int) -> dict[str, Sizes]:
        # Word problems are long: their losses are measured, their answers are not generated.
        known_sizes = {name: Sizes(0, losses // 2) if name == "maths" else Sizes(answers, losses) for name in known}
        whole = {name: len(task.test) for name, task in unknown.items() if task.match == CONTINUATION}
        return known_sizes | {name: Sizes(0, whole.get(name, losses // 2)) for name in unknown}

    chosen = {name: tasks[name] for name in known}
    return Sample(chosen | dict(unknown), list(known), sizes(num_answers, num_losses))


@dataclass
class Bench:
    """What every step needs."""

    settings: StudySettings
    folder: StudyFolder
    experts: Mapping[str, TrainedExpert]
    """Task → its expert, the ones of the tables alone."""

    sample: Sample
    say: Say
    suffix: str = ""
    """Of the names of models, statistics and result files, where other experts than those of the tables take part."""

    @property
    def book(self) -> ScoreBook:
        """Where scores are kept."""
        return ScoreBook(self.folder.scores)

    @property
    def hashes(self) -> list[str]:
        """The experts' folder names, which hold hashes of all that they depend on."""
        return [expert.path.name for expert in self.experts.values()]

    def scored(self, system: str, task: str, sizes: Sizes, depends: Any, model: Callable[[], dict[str, Any]]) -> Scores:
        """Scores of an earlier run, or those measured now.

        Args:
            system: its name.
            task: its name.
            sizes: how many items.
            depends: what else the figures depend on.
            model: gives ``model``, ``tokenizer`` and other arguments of ``score_items``; called only when needed.
        """

        def whole(items: Sequence[Item]) -> Iterator[Part]:
            yield list(range(len(items))), model()

        return self.scored_in_parts(system, task, sizes, depends, whole)

    def scored_in_parts(self, system: str, task: str, sizes: Sizes, depends: Any, parts: Parts) -> Scores:
        """As :meth:`scored`, where different weights answer different items.

        Args:
            system: its name.
            task: its name.
            sizes: how many items.
            depends: what else the figures depend on.
            parts: items → their parts; each is answered before the next is asked for.
        """
        known = self.book.find(system, task, self.key(task, sizes, depends))
        if known is not None:
            return known
        match, items = self.sample.tasks[task].match, self.items(task, sizes)
        found = []
        for places, arguments in parts(items):
            inside = Sizes(sum(place < sizes.answers for place in places), sum(p < sizes.losses for p in places))
            chosen = [items[place] for place in places]
            found.append((places, score_items(items=chosen, match=match, sizes=inside, **arguments)))
        scores = put_together(found)
        accuracy = f"{scores.accuracy:.3f}" if scores.right else "–"
        self.say(f"{system} / {task}: accuracy {accuracy}, loss {scores.loss:.3f}, {scores.seconds:.0f} s")
        return self.book.keep(system, task, self.key(task, sizes, depends), scores)

    def items(self, task: str, sizes: Sizes) -> list[Item]:
        """The first test items of a task."""
        return self.sample.tasks[task].test[: max(sizes.answers, sizes.losses)]

    def key(self, task: str, sizes: Sizes, depends: Any) -> Any:
        """What scores are kept under, beside the names of system and task."""
        return [asdict(sizes), depends, [list(item) for item in self.items(task, sizes)]]


Table = dict[str, dict[str, Scores]]
"""System → task → scores."""


def score_alone(bench: Bench, lab: Lab) -> Table:
    """The base on all tasks, and each expert on its own."""
    own = score_experts(bench, lab)
    return score_base(bench, lab) | own


def score_base(bench: Bench, lab: Lab) -> Table:
    """The base on all tasks."""
    tokenizer, identity = lab.tokenizer, bench.folder.model.identity

    def base() -> dict[str, Any]:
        with lab.holding(lab.base) as model:
            return {"model": model, "tokenizer": tokenizer}

    sizes = bench.sample.sizes
    return {BASE: {task: bench.scored(BASE, task, sizes[task], identity, base) for task in bench.sample.tasks}}


def score_experts(bench: Bench, lab: Lab) -> Table:
    """Each expert on its own task."""
    table: Table = {}
    for name, expert in bench.experts.items():

        def own(name: str = name) -> dict[str, Any]:
            with lab.holding(lab.experts[name]) as model:
                return {"model": model, "tokenizer": lab.tokenizer}

        system = f"expert {name}"
        table[system] = {name: bench.scored(system, name, bench.sample.sizes[name], expert.path.name, own)}
    return table


def score_general(bench: Bench, lab: Lab) -> dict[str, Scores]:
    """The base and each expert on the base's own answers to general questions; empty where the sample has none."""
    if GENERAL not in bench.sample.tasks:
        return {}
    sizes = bench.sample.sizes[GENERAL]
    sources = {BASE: (bench.folder.model.identity, lab.base)} | {
        name: (expert.path.name, lab.experts[name]) for name, expert in bench.experts.items()
    }
    found = {}
    for name, (identity, state) in sources.items():

        def ready(state: State = state) -> dict[str, Any]:
            with lab.holding(state) as model:
                return {"model": model, "tokenizer": lab.tokenizer}

        system = name if name == BASE else f"expert {name}"
        found[name] = bench.scored(system, GENERAL, sizes, identity, ready)
    return found


def tuned_coefficient(bench: Bench, lab: Lab) -> float:
    """The coefficient of task arithmetic with the smallest mean answer loss on validation items.

    The mean over tasks of losses, as accuracies of so few items would hardly tell coefficients apart.
    """
    known = known_coefficient(bench)
    if known is not None:
        return known
    losses = {}
    for coefficient in COEFFICIENTS:
        state = merge_states(lab.base, lab.experts, MERGE_METHODS["task_arithmetic"], scale=coefficient)
        with lab.holding(state) as model:
            losses[coefficient] = _validation_loss(bench, model, lab.tokenizer)
        bench.say(f"task arithmetic, {coefficient}: validation loss {losses[coefficient]:.3f}")
    best = min(losses, key=lambda coefficient: losses[coefficient])
    write_json({"key": _coefficient_key(bench), "coefficient": best, "losses": losses}, _coefficient_path(bench))
    return best


def known_coefficient(bench: Bench) -> float | None:
    """The tuned coefficient of an earlier run; None where there is none."""
    path = _coefficient_path(bench)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return float(found["coefficient"]) if found["key"] == _coefficient_key(bench) else None


def _coefficient_path(bench: Bench) -> Path:
    return bench.folder.scores / f"coefficients{bench.suffix}.json"


def _coefficient_key(bench: Bench) -> list[Any]:
    return [bench.hashes, list(COEFFICIENTS), NUM_VALIDATION]


def _validation_loss(bench: Bench, model: Any, tokenizer: Any) -> float:
    means = []
    for task in bench.sample.known:
        items = validation_items(task, bench.settings, dict(bench.sample.tasks), bench.folder)[:NUM_VALIDATION]
        losses = answer_losses(model, tokenizer, [item.prompt for item in items], [item.answer for item in items])
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def model_key(bench: Bench, config: MediatorConfig) -> str:
    """What a built model and its scores depend on."""
    return json.dumps([bench.hashes, config.to_dict(), library_digest()], default=str, sort_keys=True)


@cache
def library_digest() -> str:
    """SHA-256 of the library's sources, without those of evaluation, demo, study and command line."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        name = path.relative_to(_PACKAGE)
        if path.suffix in (".py", ".cpp", ".h", ".inl") and name.parts[0] not in ("evaluation", "demo", "study", "cli"):
            digest.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def built_model(bench: Bench, name: str, config: MediatorConfig) -> Path:
    """The Mediator model of all experts with these settings, built and fitted once."""
    folder = bench.folder.models / name
    marker = folder / MARKER
    text = model_key(bench, config)
    if is_built(folder, text):
        return folder
    started = time.perf_counter()
    paths = {task: expert.path for task, expert in bench.experts.items()}
    shutil.rmtree(folder, ignore_errors=True)
    report = build_mediator(bench.folder.base, paths, folder, config)
    built = time.perf_counter()
    model, tokenizer = load_built(folder)
    fit_and_save(model, tokenizer, calibration_prompts(bench), find_adapter(folder))
    seconds = {"build": round(built - started, 1), "fit router": round(time.perf_counter() - built, 1)}
    write_json({"key": text, "report": report.to_dict(), "seconds": seconds}, marker)
    bench.say(f"built {name}: {seconds}")
    return folder


def calibration_prompts(bench: Bench) -> dict[str, list[str]]:
    """Task → prompts that its router is fitted on."""
    return {
        task: [item.prompt for item in bench.sample.tasks[task].calibration[: bench.settings.num_calibration]]
        for task in bench.experts
    }


def bytes_of_built(folder: Path) -> int:
    """Of a built model on disk: backbone and deltas."""
    info = read_adapter_info(folder)
    return (info.backbone_bytes or 0) + info.adapter_bytes


def is_built(folder: Path, key: str) -> bool:
    """Whether the model of this key is in the folder."""
    marker = folder / MARKER
    return marker.exists() and bool(json.loads(marker.read_text(encoding="utf-8"))["key"] == key)


def build_default(bench: Bench) -> Path:
    """The Mediator model with the library's defaults."""
    return built_model(bench, default_name(bench), MediatorConfig())


def default_name(bench: Bench) -> str:
    """Its folder among the models."""
    return f"default-{len(bench.experts)}{bench.suffix}"


def with_second_seeds(bench: Bench) -> Bench:
    """The same study with the second seed's expert in place of the first one's, where there is one.

    Raises:
        CheckpointError: none has been trained.
    """
    found = trained_experts(bench.settings, bench.folder)
    seconds = {
        expert.task: found[name]
        for name, expert in bench.settings.experts.items()
        if expert.seed and expert.task in bench.experts and name in found
    }
    if not seconds:
        raise CheckpointError(
            f"{bench.folder.experts} has no expert of a second seed: run `experts` without --only first."
        )
    return replace(bench, experts={**bench.experts, **seconds}, suffix="_seed1")


def load_built(folder: Path) -> tuple[Any, Any]:
    """A built model in float32, and its tokenizer."""
    from ..tuner.loading import load_mediator

    return load_mediator(folder, dtype=torch.float32)


def score_mediator(bench: Bench, folder: Path, suffix: str = "") -> Table:
    """The Mediator model with the right expert named, and routed."""
    loaded: list[Any] = []
    memo = Memo.empty()

    def model(expert_weights: Any) -> Callable[[], dict[str, Any]]:
        def ready() -> dict[str, Any]:
            if not loaded:
                loaded.extend(load_built(folder))
            return {"model": loaded[0], "tokenizer": loaded[1], "expert_weights": expert_weights, "memo": memo}

        return ready

    depends = json.loads((folder / MARKER).read_text(encoding="utf-8"))["key"]
    named, routed = NAMED + suffix, ROUTED_SYSTEM + suffix
    table: Table = {named: {}, routed: {}}
    for task in bench.sample.known:
        sizes = bench.sample.sizes[task]
        table[named][task] = bench.scored(named, task, sizes, depends, model(task))
        table[routed][task] = bench.scored(routed, task, sizes, depends, model(ROUTED))
    for task in bench.sample.tasks:
        if task not in bench.sample.known:
            table[routed][task] = bench.scored(routed, task, bench.sample.sizes[task], depends, model(ROUTED))
    return table


def rerouted(bench: Bench) -> dict[str, dict[str, float]]:
    """The routing shares of the model that ``systems`` built, whatever version built it, by today's gate.

    Raises:
        AdapterError: nothing has been built.
    """
    folder = bench.folder.models / default_name(bench)
    if not (folder / MARKER).exists():
        raise AdapterError(f"{folder} has no model yet: run the sub-command `systems` first.")
    (folder / _ROUTES).unlink(missing_ok=True)
    return routing_shares(bench, folder)


def routing_shares(bench: Bench, folder: Path) -> dict[str, dict[str, float]]:
    """Task → share of its test prompts by the column with the most weight, and ``flagged``: the base has over half."""
    path = folder / _ROUTES
    if path.exists():
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    model, tokenizer = load_built(folder)
    shares = {}
    for task, content in bench.sample.tasks.items():
        prompts = [item.prompt for item in content.test[:NUM_ROUTED]]
        routes = route_prompts(model, tokenizer, prompts)
        columns = {column: sum(r.expert == column for r in routes) / len(routes) for column in model.expert_names}
        shares[task] = {**columns, "flagged": sum(route.is_ood for route in routes) / len(routes)}
    write_json(shares, path)
    return shares
