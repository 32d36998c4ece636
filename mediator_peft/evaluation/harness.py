"""lm-evaluation-harness on Mediator models: the model class, and one run over several systems of an output.

``python -m mediator_peft.evaluation.harness`` is the harness's own command line with ``--model mediator`` added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.adapter_files import CONFIG_FILE
from ..context_length import context_length
from ..errors import MediatorError, MissingPackageError
from ..tables import unknown_name
from .batching import AnyModel, PromptSettings, WeightRow, answered, by_weights
from .generation import ROUTED, ExpertChoice, is_routed, route_token_rows, weight_rows
from .prompts import pad_left, pad_right, pad_token_id

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as fault:
    raise MissingPackageError(
        f"harness tasks need lm-evaluation-harness ({fault}): pip install 'mediator_peft[lm-eval]'"
    ) from fault

BACKBONE = "backbone"
"""In place of an expert's name: the merged backbone alone."""

_ROUTED_NAME = "routed"
_MAX_LENGTH = 2048


class HarnessError(MediatorError, ValueError):
    """A harness task cannot be run on a model."""


@register_model("mediator")
class MediatorLM(TemplateLM):
    """A Mediator model, or any causal language model of transformers, for lm-evaluation-harness.

    A route is decided by the context alone, before any continuation is seen, so that all candidates of a question are
    scored under the same expert weights. A rolling log-likelihood has no context: its route is taken from the text,
    from as much as the model reads at once, and holds for all windows of it.
    """

    def __init__(
        self,
        pretrained: str | AnyModel,
        expert: str | None = None,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
    ) -> None:
        """Load what is to be measured.

        Args:
            pretrained: output of ``mediator-peft build``, a folder or hub id of a plain checkpoint, or a model.
            expert: which expert answers; ``"backbone"`` for none, None or ``"routed"`` for the router's choice.
            tokenizer: of ``pretrained`` where that is a model.
            dtype: of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto``, float32 on a CPU.
            device: None takes a GPU if there is one.
            batch_size: rows at once.
            max_length: tokens that the model reads at once; None takes the model's own limit.
            max_gen_toks: longest answer where a task does not say.
            max_batch_size: not used; the harness passes it.

        Raises:
            HarnessError: an option cannot be used.
            RoutingError: the expert is unknown.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise HarnessError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}.")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(pretrained, (str, Path)):
            pretrained, tokenizer = _load(str(pretrained), dtype, self._device)
        elif tokenizer is None:
            raise HarnessError("a model that is loaded already needs its tokenizer: tokenizer=.")
        self.model: AnyModel = pretrained.eval()
        self.tokenizer = tokenizer
        self.batch_size = int(batch_size)
        self.max_length = max_length or context_length(self.model.config) or _MAX_LENGTH
        self.max_gen_toks = int(max_gen_toks)
        self._choice = _expert_choice(self.model, expert)
        # An unknown name fails here, not after hours.
        if self._choice != ROUTED:
            weight_rows(self.model, self._choice, 1)

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the begin of text, else the end of text."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it; without a generation prompt the last message is left open."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are added as the tokenizer does, unless the text begins with one."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [self._fitted(context, continuation) for _, context, continuation in requests]
        weights = self._weights([context for context, _ in cut])
        scored = self._scored(cut, weights)
        for (texts, _, _), score in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scored

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Context and continuation that fit into the model, the context's beginning cut off."""
        if not continuation:
            raise HarnessError("a continuation has no tokens: there is nothing to score.")
        room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
        if room < 1:
            raise HarnessError(
                f"a continuation has {len(continuation)} tokens, the model reads {self.max_length} at once. Raise "
                "max_length if the model can read more."
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats."""
        texts = [request.args[0] for request in requests]
        rows = [self.tok_encode(text) for text in texts]
        weights = self._weights([row[: self.max_length] or [self.prefix_token_id] for row in rows])
        pairs, owners = [], []
        for owner, row in enumerate(rows):
            windows = get_rolling_token_windows(row, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(owner)
        totals = [0.0] * len(rows)
        for owner, (score, _) in zip(owners, self._scored(pairs, [weights[owner] for owner in owners]), strict=True):
            totals[owner] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop text, as each task's ``generation_kwargs`` say."""
        settings = [normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks) for request in requests]
        rows = []
        for request, setting in zip(requests, settings, strict=True):
            room = self.max_length - setting["max_gen_toks"]
            if room < 1:
                raise HarnessError(
                    f"max_gen_toks is {setting['max_gen_toks']}, the model reads {self.max_length} tokens at once: "
                    "nothing is left for the prompt."
                )
            rows.append(self.tok_encode(request.args[0])[-room:])
        weights = self._weights(rows)
        kinds: dict[str, list[int]] = {}
        for place, setting in enumerate(settings):
            kinds.setdefault(repr(sorted(setting.items())), []).append(place)
        answers = [""] * len(rows)
        for places in kinds.values():
            some = self._answers([rows[i] for i in places], [weights[i] for i in places], settings[places[0]])
            for place, answer in zip(places, some, strict=True):
                answers[place] = answer
                self.cache_hook.add_partial("generate_until", requests[place].args, answer)
        return answers

    def _weights(self, contexts: Sequence[Sequence[int]]) -> list[WeightRow | None]:
        """Expert weights of each context; each different one is routed once."""
        if self._choice != ROUTED:
            return weight_rows(self.model, self._choice, len(contexts))
        unique = list(dict.fromkeys(map(tuple, contexts)))
        routes = route_token_rows(self.model, unique, pad_token_id(self.tokenizer), PromptSettings(self.batch_size))
        rows = weight_rows(self.model, ROUTED, len(unique), routes)
        found = dict(zip(unique, rows, strict=True))
        return [found[tuple(context)] for context in contexts]

    def _scored(
        self, pairs: Sequence[tuple[list[int], list[int]]], weights: Sequence[WeightRow | None]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        lengths = [len(context) + len(continuation) for context, continuation in pairs]

        def score(batch: list[int]) -> list[tuple[float, bool]]:
            return _score(self.model, [pairs[index] for index in batch], self._device)

        found: dict[int, tuple[float, bool]] = {}
        batches = by_weights(_groups(weights), lengths, self.batch_size)
        for batch, results in answered(self.model, batches, score, lambda: None, None):
            found.update(zip(batch, results, strict=True))
        return [found[index] for index in range(len(pairs))]

    def _answers(
        self, rows: Sequence[list[int]], weights: Sequence[WeightRow | None], settings: Mapping[str, Any]
    ) -> list[str]:
        options = {name: value for name, value in settings.items() if name not in ("until", "max_gen_toks")}
        until = _texts(settings.get("until"))

        def generate(batch: list[int]) -> list[str]:
            inputs = pad_left([rows[index] for index in batch], pad_token_id(self.tokenizer))
            inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
            width = inputs["input_ids"].shape[1]
            with torch.no_grad():
                made = self.model.generate(
                    **inputs,
                    max_new_tokens=settings["max_gen_toks"],
                    pad_token_id=pad_token_id(self.tokenizer),
                    eos_token_id=self.eot_token_id,
                    stopping_criteria=[_AllStopped(self.tokenizer, until, width)],
                    **(options if options.get("do_sample") else {"do_sample": False, "num_beams": 1, **_UNSAMPLED}),
                )
            texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            return [_cut(text, until) for text in texts]

        found: dict[int, str] = {}
        batches = by_weights(_groups(weights), [len(row) for row in rows], self.batch_size)
        for batch, texts in answered(self.model, batches, generate, lambda: None, None):
            found.update(zip(batch, texts, strict=True))
        return [found[index] for index in range(len(rows))]


# A checkpoint's own sampling settings mean nothing to greedy decoding, and transformers would warn of them.
_UNSAMPLED = {"temperature": None, "top_p": None, "top_k": None}


class _AllStopped:
    """Ends generation once every row holds a stop text; a criterion of transformers' ``generate``."""

    def __init__(self, tokenizer: Any, until: Sequence[str], num_prompt: int) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._num_prompt = num_prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._num_prompt :], skip_special_tokens=True)
        stopped = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


