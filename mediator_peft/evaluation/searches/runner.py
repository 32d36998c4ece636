"""search_coefficients(): from checkpoints and prompts to a ``coefficients.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from ...checkpoints.replacing import write_replacing
from ...errors import ConfigError, OutputError, OutputExistsError
from ...progress import Progress, no_progress
from ...tables import lookup, unknown_name
from ..prompts import read_prompts, read_task
from . import SEARCHES, describe
from .merged_model import MergedModel
from .objective import check_tasks, imitated, labelled
from .pareto import draw_front


def search_coefficients(
    method: str,
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    data: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    with_answers: bool = False,
    max_prompts: int | None = None,
    figure: Path | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, Any]:
    """Search coefficients of a weighted sum of task vectors, and write them for ``merge_method="weighted"``.

    Args:
        method: a key of ``SEARCHES``.
        base: folder or hub id.
        experts: name → folder or hub id.
        data: expert → JSONL file of its prompts.
        output: file that does not exist yet.
        with_answers: the files have a column ``answer``, and its likelihood is the metric. Otherwise each expert's own
            predictions are imitated.
        max_prompts: the first prompts of each file; by default 5 for ``expert_merging`` (published) and 16 for others.
        figure: with ``map``, a figure of the front.
        progress: told of each step.
        **options: of the search.

    Returns:
        The content of the file.

    Raises:
        ConfigError: the search is unknown or cannot be run like this.
        DataFileError: prompts cannot be used.
        CheckpointError: checkpoints cannot be used.
        OutputExistsError, OutputError: the output is there already, or cannot be written.
    """
    from transformers import AutoTokenizer

    search, target = lookup(SEARCHES, method, kind="search"), Path(output).expanduser()
    if with_answers and not search.takes_answers:
        raise ConfigError(f"the search {method!r} imitates the experts and takes no answers.")
    if figure is not None and method != "map":
        raise ConfigError("a figure of the front is drawn by the search 'map' alone.")
    if os.path.lexists(target):
        raise OutputExistsError(f"{target} is there already. Remove it, or choose another name.")
    _check_options(method, search.run, options)
    check_tasks(sorted(experts), {name: [path] for name, path in data.items()})
    count = max_prompts or (5 if method == "expert_merging" else 16)
    ordered = sorted(data)
    items = {name: read_task(Path(data[name]))[:count] for name in ordered} if with_answers else {}
    prompts = {} if with_answers else {name: read_prompts(Path(data[name]))[:count] for name in ordered}
    merged = MergedModel(base, experts)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    if with_answers:
        examples = labelled(merged, tokenizer, items)
    else:
        examples = imitated(merged, tokenizer, prompts, options.get("hidden_blocks", ()))
    found = search.run(merged, examples, progress=progress, **options)
    content = describe(method, found, paper=search.paper, prompts_per_expert=count, with_answers=with_answers)
    if figure is not None:
        draw_front(found, merged.experts, figure)
    _write(target, content)
    return content


def _check_options(method: str, run: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a search has not, or whose values are of another kind.

    Raises:
        ConfigError: with all faults.
    """
    known = {
        name: parameter.default
        for name, parameter in signature(run).parameters.items()
        if parameter.default is not Parameter.empty and name != "progress"
    }
    faults = [unknown_name(name, known, f"option of search {method!r}") for name in options if name not in known]
    kinds: dict[type, Any] = {int: int, float: (int, float), str: str, tuple: (list, tuple)}
    for name in options.keys() & known.keys():
        value, default = options[name], known[name]
        least = 1 if isinstance(default, int) and name != "seed" else 0
        is_low = isinstance(value, (int, float)) and (isinstance(value, bool) or not value >= least)
        if is_low or not isinstance(value, kinds.get(type(default), object)):
            faults.append(f"option {name!r} of search {method!r} cannot be {value!r}; its default is {default!r}.")
    if faults:
        raise ConfigError("\n".join(sorted(faults)))


def _write(target: Path, content: Mapping[str, Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_replacing(target, json.dumps(content, indent=2))
    except OSError as fault:
        raise OutputError(f"{str(target)!r} cannot be written: {fault.strerror or fault}") from fault
