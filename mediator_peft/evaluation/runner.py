"""Runs systems on tasks: accuracy per task and system, and the routes taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..progress import Progress, no_progress
from ..ranks import Ranks
from .batching import AS_USUAL, AnyModel, PromptSettings
from .generation import ExpertChoice, Memo, PromptedModel, Route, backbone_name
from .prompts import TaskItem
from .scoring import MATCHERS, Interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = "<named>"
"""In place of an expert's name: each task is answered by the expert it names. No expert can have this name."""


@dataclass(frozen=True)
class Scoring:
    """How systems are scored, the same for all of a report."""

    settings: PromptSettings = AS_USUAL
    num_losses: int | None = None
    """On how many items of a task, its first ones, answer losses are measured; None takes all."""

    progress: Progress = no_progress
    """Told of each prompt done."""


@dataclass(frozen=True)
class EvalTask:
    """Prompts with reference answers."""

    name: str
    items: Sequence[TaskItem]
    expert: str | None = None
    """The expert made for this task; None for a task that no expert knows."""

    max_new_tokens: int = 64
    """Answers are cut off here."""

    @classmethod
    def of_items(
        cls,
        name: str,
        items: Sequence[TaskItem],
        experts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int | None = None,
    ) -> EvalTask:
        """A task whose expert is the one of its own name, if there is one.

        Args:
            name: of the task.
            items: see :func:`read_task`.
            experts: names of the experts that exist.
            tokenizer: measures the reference answers.
            max_new_tokens: None gives the room of :func:`answer_room`.
        """
        limit = max_new_tokens or answer_room(tokenizer, [item.answer for item in items])
        return cls(name, items, name if name in set(experts) else None, limit)


