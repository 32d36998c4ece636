"""Answers and answer losses on many prompts, of a Mediator model or any transformers model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RoutingError
from ..progress import Advance
from ..ranks import Ranks
from ..tables import unknown_name
from .answer_batches import AnswerBatch, answer_logits
from .batching import (
    AS_USUAL,
    AnyModel,
    Batch,
    PromptSettings,
    WeightRow,
    answered,
    batches_of_like_length,
    by_weights,
    repeat,
)
from .prompts import answer_ids, pad_left, pad_token_id, prompt_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUTED = "<routed>"
"""In place of an expert's name: each prompt goes where the model's router sends it. No expert can have this name."""

ExpertChoice = str | Tensor | None
"""An expert's name, ``ROUTED``, weights of shape (K,) or (B, K), or None: the backbone alone."""

Question = TypeVar("Question", bound=Hashable)
Result = TypeVar("Result")

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
    """Whether the fallback gets more weight than the experts."""

    nearest: str
    """The expert with the best score, however little it is trusted."""


class Compared(NamedTuple):
    """A greedy answer as far as it agrees with a reference answer."""

    loss: float
    """Mean negative log-likelihood of the reference's tokens, end of text included, in nats."""

    text: str
    """The greedy answer up to its first token that differs from the reference's, that token included."""

    is_open: bool
    """Whether the greedy answer goes on in a way that may still spell the reference, in other tokens."""


class Memo(NamedTuple):
    """What one model was asked before, so that no answer is computed twice. One memo belongs to one model."""

    answers: dict[tuple[str, WeightRow | None, int], str]
    losses: dict[tuple[str, str, WeightRow | None], float]
    compared: dict[tuple[str, str, WeightRow | None], Compared]

    @classmethod
    def empty(cls) -> Memo:
        """Nothing asked so far."""
        return cls({}, {}, {})


@dataclass(frozen=True)
class PromptedModel:
    """A model with its tokenizer, how prompts are put to it, and what it was asked before."""

    model: AnyModel
    """A Mediator model, or any causal language model."""

    tokenizer: PreTrainedTokenizerBase
    """The model's; it is left as it is."""

    settings: PromptSettings = AS_USUAL
    memo: Memo = field(default_factory=Memo.empty)

    def routes(self, prompts: Sequence[str], advance: Advance = lambda: None) -> list[Route]:
        """Where the router of a Mediator model sends each prompt; see :func:`route_prompts`."""
        return route_token_rows(
            self.model, self._encoded(prompts), pad_token_id(self.tokenizer), self.settings, advance=advance
        )

    def answers(
        self,
        prompts: Sequence[str],
        expert_weights: ExpertChoice = None,
        max_new_tokens: int = 64,
        advance: Advance = lambda: None,
    ) -> list[str]:
        """Greedy answers; see :func:`answer_prompts`."""
        rows, encoded = self._weight_rows(prompts, expert_weights), self._encoded(prompts, max_new_tokens)
        keys = [(prompt, row, max_new_tokens) for prompt, row in zip(prompts, rows, strict=True)]

        def generate(batch: list[int]) -> list[str]:
            inputs = _to(self.model, pad_left([encoded[index] for index in batch], pad_token_id(self.tokenizer)))
            return _generate(self.model, self.tokenizer, inputs, max_new_tokens)

        return self._remembered(self.memo.answers, keys, rows, [len(ids) for ids in encoded], generate, advance)

    def losses(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        expert_weights: ExpertChoice = None,
        advance: Advance = lambda: None,
        *,
        is_ended: bool = True,
    ) -> list[float]:
        """Mean negative log-likelihood of each answer's tokens; see :func:`answer_losses`.

        Args:
            prompts: texts.
            answers: reference answers.
            expert_weights: which experts answer.
            advance: called once for every prompt done.
            is_ended: False leaves the end of text out, for answers that were cut off; these are not remembered.
        """
        num_left_out = 0 if is_ended or self.tokenizer.eos_token_id is None else 1

        def measure(rows: list[tuple[list[int], list[int]]]) -> list[float]:
            found = _answer_logits(self.model, rows)
            return [_loss(*(part[: len(part) - num_left_out] for part in each)) for each in found]

        known = self.memo.losses if is_ended else {}
        return self._of_answers(known, prompts, answers, expert_weights, measure, advance)

    def compared(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        expert_weights: ExpertChoice = None,
        advance: Advance = lambda: None,
    ) -> list[Compared]:
        """How far each greedy answer agrees with the reference answer; one pass over the texts, no generation.

        The model reads prompt and reference; as long as its most probable token is the reference's, that is what it
        would have generated: the acceptance test of speculative decoding (arXiv 2211.17192) for greedy decoding. Where
        :func:`is_plainly_greedy` holds, answers are those of :meth:`answers`, but for rounding where two tokens are
        equally probable.
        """
        stops = _stop_ids(self.model, self.tokenizer) or []

        def measure(rows: list[tuple[list[int], list[int]]]) -> list[Compared]:
            return [self._compare(logits, answer, stops) for logits, answer in _answer_logits(self.model, rows)]

        return self._of_answers(self.memo.compared, prompts, answers, expert_weights, measure, advance)

    def _compare(self, logits: Tensor, answer: Tensor, stops: Sequence[int]) -> Compared:
        """One row of :meth:`compared`: logits (n, V), ids of the answer (n,)."""
        greedy, wanted = logits.argmax(dim=-1).tolist(), answer.tolist()
        agreed = next((place for place, token in enumerate(wanted) if greedy[place] != token), len(wanted))
        ids = greedy[: agreed + 1]
        is_ended = bool(ids) and ids[-1] in stops
        text, reference = self._decoded(ids[:-1] if is_ended else ids), self._decoded(wanted)
        # The last token may hold some of the bytes of a character alone.
        is_open = not is_ended and reference.strip().startswith(text.strip().rstrip("\ufffd"))
        return Compared(_loss(logits, answer), text, is_open)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _of_answers(
        self,
        known: dict[tuple[str, str, WeightRow | None], Result],
        prompts: Sequence[str],
        answers: Sequence[str],
        expert_weights: ExpertChoice,
        measure: Callable[[list[tuple[list[int], list[int]]]], list[Result]],
        advance: Advance,
    ) -> list[Result]:
        """What ``measure`` makes of (token ids of the prompt, of the answer), each pair once."""
        targets = [answer_ids(self.tokenizer, answer) for answer in answers]
        rows, encoded = self._weight_rows(prompts, expert_weights), self._encoded(prompts, list(map(len, targets)))
        lengths = [len(ids) + len(target) for ids, target in zip(encoded, targets, strict=True)]
        keys = list(zip(prompts, answers, rows, strict=True))

        def work(batch: list[int]) -> list[Result]:
            return measure([(encoded[index], targets[index]) for index in batch])

        return self._remembered(known, keys, rows, lengths, work, advance)

    def _encoded(self, prompts: Sequence[str], num_new: int | Sequence[int] = 0) -> list[list[int]]:
        return prompt_rows(self.model, self.tokenizer, prompts, self.settings.use_template, num_new)

    def _weight_rows(self, prompts: Sequence[str], choice: ExpertChoice) -> list[WeightRow | None]:
        is_by_router = isinstance(choice, str) and choice == ROUTED and is_routed(self.model)
        return weight_rows(self.model, choice, len(prompts), self.routes(prompts) if is_by_router else [])

    def _remembered(
        self,
        known: dict[Question, Result],
        keys: Sequence[Question],
        rows: Sequence[WeightRow | None],
        lengths: Sequence[int],
        work: Callable[[list[int]], list[Result]],
        advance: Advance,
    ) -> list[Result]:
        """What is known of each key; what is not is computed once and remembered, in batches of equal expert weights.

        Args:
            known: results by key, added to.
            keys: of each prompt.
            rows: expert weights of each prompt.
            lengths: of each prompt, in tokens.
            work: indices of prompts → their results.
            advance: called once for every prompt done.
        """
        groups = _unasked(rows, [key in known for key in keys], keys)
        repeat(advance, len(keys) - sum(map(len, groups.values())))
        batches = by_weights(groups, lengths, self.settings.batch_size)
        for batch, results in answered(self.model, batches, work, advance, self.settings.ranks):
            known.update((keys[index], result) for index, result in zip(batch, results, strict=True))
        return [known[key] for key in keys]


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
    return PromptedModel(model, tokenizer, PromptSettings(batch_size, use_template, ranks)).routes(prompts, advance)


