"""Fitting the router of a built model, saving it in the adapter folder, and the report on held-out prompts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_raw_config
from ..checkpoints.checksums import CARD, adapter_checksums, put_checksums, read_checksums
from ..checkpoints.replacing import replaced_together
from ..progress import bar_progress
from ..ranks import Ranks
from ..routing.background import families_by_hash, user_families
from .batching import AS_USUAL, PromptSettings
from .outcomes import judge_outcomes
from .prompts import TaskItem, render
from .routing_report import FIGURES, write_routing_report


def fit_and_save(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    adapter: Path,
    settings: PromptSettings = AS_USUAL,
    answered: Sequence[TaskItem] = (),
    background: str | None = None,
) -> dict[str, Any]:
    """Fit a model's router on prompts rendered as in use, and put it into the adapter file it was loaded from.

    What held-out prompts say of it goes to ``report/routing.json``, with CSV files and a figure.

    Args:
        model: as ``load_mediator`` gives it.
        tokenizer: of its backbone.
        prompts: expert → what users would write.
        adapter: the adapter's folder.
        settings: how prompts are put to the model; all ranks share them.
        answered: other prompts, with answers. The router is first fitted without them, then again with those that the
            nearest expert answers right and the fallback does not among its prompts, and those of which the opposite
            is true among the background prompts, as a family of their own.
        background: a JSONL or text file of prompts that belong to no expert, added to the library's.

    Returns:
        What ``routing.json`` holds: the calibration report as plain data, and how well they separate from background.
    """
    # A template writes the special tokens itself; they must not come twice.
    some = next((text for texts in prompts.values() for text in texts), "")
    form = partial(render, tokenizer, use_template=settings.use_template)
    encode = partial(tokenizer, add_special_tokens=form(some).add_special_tokens)

    own = {} if background is None else user_families(background)

    def fit(prompts: Mapping[str, Sequence[str]], background: Mapping[str, Sequence[str]]) -> Any:
        texts = {name: [form(text).text for text in some] for name, some in prompts.items()}
        options: dict[str, Any] = {"batch_size": settings.batch_size, "show_progress": True, "over_ranks": True}
        return model.fit_router(texts, encode, background=background or None, **options)

    report, outcomes = fit(prompts, own), None
    if answered:
        with bar_progress("answering prompts", 2 * len(answered)) as advance:
            outcomes = judge_outcomes(model, tokenizer, answered, replace(settings, ranks=Ranks()), advance=advance)
        more = {name: [*texts, *outcomes.experts[name]] for name, texts in prompts.items()}
        report = fit(more, {**own, **families_by_hash(outcomes.ordinary, "answered by the base alone")})

    def save() -> dict[str, Any]:
        return save_router(model, adapter, lambda to: write_routing_report(to, report, model.router.evidence, outcomes))

    return Ranks().first(save)


def make_and_save(
    model: Any,
    tokenizer: Any,
    adapter: Path,
    settings: PromptSettings = AS_USUAL,
    background: str | None = None,
) -> dict[str, Any]:
    """Make a model's router from its experts' deltas, without texts, and put it into the adapter file.

    Args:
        model: as ``load_mediator`` gives it.
        tokenizer: of its backbone.
        adapter: the adapter's folder.
        settings: how prompts are put to the model; all ranks share them.
        background: a JSONL or text file of prompts that belong to no expert, added to the library's.

    Returns:
        What ``report/routing.json`` holds: the :class:`~mediator_peft.tuner.fitting_from_deltas.DeltaReport`.
    """
    report = model.fit_router_from_deltas(
        tokenizer, settings.batch_size, show_progress=True, background=background, over_ranks=True
    )
    summary = {"made_from": "deltas", **report._asdict()}

    def write(folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "routing.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary

    def save() -> dict[str, Any]:
        saved = save_router(model, adapter, write)
        for name in FIGURES:
            # Those of an earlier fit on texts say nothing of this router.
            (adapter / "report" / name).unlink(missing_ok=True)
        return saved

    return Ranks().first(save)


def save_router(model: Any, adapter: Path, write_report: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Put a model's router and the report on it into the adapter folder it was loaded from, both or neither.

    Args:
        model: as ``load_mediator`` gives it.
        adapter: the folder; what else is in it stays.
        write_report: writes the report to a folder, ``report`` in the adapter's.

    Returns:
        What ``write_report`` does.
    """
    _clear_former_leftovers(adapter)
    with replaced_together(adapter) as fresh:
        model.save_pretrained(str(fresh))
        reference = read_raw_config(adapter).get("base_model_name_or_path")
        settings = read_raw_config(fresh)
        if settings.get("base_model_name_or_path") != reference and not (fresh / "backbone").exists():
            # Where the backbone lies stays as it was written, e.g. relative to a parent of both.
            settings["base_model_name_or_path"] = reference
            (fresh / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
            put_checksums(fresh, adapter_checksums(fresh, read_checksums(fresh)))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copymode(adapter / name, fresh / name)
        if (adapter / CARD).exists():
            (fresh / CARD).unlink(missing_ok=True)
        return write_report(fresh / "report")


def _clear_former_leftovers(adapter: Path) -> None:
    """Folders that killed processes of former versions left beside an adapter."""
    for left in adapter.parent.glob(f".{adapter.name}.partial-*"):
        number = left.name.rpartition("-")[2]
        known = {WEIGHTS_FILE, CONFIG_FILE, CARD, "backbone"}
        if left.is_symlink() or not left.is_dir() or not number.isdigit() or _is_running(int(number)):
            continue
        if {entry.name for entry in left.iterdir()} <= known:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
