"""How fast a routed model runs beside its plain backbone, and what it holds in memory.

All figures come from one run with alternating configurations; reported are medians of ratios within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..context_length import table_of_positions
from ..errors import ConfigError
from ..tuner.model import MediatorModel

_DECODE_ROUNDS = 6
Scope = Callable[[], AbstractContextManager[Any]]
DENSE, ONE, MIXED, APART = "backbone alone", "one expert", "mixed batch", "one pass an expert"


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed."""

    prompt_tokens: int = 512
    """Tokens of a prompt in the prefill."""

    context: int = 64
    """Tokens in the cache of a decode step."""

    batch_size: int = 8
    """Rows of a decode step of a batch."""

    num_experts: int = 4
    """Most experts in a mixed batch."""

    rounds: int = 7
    """Timed repetitions of a prefill per configuration; decode steps are repeated six times as often."""

    steps: int = 3
    """Decode steps of a turn."""


class Pace(NamedTuple):
    """One line of the table."""

    work: str
    """``"prefill"`` or ``"decode"``."""

    name: str
    batch_size: int
    seconds: float
    """Median of one pass: a step of the whole batch, or its prefill."""

    tokens_per_second: float
    ratio: float
    """Tokens a second over those of the plain backbone with the same batch: median over the rounds."""


@dataclass(frozen=True)
class SpeedReport:
    """What was measured."""

    settings: SpeedSettings
    threads: int
    dtype: str
    num_parameters: int
    experts: tuple[str, ...]
    paces: tuple[Pace, ...]
    switch_seconds: float
    """What changing the folded expert takes: the old one out, the new one in."""

    switch_steps: float
    """The same in decode steps of one row."""

    routing_seconds: float | None
    """Deciding the route of one prompt; None where the router is not fitted."""

    routing_share: float | None
    """The same as a share of that prompt's prefill."""

    memory: dict[str, int]
    """Bytes by what they hold."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "paces": [pace._asdict() for pace in self.paces]}


def plain_twin(tuner: MediatorModel) -> nn.Module:
    """The plain backbone as a model of its own, without anything of ours around its layers; it shares their weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*tuner.parameters(), *tuner.buffers())}
    return deepcopy(tuner, shared).unload().eval()


class DecodeTurn:
    """Some decode steps of one configuration. The cache is cut back after each, so that all steps are alike."""

    def __init__(self, model: Any, scope: Scope, batch_size: int, settings: SpeedSettings) -> None:
        self._model, self._scope, self._steps = model, scope, settings.steps
        self._ids = _random_ids(model, batch_size, settings.context)
        self._cache: Any = None
        self.switches: list[float] = []
        """Seconds of entering the scope with the first step, and of leaving it, beyond one step's time."""

    def __call__(self) -> list[float]:
        seconds = []
        start = _now(self._ids)
        with self._scope():
            if self._cache is None:
                self._cache = self._model(input_ids=self._ids, use_cache=True).past_key_values
                start = _now(self._ids)
            self._step()
            first = _now(self._ids) - start
            for _ in range(self._steps):
                start = _now(self._ids)
                self._step()
                seconds.append(_now(self._ids) - start)
            start = _now(self._ids)
        self.switches.append(first + _now(self._ids) - start - median(seconds))
        return seconds

    def _step(self) -> None:
        self._model(input_ids=self._ids[:, -1:], past_key_values=self._cache, use_cache=True)
        self._cache.crop(-1)


class PrefillTurn:
    """One prefill of one configuration."""

    def __init__(self, model: Any, scope: Scope, batch_size: int, num_tokens: int) -> None:
        self._model, self._scope = model, scope
        self._ids = _random_ids(model, batch_size, num_tokens)

    def __call__(self) -> list[float]:
        with self._scope():
            # The last position's logits are all that generation needs of a prompt.
            self._model(input_ids=self._ids[:, :8], logits_to_keep=1)
            start = _now(self._ids)
            self._model(input_ids=self._ids, use_cache=True, logits_to_keep=1)
            return [_now(self._ids) - start]


class ApartTurn:
    """One pass for each expert over its own rows, each folded; changing the expert is not counted."""

    def __init__(self, turns: Sequence[DecodeTurn]) -> None:
        self._turns = turns

    def __call__(self) -> list[float]:
        return [sum(steps) for steps in zip(*(turn() for turn in self._turns), strict=True)]