def answer_room(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> int:
    """New tokens that leave room for the longest reference answer, its end, and half as much again; 16 at least."""
    longest = max(len(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"])
    return max(16, longest * 3 // 2 + 1)


@dataclass(frozen=True)
class AnsweredItem:
    """One prompt, what was expected, and what came."""

    prompt: str
    reference: str
    output: str
    is_right: bool
    loss: float | None


@dataclass(frozen=True)
class TaskScore:
    """How one system did on one task."""

    num_right: int
    num_items: int
    answer_loss: float | None
    """Mean over items of the mean negative log-likelihood of a reference token, in nats; None where not measured."""

    seconds: float
    items: Sequence[AnsweredItem] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_items if self.num_items else 0.0

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.num_right, self.num_items)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the items."""
        return {
            "accuracy": self.accuracy,
            "low": self.interval.low,
            "high": self.interval.high,
            "num_right": self.num_right,
            "num_items": self.num_items,
            "answer_loss": self.answer_loss,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class SystemScore:
    """How one system did on all tasks."""

    name: str
    tasks: Mapping[str, TaskScore]

    def mean_accuracy(self, names: Iterable[str] | None = None) -> float:
        """Mean over tasks, each counting the same."""
        chosen = [self.tasks[name].accuracy for name in (names or self.tasks)]
        return sum(chosen) / len(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"name": self.name, "tasks": {name: score.to_dict() for name, score in self.tasks.items()}}


@dataclass(frozen=True)
class RoutingScore:
    """Where prompts were sent."""

    columns: list[str]
    """Experts, then the fallback."""

    confusion: dict[str, dict[str, int]]
    """Task → column → number of prompts for which it had the most weight."""

    accuracy: dict[str, float]
    """Task with an expert → share of its prompts for which that expert had the most weight."""

    ood: dict[str, float]
    """Task → share of its prompts of which the fallback gets more weight than the experts (``is_ood``)."""

    mean_uncertainty: dict[str, float]
    """Task → mean uncertainty, larger means less sure."""

    @property
    def overall(self) -> float | None:
        """Routing accuracy over all prompts of tasks with an expert; None without such tasks."""
        totals = {task: sum(self.confusion[task].values()) for task in self.accuracy}
        num_prompts = sum(totals.values())
        if not num_prompts:
            return None
        return sum(self.accuracy[task] * totals[task] for task in self.accuracy) / num_prompts

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"overall_accuracy": self.overall, **asdict(self)}


def score_system(
    name: str,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    *,
    expert_weights: ExpertChoice = None,
    batch_size: int = 16,
    use_template: bool = True,
    num_losses: int | None = None,
    memo: Memo | None = None,
    progress: Progress = no_progress,
    ranks: Ranks | None = None,
) -> SystemScore:
    """Let one system answer all tasks greedily, and judge the answers.

    Args:
        name: what reports call the system.
        model: a Mediator model, or any causal language model.
        tokenizer: of the model.
        tasks: what to answer.
        expert_weights: which expert answers: a name, ``ROUTED``, ``NAMED``, weights, or None for a plain model or the
            backbone alone.
        batch_size: rows at once.
        use_template: whether prompts are rendered with the tokenizer's chat template, where it has one.
        num_losses: on how many items of a task, its first ones, answer losses are measured; None takes all. They tell
            more than accuracies where a model knows the answer but words it otherwise.
        memo: of this very model; systems that share a model and a memo do not compute an answer twice.
        progress: told of each prompt done.
        ranks: processes that share the batches; each must call this with the same arguments. None is this one alone.
    """
    scoring = Scoring(PromptSettings(batch_size, use_template, ranks), num_losses, progress)
    return score_tasks(name, model, tokenizer, tasks, scoring, expert_weights, memo)


def score_tasks(
    name: str,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    scoring: Scoring,
    expert_weights: ExpertChoice = None,
    memo: Memo | None = None,
) -> SystemScore:
    """:func:`score_system`, with what says how in one object."""
    asked = PromptedModel(model, tokenizer, scoring.settings, memo or Memo.empty())
    was_training = model.training
    model.eval()
    scores = {}
    measured = {task.name: list(task.items)[: scoring.num_losses] for task in tasks}
    total = sum(len(task.items) + len(measured[task.name]) for task in tasks)
    with scoring.progress(name, total) as advance:
        for task in tasks:
            named = isinstance(expert_weights, str) and expert_weights == NAMED
            choice = task.expert if named else expert_weights
            prompts = [item.prompt for item in task.items]
            references = [item.answer for item in measured[task.name]]
            started = perf_counter()
            outputs = asked.answers(prompts, choice, task.max_new_tokens, advance)
            seconds = perf_counter() - started
            losses = asked.losses(prompts[: len(references)], references, choice, advance)
            scores[task.name] = _judge(task, outputs, losses, seconds)
    model.train(was_training)
    return SystemScore(name, scores)


def _judge(task: EvalTask, outputs: Sequence[str], losses: Sequence[float], seconds: float) -> TaskScore:
    answered = [
        AnsweredItem(
            item.prompt,
            item.answer,
            output,
            MATCHERS[item.match](output, item.answer),
            losses[index] if index < len(losses) else None,
        )
        for index, (item, output) in enumerate(zip(task.items, outputs, strict=True))
    ]
    return task_score(answered, seconds)


def task_score(answered: Sequence[AnsweredItem], seconds: float) -> TaskScore:
    """The score of judged answers."""
    losses = [item.loss for item in answered if item.loss is not None]
    mean_loss = sum(losses) / len(losses) if losses else None
    return TaskScore(sum(item.is_right for item in answered), len(answered), mean_loss, seconds, answered)


def score_routing(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    *,
    batch_size: int = 16,
    use_template: bool = True,
    progress: Progress = no_progress,
    ranks: Ranks | None = None,
) -> tuple[RoutingScore, dict[str, list[Route]]]:
    """Where the router of a Mediator model sends the prompts of each task: in numbers, and prompt by prompt."""
    scoring = Scoring(PromptSettings(batch_size, use_template, ranks), progress=progress)
    return route_tasks(model, tokenizer, tasks, scoring)


def route_tasks(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[EvalTask], scoring: Scoring
) -> tuple[RoutingScore, dict[str, list[Route]]]:
    """:func:`score_routing`, with what says how in one object."""
    asked, routes = PromptedModel(model, tokenizer, scoring.settings), {}
    with scoring.progress("routing", sum(len(task.items) for task in tasks)) as advance:
        for task in tasks:
            routes[task.name] = asked.routes([item.prompt for item in task.items], advance)
    return summarise_routes(list(model.expert_names), tasks, routes), routes


def summarise_routes(
    column_names: Sequence[str], tasks: Sequence[EvalTask], routes: Mapping[str, Sequence[Route]]
) -> RoutingScore:
    """Routing accuracy and confusion from the routes of each task."""
    counts = {task.name: Counter(route.expert for route in routes[task.name]) for task in tasks}
    rest = backbone_name(column_names)
    columns = [*column_names] + ([rest] if any(rest in count for count in counts.values()) else [])
    means = {task.name: max(1, len(routes[task.name])) for task in tasks}
    return RoutingScore(
        columns=columns,
        confusion={task: {column: count[column] for column in columns} for task, count in counts.items()},
        accuracy={task.name: counts[task.name][task.expert] / means[task.name] for task in tasks if task.expert},
        ood={task.name: sum(route.is_ood for route in routes[task.name]) / means[task.name] for task in tasks},
        mean_uncertainty={
            task.name: sum(route.uncertainty for route in routes[task.name]) / means[task.name] for task in tasks
        },
    )
