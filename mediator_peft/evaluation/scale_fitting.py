"""Fitting the scales of an expert's deltas to the expert's own next-token distribution.

BitDelta (arXiv 2402.10193) trains one scale a matrix to the logits of the expert, with all else frozen. Here the
divergence of distributions is minimised, on answers to calibration prompts (our choice).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank.sparse_delta import SparseDelta
from ..checkpoints.adapter_files import find_adapter
from ..config import ALWAYS_PREFIX
from ..data_files import json_lines
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..methods.encoding import ENCODINGS
from ..tables import unknown_name
from ..tuner.loading import load_mediator
from .answer_batches import AnswerBatch, answer_logits
from .fit_and_save import save_router
from .generation import answer_prompts
from .logits import original_model, plain_model
from .prompts import answer_ids, prompt_rows, read_prompts

Pair = tuple[str, str | None]
"""A prompt, and its answer; None where the expert is asked for one."""

_LEAST_ITEMS = 8
_LEAST_COSINE = 0.05
"""Between an expert's stored delta and what it adds to the backbone; a thousandth of the entries reaches .1, a delta of
another expert 0 or less."""


@dataclass(frozen=True)
class ScaleFit:
    """How scales are fitted: Adam on the logarithm of one factor a matrix."""

    num_steps: int = 12
    learning_rate: float = 0.03
    batch_size: int = 6
    held_out: float = 0.25
    """Share of the prompts on which is decided whether the fit is kept."""

    max_answer_tokens: int = 32
    """Longer answers are cut."""

    seed: int = 0
    """Of the order of the prompts."""


@dataclass(frozen=True)
class ScaleReport:
    """What fitting did for one expert."""

    num_fitted: int
    num_held_out: int
    divergence_before: float
    """From the expert, of held-out prompts, in nats a token of the answers."""

    divergence_after: float
    is_kept: bool
    """False where it did not fall; the scales stay then."""

    factors: dict[str, float]
    """Layer → factor of its scales."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


Known = tuple[AnswerBatch, Sequence[Tensor]]
"""A batch, and the expert's log probabilities before each token of its answers: (n, V) for each row."""


def log_probabilities(model: Any, batch: AnswerBatch) -> list[Tensor]:
    """Of all tokens before each token of an answer: (n, V) for each row, float32."""
    return [logits.log_softmax(-1) for logits in answer_logits(model, batch)]


def divergence(model: Any, batches: Sequence[Known]) -> Tensor:
    r"""Mean over the tokens of all answers of :math:`\mathrm{KL}(p_\text{expert} \,\|\, p_\text{model})`, in nats."""
    total = torch.zeros(())
    for batch, experts in batches:
        for ours, theirs in zip(log_probabilities(model, batch), experts, strict=True):
            total = total + (theirs.exp() * (theirs - ours)).sum()
    return total / sum(batch.num_tokens for batch, _ in batches)