def route_token_rows(
    model: AnyModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    settings: PromptSettings = AS_USUAL,
    advance: Advance = lambda: None,
) -> list[Route]:
    """Where a Mediator model's router sends prompts that are encoded already.

    Args:
        model: a Mediator model.
        rows: token ids of each prompt, one at least.
        pad_id: what shorter rows are padded with.
        settings: how they are put to the model.
        advance: called once for every prompt.
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

    some = batches_of_like_length(range(len(rows)), lengths, settings.batch_size)
    batches: list[Batch] = [(None, batch) for batch in some]
    for batch, found in answered(model, batches, decide, advance, settings.ranks):
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
    asked = PromptedModel(model, tokenizer, PromptSettings(batch_size, use_template, ranks), memo or Memo.empty())
    return asked.answers(prompts, expert_weights, max_new_tokens, advance)


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
    asked = PromptedModel(model, tokenizer, PromptSettings(batch_size, use_template, ranks), memo or Memo.empty())
    return asked.losses(prompts, answers, expert_weights, advance)


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


_FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale")
_CONSTRAINTS = (
    *("no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("exponential_decay_length_penalty", "watermarking_config"),
)


def is_plainly_greedy(model: AnyModel) -> bool:
    """Whether greedy decoding takes the most probable token each time, by the generation settings of the checkpoint."""
    settings = getattr(model, "generation_config", None)
    factors = [getattr(settings, name, None) for name in _FACTORS]
    return all(factor in (None, 1) for factor in factors) and not any(getattr(settings, c, None) for c in _CONSTRAINTS)


def _answer_logits(model: AnyModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """(n, V) logits before each token of an answer, and the tokens (n,), of each (ids of the prompt, of the answer)."""
    batch = AnswerBatch.of(rows)
    with torch.no_grad():
        logits = answer_logits(model, batch)
    return [(predicted, answer.to(predicted.device)) for predicted, answer in zip(logits, batch.answers, strict=True)]


def _loss(logits: Tensor, answer: Tensor) -> float:
    return F.cross_entropy(logits, answer).item()
