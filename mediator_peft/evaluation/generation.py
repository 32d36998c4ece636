"""Answers and answer losses of a model on many prompts: routed ones, or any model of transformers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.kernels import has_compiled
from ..errors import RoutingError
from ..progress import Advance
from ..tables import unknown_name
from .prompts import pad_left, pad_token_id, render, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyModel = Any
"""A Mediator model, wrapped by PEFT or not, or any causal language model of transformers."""

ROUTED = "<routed>"
"""In place of an expert's name: each prompt goes where the model's router sends it. No expert can have this name."""

ExpertChoice = str | Tensor | None
"""An expert's name, ``ROUTED``, weights of shape (K,) or (B, K), or None: the backbone alone."""

WeightRow = tuple[float, ...]

_DIGITS = 2
_FEW = 4
"""Groups of fewer rows are answered together, each row with weights of its own, where there are kernels for that."""


class Route(NamedTuple):
    """Where one prompt was sent."""

    expert: str
    """The column with the most weight; ``"backbone"`` where the rest up to 1 is larger than each."""

    weight: float
    """Its weight, in [0, 1]."""

    expert_weights: dict[str, float]
    """All columns."""

    uncertainty: float
    """The gate's, larger means less sure."""

    is_ood: bool
    """Whether the gate takes the prompt for an unknown one."""


class Memo(NamedTuple):
    """What one model was asked before, so that no answer is computed twice. One memo belongs to one model."""

    answers: dict[tuple[str, WeightRow | None, int], str]
    losses: dict[tuple[str, str, WeightRow | None], float]

    @classmethod
    def empty(cls) -> Memo:
        """Nothing asked so far."""
        return cls({}, {})


def is_routed(model: AnyModel) -> bool:
    """Whether a model takes expert weights."""
    return hasattr(model, "expert_names") and hasattr(model, "route")


def backbone_name(column_names: Sequence[str]) -> str:
    """What the share of the backbone alone is called; never the name of a column."""
    name = "backbone"
    while name in column_names:
        name = f"({name})"
    return name


def route_prompts(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    use_template: bool = True,
    advance: Advance = lambda: None,
) -> list[Route]:
    """Ask a Mediator model's router where it would send each prompt, without generating."""
    rows = [token_ids(tokenizer, render(tokenizer, prompt, use_template)) for prompt in prompts]
    names: list[str] = list(model.expert_names)
    rest = backbone_name(names)
    routes: dict[int, Route] = {}
    for indices in _batches(range(len(rows)), [len(row) for row in rows], batch_size):
        inputs = _to(model, pad_left([rows[index] for index in indices], pad_token_id(tokenizer)))
        with torch.no_grad():
            decided = model.route(**inputs)
        for place, index in enumerate(indices):
            weights = dict(zip(names, decided.expert_weights[place].tolist(), strict=True))
            shares = {**weights, rest: 1.0 - sum(weights.values())}
            chosen = max(shares, key=lambda name: shares[name])
            routes[index] = Route(
                chosen, shares[chosen], weights, float(decided.uncertainty[place]), bool(decided.is_ood[place])
            )
        _repeat(advance, len(indices))
    return [routes[index] for index in range(len(prompts))]


def weight_rows(
    model: AnyModel, choice: ExpertChoice, num_prompts: int, routes: Sequence[Route] = ()
) -> list[WeightRow | None]:
    """The expert weights of each prompt; None for a model that takes none.

    Args:
        model: a Mediator model or a plain one.
        choice: which expert answers.
        num_prompts: B
        routes: (B) where the prompts were sent, for ``ROUTED``.

    Raises:
        RoutingError: the expert is unknown, or the model takes no expert weights.
    """
    if not is_routed(model):
        if choice is not None:
            raise RoutingError(f"{type(model).__name__} takes no expert weights; pass a Mediator model.")
        return [None] * num_prompts
    names: list[str] = list(model.expert_names)
    if isinstance(choice, str) and choice == ROUTED:
        return [tuple(round(route.expert_weights[name], _DIGITS) for name in names) for route in routes]
    if isinstance(choice, Tensor):
        rows = choice.tolist() if choice.ndim == 2 else [choice.tolist()] * num_prompts
        if len(rows) != num_prompts or any(len(row) != len(names) for row in rows):
            raise RoutingError(
                f"expert weights have shape {tuple(choice.shape)}; ({len(names)},) or ({num_prompts}, {len(names)}) "
                "was expected."
            )
        return [tuple(row) for row in rows]
    if choice is not None and choice not in names:
        raise RoutingError(unknown_name(choice, names, "expert"))
    return [tuple(float(name == choice) for name in names)] * num_prompts