def fit_factors(model: Any, deltas: Mapping[str, Tensor], batches: Sequence[Known], fit: ScaleFit) -> dict[str, float]:
    r"""Factors c of some deltas that bring a model nearer to an expert; its weights are the fitted ones afterwards.

    .. math:: \min_c \sum_t \mathrm{KL}(p_\text{expert}(t) \,\|\, p_{D + c \circ S}(t))

    Adam on :math:`\log c`, one batch a step. The gradient of c is the inner product of the weight's gradient and S.

    Args:
        model: plain, with the weights D + S.
        deltas: parameter name → S, in the parameter's shape, float32.
        batches: with the expert's distributions.
        fit: how.
    """
    parameters = dict(model.named_parameters())
    backbone = {name: parameters[name].detach() - delta for name, delta in deltas.items()}
    logs = {name: torch.zeros(()) for name in deltas}

    def pull(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            # One gradient of a whole matrix at a time is held.
            assert parameter.grad is not None
            logs[name].grad = logs[name].exp() * (parameter.grad.float() * deltas[name]).sum()
            parameter.grad = None

        return hook

    for name, parameter in parameters.items():
        parameter.requires_grad_(name in deltas)
    hooks = [parameters[name].register_post_accumulate_grad_hook(pull(name)) for name in deltas]
    optimizer = torch.optim.Adam(list(logs.values()), lr=fit.learning_rate)
    try:
        for step in range(fit.num_steps):
            divergence(model, [batches[step % len(batches)]]).backward()
            optimizer.step()
            with torch.no_grad():
                for name, delta in deltas.items():
                    parameters[name].copy_(backbone[name] + logs[name].exp() * delta)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return {name: float(log.exp()) for name, log in logs.items()}


def fit_scales(
    out: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    data: Mapping[str, str | os.PathLike[str] | Sequence[Pair]],
    fit: ScaleFit | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    use_template: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, ScaleReport]:
    """Fit the scales of some experts of an output, and save them in it; other experts' deltas keep their bytes.

    Each matrix's scales get one factor. A part of the prompts is held out, and where the divergence from the expert
    does not fall on it, the scales stay. All is computed in float32, with one expert and one plain model in memory.

    Args:
        out: what ``build_mediator`` wrote.
        experts: name → checkpoint that it was built from.
        data: name → JSONL file with ``prompt`` and perhaps ``answer``, or pairs of them; 8 or more. Where an answer is
            missing, the expert's own greedy answers are taken.
        fit: how.
        base: needed where an expert is a LoRA.
        use_template: whether prompts are rendered with the chat template.
        say: told of the progress.

    Raises:
        ConfigError: an expert is unknown, or has no data.
        UnsupportedError: an expert shares its delta, deltas are always on, or the encoding has no scales.
        CheckpointError: a checkpoint cannot be read, or is not the one that the expert's deltas were made from.
        DataFileError: prompts cannot be read.
    """
    fit = fit or ScaleFit()
    model, tokenizer = load_mediator(Path(out), dtype="auto")
    _check(model, experts, data)
    pairs = {name: _pairs(data[name]) for name in experts}
    for name, found in pairs.items():
        if len(found) < _LEAST_ITEMS:
            raise ConfigError(f"expert {name!r} has {len(found)} prompts; give {_LEAST_ITEMS} or more.")
    state = {name: tensor.detach().float() for name, tensor in _plain_state(Path(out)).items()}
    reports = {}
    for name in experts:
        say(f"{name}: asking the expert")
        expert = original_model(str(experts[name]), name, base)
        _check_origin(model, state, expert, name)
        known = _asked(expert, tokenizer, pairs[name], fit, use_template)
        del expert
        say(f"{name}: fitting")
        reports[name] = _fit_one(model, Path(out), state, name, known, fit)
    if any(report.is_kept for report in reports.values()):
        save_router(model, find_adapter(Path(out)), lambda folder: {})
    return reports


def read_pairs(path: str) -> list[Pair]:
    """Prompts of a JSONL file, with their answers where all have one.

    Raises:
        DataFileError: it cannot be read, or a line has no prompt.
    """
    prompts, faults = read_prompts(path), list[str]()
    answers = [record.get("answer") for _, record in json_lines(path, faults) if isinstance(record, dict)]
    if len(answers) != len(prompts) or not all(isinstance(answer, str) and answer for answer in answers):
        answers = [None] * len(prompts)
    return list(zip(prompts, answers, strict=True))


def _pairs(given: str | os.PathLike[str] | Sequence[Pair]) -> Sequence[Pair]:
    return read_pairs(os.fspath(given)) if isinstance(given, (str, os.PathLike)) else given


def _check(model: Any, experts: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    config = model.active.config
    for name in experts:
        if name not in (config.expert_names or ()):
            raise ConfigError(unknown_name(name, config.expert_names or (), "expert"))
        if name not in data:
            raise ConfigError(f"expert {name!r} has no data: give prompts of its task.")
    rows = config.column_map or {}
    always = [stored.removeprefix(ALWAYS_PREFIX) for stored in rows if stored.startswith(ALWAYS_PREFIX)]
    if always:
        raise UnsupportedError(
            f"this model has always-on deltas ({', '.join(always)}), which the original experts have not: fitted "
            "scales would work against them. Build without --always to fit scales."
        )
    for name in experts:
        users = sorted({user for row in rows.values() if name in row for user in row} - {name})
        if users:
            raise UnsupportedError(
                f"expert {name!r} shares a delta with {', '.join(users)}, so its scales are not its own. Fit the "
                "scales of a build without --families, then share deltas with `condense`."
            )
    if not ENCODINGS[config.encoding].has_scales:
        raise UnsupportedError(f"encoding {config.encoding!r} has no scales that can be fitted.")


def _stored_deltas(model: Any, name: str) -> Iterator[tuple[str, SparseDelta, Tensor]]:
    """(layer, stored delta, the same as a matrix of the weight's own shape) of each layer where an expert has one."""
    for layer_name, layer in model.base_model.routed_layers().items():
        delta = layer.bank(model.active.name).stored(name)
        if delta is not None:
            yield layer_name, delta, delta.dense().T if layer.is_transposed else delta.dense()


def _check_origin(model: Any, state: Mapping[str, Tensor], expert: Any, name: str) -> None:
    """Refuse a checkpoint that lies in another direction from the backbone than the expert's deltas do."""
    parameters = dict(expert.named_parameters())
    inner = length = distance = 0.0
    for layer_name, _, matrix in _stored_deltas(model, name):
        weight = f"{layer_name}.weight"
        if weight not in state:
            continue
        if weight not in parameters or parameters[weight].shape != state[weight].shape:
            raise CheckpointError(f"expert {name!r}: its checkpoint has no matrix {weight!r} like the backbone's.")
        ours = matrix.double()
        theirs = parameters[weight].detach().double() - state[weight].double()
        inner += float((ours * theirs).sum())
        length += float(ours.square().sum())
        distance += float(theirs.square().sum())
    cosine = inner / (length * distance) ** 0.5 if length * distance else 0.0
    if length and cosine < _LEAST_COSINE:
        raise CheckpointError(
            f"expert {name!r}: its deltas were not made from this checkpoint (cosine {cosine:.2f} between them and "
            "what it adds to the backbone). Give the checkpoint that the output was built from."
        )


def _plain_state(out: Path) -> dict[str, Tensor]:
    """The backbone's parameters by the names of the plain model."""
    from ..checkpoints.name_mapping import named_as_in_model
    from ..checkpoints.opening import open_checkpoint
    from ..checkpoints.tensor_inventory import outline_of

    backbone = open_checkpoint(str(out), "the backbone")
    backbone = named_as_in_model(backbone, outline_of(backbone))
    return {name: backbone.tensor(name) for name in backbone.tensors}


def _asked(
    expert: Any, tokenizer: Any, pairs: Sequence[Pair], fit: ScaleFit, use_template: bool
) -> tuple[list[Known], list[Known]]:
    """Batches to fit on and held-out ones, with the expert's distributions."""
    order = list(pairs)
    random.Random(fit.seed).shuffle(order)
    missing = [prompt for prompt, answer in order if answer is None]
    given = {prompt: answer for prompt, answer in order if answer is not None}
    if missing:
        texts = answer_prompts(
            expert, tokenizer, missing, max_new_tokens=fit.max_answer_tokens, use_template=use_template
        )
        given |= dict(zip(missing, texts, strict=True))
    targets = [answer_ids(tokenizer, given[prompt])[: fit.max_answer_tokens] for prompt, _ in order]
    encoded = prompt_rows(expert, tokenizer, [prompt for prompt, _ in order], use_template, list(map(len, targets)))
    rows = [(prompt, answer) for prompt, answer in zip(encoded, targets, strict=True) if answer]
    num_held = max(1, round(fit.held_out * len(rows)))
    found: list[list[Known]] = []
    for part in (rows[num_held:], rows[:num_held]):
        batches = [
            AnswerBatch.of(part[start : start + fit.batch_size]) for start in range(0, len(part), fit.batch_size)
        ]
        with torch.no_grad():
            found.append([(batch, log_probabilities(expert, batch)) for batch in batches])
    return found[0], found[1]


def _fit_one(
    model: Any,
    out: Path,
    state: Mapping[str, Tensor],
    name: str,
    known: tuple[list[Known], list[Known]],
    fit: ScaleFit,
) -> ScaleReport:
    """Fit one expert's scales, and put them into the model where that brings it nearer to the expert."""
    from transformers import AutoConfig

    layers, deltas, stored, full = model.base_model.routed_layers(), {}, {}, dict(state)
    for layer_name, delta, matrix in _stored_deltas(model, name):
        weight = f"{layer_name}.weight"
        if weight not in full:
            raise UnsupportedError(f"scales of {layer_name!r} cannot be fitted: it is no plain linear layer.")
        stored[layer_name] = delta
        deltas[weight] = matrix.contiguous()
        full[weight] = full[weight] + deltas[weight]
        if delta.bias is not None:
            full[f"{layer_name}.bias"] = full[f"{layer_name}.bias"] + delta.bias
    plain = plain_model(AutoConfig.from_pretrained(out), full)
    fitted, held = known
    with torch.no_grad():
        before = float(divergence(plain, held))
    factors = fit_factors(plain, deltas, fitted, fit)
    with torch.no_grad():
        after = float(divergence(plain, held))
    if after < before:
        for layer_name, delta in stored.items():
            layers[layer_name].put_delta(model.active.name, name, scaled(delta, factors[f"{layer_name}.weight"]))
    num_fitted, num_held = (sum(len(batch.answers) for batch, _ in part) for part in known)
    by_layer = {layer: round(factors[f"{layer}.weight"], 6) for layer in stored}
    return ScaleReport(num_fitted, num_held, before, after, after < before, by_layer)


def scaled(delta: SparseDelta, factor: float) -> SparseDelta:
    """A delta times a factor; its bias stays, being stored whole."""
    encoding = ENCODINGS[delta.coding]
    return replace(delta, parts=encoding.scaled(delta.parts, factor))