def take_turns(
    turns: Mapping[str, Callable[[], list[float]]], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each configuration, one number a round; they alternate, and the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            taken = turn()
            if number:
                seconds[name].append(median(taken))
        advance()
    return seconds


def num_rounds(settings: SpeedSettings) -> int:
    """How many rounds ``measure_speed`` goes through, those that warm up counted."""
    return (2 * _DECODE_ROUNDS + 1) * settings.rounds + 3


def mixed_rows(names: Sequence[str], batch_size: int) -> list[str]:
    """One expert a row, rows of one expert together."""
    return [names[row * len(names) // batch_size] for row in range(batch_size)]


@torch.inference_mode()
def measure_speed(
    model: Any, settings: SpeedSettings = SpeedSettings(), advance: Callable[[], None] = lambda: None
) -> SpeedReport:
    """Time a routed model beside its plain backbone.

    Args:
        model: as ``load_mediator`` gives it.
        settings: what is timed.
        advance: called after each of :func:`num_rounds`.

    Raises:
        ConfigError: the model does not read so many tokens at once.
    """
    tuner: MediatorModel = model.base_model
    _check_lengths(tuner.model, settings)
    plain = plain_twin(tuner)
    experts = tuple(tuner.expert_names[: settings.num_experts])
    single = _decode_turns(tuner, plain, experts, 1, settings)
    # A second expert in turn, so that every turn of either has to change what is folded.
    single["other"] = DecodeTurn(tuner.model, _scope(tuner, experts[-1]), 1, settings)
    single_times = take_turns(single, _DECODE_ROUNDS * settings.rounds, advance)
    switches = [*single[ONE].switches[1:], *single["other"].switches[1:]]
    batch_times = take_turns(_batch_turns(tuner, plain, experts, settings), _DECODE_ROUNDS * settings.rounds, advance)
    prefill = take_turns(_prefill_turns(tuner, plain, experts, settings), settings.rounds, advance)
    del single_times["other"]
    switch = max(0.0, median(switches))
    routing = _routing_seconds(tuner, settings)
    return SpeedReport(
        settings,
        torch.get_num_threads(),
        str(tuner.model.dtype).removeprefix("torch."),
        sum(parameter.numel() for parameter in plain.parameters()),
        experts,
        (
            *_paces("decode", single_times, 1, 1),
            *_paces("decode", batch_times, settings.batch_size, settings.batch_size),
            *_paces("prefill", prefill, len(experts), len(experts) * settings.prompt_tokens),
        ),
        switch,
        switch / median(single_times[DENSE]),
        routing,
        None if routing is None else routing / (median(prefill[ONE]) / len(experts)),
        memory_by_part(tuner, experts[0]),
    )


def _check_lengths(model: Any, settings: SpeedSettings) -> None:
    limit = table_of_positions(model)
    for name, number in (("prompt_tokens", settings.prompt_tokens), ("context", settings.context + 1)):
        if limit is not None and number > limit:
            raise ConfigError(
                f"{name} asks for {number:,} tokens; the model has a table of {limit:,} positions. Take fewer."
            )


def _scope(tuner: MediatorModel, spec: Any) -> Scope:
    return lambda: tuner.use_experts(spec)


def _decode_turns(
    tuner: MediatorModel, plain: nn.Module, experts: Sequence[str], batch_size: int, settings: SpeedSettings
) -> dict[str, DecodeTurn]:
    return {
        DENSE: DecodeTurn(plain, nullcontext, batch_size, settings),
        ONE: DecodeTurn(tuner.model, _scope(tuner, experts[0]), batch_size, settings),
    }


def _batch_turns(
    tuner: MediatorModel, plain: nn.Module, experts: Sequence[str], settings: SpeedSettings
) -> dict[str, Callable[[], list[float]]]:
    size = settings.batch_size
    rows = mixed_rows(experts, size)
    turns: dict[str, Callable[[], list[float]]] = {**_decode_turns(tuner, plain, experts, size, settings)}
    turns[MIXED] = DecodeTurn(tuner.model, _scope(tuner, rows), size, settings)
    turns[APART] = ApartTurn(
        [DecodeTurn(tuner.model, _scope(tuner, name), rows.count(name), settings) for name in dict.fromkeys(rows)]
    )
    return turns


def _prefill_turns(
    tuner: MediatorModel, plain: nn.Module, experts: Sequence[str], settings: SpeedSettings
) -> dict[str, PrefillTurn]:
    size, tokens = len(experts), settings.prompt_tokens
    return {
        DENSE: PrefillTurn(plain, nullcontext, size, tokens),
        ONE: PrefillTurn(tuner.model, _scope(tuner, experts[0]), size, tokens),
        MIXED: PrefillTurn(tuner.model, _scope(tuner, list(experts)), size, tokens),
    }


def _paces(work: str, seconds: Mapping[str, list[float]], batch_size: int, num_tokens: int) -> list[Pace]:
    paces = []
    for name, taken in seconds.items():
        ratio = median(dense / ours for dense, ours in zip(seconds[DENSE], taken, strict=True))
        paces.append(Pace(work, name, batch_size, median(taken), num_tokens / median(taken), ratio))
    return paces


def _routing_seconds(tuner: MediatorModel, settings: SpeedSettings) -> float | None:
    if not tuner.router.is_fitted:
        return None
    ids = _random_ids(tuner.model, 1, settings.prompt_tokens)
    taken = []
    for _ in range(settings.rounds + 1):
        start = _now(ids)
        tuner.route(ids)
        taken.append(_now(ids) - start)
    return median(taken[1:])


def memory_by_part(tuner: MediatorModel, expert: str) -> dict[str, int]:
    """Bytes in memory: the backbone, the bank, and what is held beside the bank while ``expert`` is folded in."""
    layers = tuner.routed_layers().values()
    banks = [layer.bank(tuner.active_adapters[0]) for layer in layers]
    parameters = {id(parameter): parameter.nbytes for parameter in tuner.model.parameters()}
    with tuner.use_experts(expert):
        tuner.model(input_ids=_random_ids(tuner.model, 1, 1))
        folded = sum(layer.merged_bytes for layer in layers)
    return {
        "backbone": sum(parameters.values()),
        "bank": sum(bank.num_bytes for bank in banks),
        "offsets into the bank": sum(bank.num_derived_bytes for bank in banks),
        "saved while folded": folded,
        "kept folded": sum(layer.cached_bytes for layer in layers),
    }


def _now(ids: Tensor) -> float:
    """Seconds on a clock, once the device that holds ``ids`` has done all it was told."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return perf_counter()


def _random_ids(model: Any, batch_size: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(min(5, size - 1), size, (batch_size, num_tokens), generator=generator)
    return ids.to(next(model.parameters()).device)