def answer_prompts(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    expert_weights: ExpertChoice = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    use_template: bool = True,
    memo: Memo | None = None,
    advance: Advance = lambda: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts.

    Prompts are routed first, then grouped by equal expert weights, rounded to hundredths, and generated group by group.
    The answers are those of one routed ``generate``, since a route is decided by the prompt alone; but rows of one kind
    run faster together than mixed. Greedy decoding is deterministic, so with a ``memo`` a prompt whose weights were
    asked before is not generated again: "expert named" and "routed" mostly ask the same.

    Args:
        model: a Mediator model, or any causal language model.
        tokenizer: of the model; it is left as it is.
        prompts: what a user would write.
        expert_weights: which expert answers; None for a plain model or the backbone alone.
        max_new_tokens: an answer is cut off here.
        batch_size: rows generated at once.
        use_template: whether prompts are rendered with the tokenizer's chat template, where it has one.
        memo: of this very model.
        advance: called once for every prompt done.
    """
    memo = Memo.empty() if memo is None else memo
    rows = _resolve(model, tokenizer, prompts, expert_weights, batch_size, use_template)
    encoded = [token_ids(tokenizer, render(tokenizer, prompt, use_template)) for prompt in prompts]
    keys = [(prompt, row, max_new_tokens) for prompt, row in zip(prompts, rows, strict=True)]
    groups = _unasked(rows, [key in memo.answers for key in keys], keys)
    _repeat(advance, len(prompts) - sum(map(len, groups.values())))
    lengths = [len(ids) for ids in encoded]
    for weights, batches in _by_weights(groups, lengths, batch_size):
        with _using(model, weights):
            for batch in batches:
                inputs = _to(model, pad_left([encoded[index] for index in batch], pad_token_id(tokenizer)))
                texts = _generate(model, tokenizer, inputs, max_new_tokens)
                memo.answers.update((keys[index], text) for index, text in zip(batch, texts, strict=True))
                _repeat(advance, len(batch))
    return [memo.answers[key] for key in keys]


def answer_losses(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    expert_weights: ExpertChoice = None,
    batch_size: int = 16,
    use_template: bool = True,
    memo: Memo | None = None,
    advance: Advance = lambda: None,
) -> list[float]:
    """Mean negative log-likelihood of each reference answer's tokens, end of text included, in nats a token.

    Prompts are routed by themselves, the answer unseen. Grouped and remembered as in :func:`answer_prompts`.
    """
    memo = Memo.empty() if memo is None else memo
    rows = _resolve(model, tokenizer, prompts, expert_weights, batch_size, use_template)
    encoded = [token_ids(tokenizer, render(tokenizer, prompt, use_template)) for prompt in prompts]
    targets = [_answer_ids(tokenizer, answer) for answer in answers]
    keys = list(zip(prompts, answers, rows, strict=True))
    groups = _unasked(rows, [key in memo.losses for key in keys], keys)
    _repeat(advance, len(prompts) - sum(map(len, groups.values())))
    lengths = [len(ids) + len(target) for ids, target in zip(encoded, targets, strict=True)]
    for weights, batches in _by_weights(groups, lengths, batch_size):
        with _using(model, weights):
            for batch in batches:
                losses = _losses(model, [encoded[i] for i in batch], [targets[i] for i in batch])
                memo.losses.update((keys[index], loss) for index, loss in zip(batch, losses, strict=True))
                _repeat(advance, len(batch))
    return [memo.losses[key] for key in keys]


def _resolve(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choice: ExpertChoice,
    batch_size: int,
    use_template: bool,
) -> list[WeightRow | None]:
    routes: list[Route] = []
    if isinstance(choice, str) and choice == ROUTED and is_routed(model):
        routes = route_prompts(model, tokenizer, prompts, batch_size=batch_size, use_template=use_template)
    return weight_rows(model, choice, len(prompts), routes)


def _unasked(
    rows: Sequence[WeightRow | None], is_known: Sequence[bool], keys: Sequence[Hashable]
) -> dict[WeightRow | None, list[int]]:
    """Indices of the prompts that are still to be computed, each question once, by equal expert weights."""
    groups: dict[WeightRow | None, list[int]] = {}
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    for index in sorted(first.values()):
        if not is_known[index]:
            groups.setdefault(rows[index], []).append(index)
    return groups


def _batches(indices: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: what does not fit into memory fails at once."""
    ordered = sorted(indices, key=lambda index: -lengths[index])
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _repeat(advance: Advance, times: int) -> None:
    for _ in range(times):
        advance()


def _to(model: AnyModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _by_weights(
    groups: Mapping[WeightRow | None, list[int]], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[Tensor | None, list[list[int]]]]:
    """Batches with the expert weights to set for them: (K,) for a group of one kind, (B, K) for a mixed batch."""
    few = {row: indices for row, indices in groups.items() if row is not None and len(indices) < _FEW}
    if len(few) < 2 or not has_compiled():
        few = {}
    for row, indices in groups.items():
        if row not in few:
            batches = list(_batches(indices, lengths, batch_size))
            yield None if row is None else torch.tensor(row), batches
    row_of = {index: row for row, indices in few.items() for index in indices}
    for batch in _batches(list(row_of), lengths, batch_size):
        yield torch.tensor([row_of[index] for index in batch]), [batch]


def _using(model: AnyModel, weights: Tensor | None) -> AbstractContextManager[Any]:
    """All that is asked inside is answered with these expert weights; set once for all batches of a group."""
    return nullcontext() if weights is None else model.use_experts(weights)


def _generate(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Tensor], max_new_tokens: int
) -> list[str]:
    with torch.no_grad():
        generated = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=_stop_ids(model, tokenizer),
            pad_token_id=pad_token_id(tokenizer),
            do_sample=False,
            num_beams=1,
            # A checkpoint's own sampling settings mean nothing here, and transformers would warn of them.
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _stop_ids(model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ends of text of model and tokenizer; converted checkpoints sometimes lack the model's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = set(own) if isinstance(own, (list, tuple)) else {own}
    return sorted(int(token) for token in ids | {tokenizer.eos_token_id} if token is not None) or None


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _losses(model: AnyModel, prompts: list[list[int]], targets: list[list[int]]) -> list[float]:
    width = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    # Padded on the right, so that positions count from 0 in every architecture without being told.
    ids = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for p, t in zip(prompts, targets, strict=True)])
    mask = torch.tensor(
        [[1] * (len(p) + len(t)) + [0] * (width - len(p) - len(t)) for p, t in zip(prompts, targets, strict=True)]
    )
    inputs = _to(model, {"input_ids": ids, "attention_mask": mask})
    # The head over the whole vocabulary is dear: only positions from the shortest prompt's end on are needed.
    num_skipped = min(map(len, prompts)) - 1
    with torch.no_grad():
        logits = model(**inputs, use_cache=False, logits_to_keep=width - num_skipped).logits
    losses = []
    for place, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        start = logits.shape[1] - width + len(prompt) - 1
        predicted = logits[place, start : start + len(target)].float()
        losses.append(F.cross_entropy(predicted, torch.tensor(target, device=predicted.device)).item())
    return losses