def _texts(until: Any) -> list[str]:
    """Stop texts of a task: none, one or a list; empty ones stop nothing."""
    some = [until] if isinstance(until, str) else list(until or ())
    return [text for text in some if text]


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _groups(weights: Sequence[WeightRow | None]) -> dict[WeightRow | None, list[int]]:
    groups: dict[WeightRow | None, list[int]] = {}
    for place, row in enumerate(weights):
        groups.setdefault(row, []).append(place)
    return groups


def _score(model: AnyModel, pairs: Sequence[tuple[list[int], list[int]]], device: Any) -> list[tuple[float, bool]]:
    inputs = pad_right([(context + continuation)[:-1] for context, continuation in pairs])
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    found = []
    for place, (context, continuation) in enumerate(pairs):
        start = len(context) - 1
        predicted = logits[place, start : start + len(continuation)].float()
        target = torch.tensor(continuation, device=predicted.device)
        loss = F.cross_entropy(predicted, target, reduction="sum").item()
        found.append((-loss, bool((predicted.argmax(dim=-1) == target).all())))
    return found


def _expert_choice(model: AnyModel, expert: str | None) -> ExpertChoice:
    if not is_routed(model):
        if expert is not None:
            raise HarnessError(f"a plain model has no expert {expert!r}: give the output of `mediator-peft build`.")
        return None
    names = list(model.expert_names)
    if expert is None or (expert == _ROUTED_NAME and expert not in names):
        return ROUTED
    return None if expert == BACKBONE and expert not in names else expert


