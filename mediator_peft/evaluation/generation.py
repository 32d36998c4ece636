"""Answers and answer losses on many prompts, of a Mediator model or any transformers model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RoutingError
from ..progress import Advance
from ..ranks import Ranks
from ..tables import unknown_name
from .batching import AnyModel, Batch, WeightRow, answered, batches_of_like_length, by_weights, repeat
from .prompts import answer_ids, pad_left, pad_token_id, prompt_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUTED = "<routed>"
"""In place of an expert's name: each prompt goes where the model's router sends it. No expert can have this name."""

ExpertChoice = str | Tensor | None
"""An expert's name, ``ROUTED``, weights of shape (K,) or (B, K), or None: the backbone alone."""

_DIGITS = 2


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

    nearest: str
    """The expert with the best score, however little it is trusted."""


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
    ranks: Ranks | None = None,
) -> list[Route]:
    """Ask a Mediator model's router where it would send each prompt, without generating."""
    rows = prompt_rows(model, tokenizer, prompts, use_template)
    return route_token_rows(model, rows, pad_token_id(tokenizer), batch_size=batch_size, advance=advance, ranks=ranks)


def route_token_rows(
    model: AnyModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    batch_size: int = 16,
    advance: Advance = lambda: None,
    ranks: Ranks | None = None,
) -> list[Route]:
    """Where a Mediator model's router sends prompts that are encoded already.

    Args:
        model: a Mediator model.
        rows: token ids of each prompt, one at least.
        pad_id: what shorter rows are padded with.
        batch_size: rows at once.
        advance: called once for every prompt.
        ranks: processes that share the batches.
    """
    lengths = [len(row) for row in rows]
    names: list[str] = list(model.expert_names)
    rest = backbone_name(names)
    routes: dict[int, Route] = {}

    def decide(batch: list[int]) -> list[Route]:
        inputs = _to(model, pad_left([rows[index] for index in batch], pad_id))
        with torch.no_grad():
            decided = model.route(**inputs)
        return [_route(names, rest, decided, place) for place in range(len(batch))]

    batches: list[Batch] = [(None, batch) for batch in batches_of_like_length(range(len(rows)), lengths, batch_size)]
    for batch, found in answered(model, batches, decide, advance, ranks):
        routes.update(zip(batch, found, strict=True))
    return [routes[index] for index in range(len(rows))]


def _route(names: list[str], rest: str, decided: Any, place: int) -> Route:
    """One row of what the model's router decided."""
    weights = dict(zip(names, decided.expert_weights[place].tolist(), strict=True))
    shares = {**weights, rest: 1.0 - sum(weights.values())}
    chosen = max(shares, key=lambda name: shares[name])
    nearest = names[int(decided.scores[place].argmax())]
    uncertainty, is_ood = float(decided.uncertainty[place]), bool(decided.is_ood[place])
    return Route(chosen, shares[chosen], weights, uncertainty, is_ood, nearest)


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
    ranks: Ranks | None = None,
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
        ranks: processes that share the batches; each must ask the same, and gets all answers. None is this one alone.
    """
    memo = Memo.empty() if memo is None else memo
    rows = _resolve(model, tokenizer, prompts, expert_weights, batch_size, use_template, ranks)
    encoded = prompt_rows(model, tokenizer, prompts, use_template, max_new_tokens)
    keys = [(prompt, row, max_new_tokens) for prompt, row in zip(prompts, rows, strict=True)]
    groups = _unasked(rows, [key in memo.answers for key in keys], keys)
    repeat(advance, len(prompts) - sum(map(len, groups.values())))
    lengths = [len(ids) for ids in encoded]

    def generate(batch: list[int]) -> list[str]:
        inputs = _to(model, pad_left([encoded[index] for index in batch], pad_token_id(tokenizer)))
        return _generate(model, tokenizer, inputs, max_new_tokens)

    for batch, texts in answered(model, by_weights(groups, lengths, batch_size), generate, advance, ranks):
        memo.answers.update((keys[index], text) for index, text in zip(batch, texts, strict=True))
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
    ranks: Ranks | None = None,
) -> list[float]:
    """Mean negative log-likelihood of each reference answer's tokens, end of text included, in nats a token.

    Prompts are routed by themselves, the answer unseen. Grouped and remembered as in :func:`answer_prompts`.
    """
    memo = Memo.empty() if memo is None else memo
    rows = _resolve(model, tokenizer, prompts, expert_weights, batch_size, use_template, ranks)
    targets = [answer_ids(tokenizer, answer) for answer in answers]
    encoded = prompt_rows(model, tokenizer, prompts, use_template, list(map(len, targets)))
    keys = list(zip(prompts, answers, rows, strict=True))
    groups = _unasked(rows, [key in memo.losses for key in keys], keys)
    repeat(advance, len(prompts) - sum(map(len, groups.values())))
    lengths = [len(ids) + len(target) for ids, target in zip(encoded, targets, strict=True)]

    def measure(batch: list[int]) -> list[float]:
        return _losses(model, [encoded[i] for i in batch], [targets[i] for i in batch])

    for batch, losses in answered(model, by_weights(groups, lengths, batch_size), measure, advance, ranks):
        memo.losses.update((keys[index], loss) for index, loss in zip(batch, losses, strict=True))
    return [memo.losses[key] for key in keys]


def _resolve(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choice: ExpertChoice,
    batch_size: int,
    use_template: bool,
    ranks: Ranks | None,
) -> list[WeightRow | None]:
    routes: list[Route] = []
    if isinstance(choice, str) and choice == ROUTED and is_routed(model):
        shared: dict[str, Any] = {"batch_size": batch_size, "use_template": use_template, "ranks": ranks}
        routes = route_prompts(model, tokenizer, prompts, **shared)
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


def _to(model: AnyModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


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
