"""What a search makes small: losses of a merged model on prompts of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ..prompts import TaskItem, answer_ids, prompt_rows
from .merged_model import MergedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """One sequence of an expert's task."""

    expert: str
    ids: tuple[int, ...]
    start: int
    """First position whose prediction counts."""

    teacher: Tensor | None = None
    """Logits of the expert itself from ``start`` on, (T, V); None where the answer is the target."""

    hidden: tuple[Tensor, ...] = ()
    """Hidden states of the expert after chosen blocks, (T0, hidden) each."""


def labelled(
    merged: MergedModel, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Sequence[TaskItem]]
) -> list[Example]:
    """Prompts with answers: the loss is the mean negative log-likelihood of an answer's tokens, its end included.

    Raises:
        PromptLengthError: a prompt is longer than the model reads at once.
    """
    found = []
    for expert, items in tasks.items():
        answers = [answer_ids(tokenizer, item.answer) for item in items]
        texts = [item.prompt for item in items]
        prompts = prompt_rows(merged.model, tokenizer, texts, num_new=list(map(len, answers)))
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt and answer:
                found.append(Example(expert, (*prompt, *answer), len(prompt) - 1))
    return found


def imitated(
    merged: MergedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[str]],
    hidden_blocks: Sequence[int] = (),
) -> list[Example]:
    """Prompts alone: the loss is the cross-entropy to the logits of the prompt's own expert.

    Args:
        merged: lends its model to each expert.
        tokenizer: of the base.
        tasks: expert → prompts.
        hidden_blocks: whose outputs are kept as well.

    Raises:
        PromptLengthError: a prompt is longer than the model reads at once.
    """
    found = []
    for expert, prompts in tasks.items():
        merged.set_expert(expert)
        for ids in map(tuple, prompt_rows(merged.model, tokenizer, prompts)):
            if not ids:
                continue
            with torch.no_grad():
                output = merged.model(torch.tensor([ids]), use_cache=False, output_hidden_states=bool(hidden_blocks))
            hidden = tuple(output.hidden_states[block + 1][0] for block in hidden_blocks)
            found.append(Example(expert, ids, 0, output.logits[0], hidden))
    return found


def loss_of(
    merged: MergedModel,
    example: Example,
    hidden_blocks: Sequence[int] = (),
    hidden_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Loss of the model as it is on one example, a number with gradients.

    With a teacher: :math:`T^2 \operatorname{CE}(p_{teacher}^{1/T}, p^{1/T})`, mean over positions, plus
    ``hidden_weight`` times the mean squared difference of the hidden states.
    """
    output = merged.model(torch.tensor([example.ids]), use_cache=False, output_hidden_states=bool(hidden_blocks))
    logits = output.logits[0, example.start :]
    if example.teacher is None:
        return F.cross_entropy(logits[:-1], torch.tensor(example.ids[example.start + 1 :]))
    target = (example.teacher / temperature).softmax(dim=-1)
    loss = F.cross_entropy(logits / temperature, target) * temperature**2
    for block, wanted in zip(hidden_blocks, example.hidden, strict=True):
        loss = loss + hidden_weight * F.mse_loss(output.hidden_states[block + 1][0], wanted)
    return loss


def task_losses(merged: MergedModel, examples: Sequence[Example]) -> dict[str, float]:
    """Expert → mean loss on its examples."""
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for example in examples:
            sums.setdefault(example.expert, []).append(float(loss_of(merged, example)))
    return {expert: sum(losses) / len(losses) for expert, losses in sums.items()}


def check_tasks(experts: Sequence[str], tasks: Mapping[str, Sequence[object]]) -> None:
    """Refuse data that lack an expert or belong to none.

    Raises:
        ConfigError: with all faults.
    """
    faults = [f"expert {name!r} has no data: give --data {name}=FILE" for name in experts if not tasks.get(name)]
    faults += [f"data {name!r} belong to no expert" for name in tasks if name not in experts]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