def _load(path: str, dtype: str, device: torch.device) -> tuple[AnyModel, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..tuner.loading import load_mediator

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in names:
        raise HarnessError(unknown_name(dtype, ["auto", *names], "dtype"))
    kind = names.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    if any((Path(path) / part / CONFIG_FILE).exists() for part in ("", "mediator")):
        model: AnyModel
        model, tokenizer = load_mediator(path, dtype=kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer is None:
        raise HarnessError(f"{path!r} has no tokenizer files. Save the base model's tokenizer there.")
    return model.to(device), tokenizer


def task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """What finds the tasks: own ones in ``include_path`` first, the harness's own collection where that is not enough.

    Raises:
        HarnessError: a task is unknown.
    """
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise HarnessError(f"--include-path {str(include_path)!r} is no folder.")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        # Reading the harness's own thousands of tasks takes seconds.
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise HarnessError("\n".join(unknown_name(task, manager.all_tasks, "harness task") for task in unknown))
    return manager


def run_harness(
    model: AnyModel,
    tokenizer: Any,
    manager: TaskManager,
    tasks: Sequence[str],
    *,
    expert: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    use_template: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run harness tasks on one system.

    Args:
        model: a Mediator model or a plain one.
        tokenizer: of the model.
        manager: of :func:`task_manager`.
        tasks: names of harness tasks or groups.
        expert: as in :class:`MediatorLM`.
        batch_size: rows at once.
        limit: most items of each task.
        num_fewshot: examples in the context; None leaves it to the task.
        use_template: whether contexts are rendered with the tokenizer's chat template.
        seed: of the choice of examples.

    Returns:
        Task → metric → value; ``metric_stderr`` beside it where the harness has one.
    """
    device = str(next(model.parameters()).device)
    lm = MediatorLM(model, expert, tokenizer, device=device, batch_size=batch_size)
    results = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=use_template,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    if results is None:
        return {}
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by the names that they have without their filter, where that is the standard one."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "sample_len"
    }


def main() -> None:
    """The harness's own command line, with ``--model mediator``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
