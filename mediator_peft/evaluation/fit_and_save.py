"""Fitting the router of a built model, saving it in the adapter folder, and the report on held-out prompts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_raw_config
from ..progress import bar_progress
from ..ranks import Ranks
from ..routing.background import user_families
from .outcomes import judge_outcomes
from .prompts import TaskItem, render
from .routing_report import write_routing_report


def fit_and_save(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    adapter: Path,
    use_template: bool = True,
    batch_size: int = 16,
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
        use_template: whether prompts are rendered with the tokenizer's chat template, where it has one.
        batch_size: prompts at once.
        answered: other prompts, with answers. The router is first fitted without them, then again with those that the
            nearest expert answers right and the fallback does not among its prompts, and those of which the opposite
            is true among the background prompts, as a family of their own.
        background: a JSONL or text file of prompts that belong to no expert, added to the library's.

    Returns:
        What ``routing.json`` holds: the calibration report as plain data, and how well ordinary prompts are told apart.
    """
    # A template writes the special tokens itself; they must not come twice.
    some = next((text for texts in prompts.values() for text in texts), "")
    encode = partial(tokenizer, add_special_tokens=render(tokenizer, some, use_template).add_special_tokens)

    own = {} if background is None else user_families(background)

    def fit(prompts: Mapping[str, Sequence[str]], background: Mapping[str, Sequence[str]]) -> Any:
        texts = {name: [render(tokenizer, text, use_template).text for text in some] for name, some in prompts.items()}
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress": True, "over_ranks": True}
        return model.fit_router(texts, encode, background=background or None, **options)

    report, outcomes = fit(prompts, own), None
    if answered:
        with bar_progress("answering prompts", 2 * len(answered)) as advance:
            shared: dict[str, Any] = {"use_template": use_template, "batch_size": batch_size, "ranks": Ranks()}
            outcomes = judge_outcomes(model, tokenizer, answered, advance=advance, **shared)
        more = {name: [*texts, *outcomes.experts[name]] for name, texts in prompts.items()}
        report = fit(more, {**own, "answered by the base alone": outcomes.ordinary})

    def save() -> dict[str, Any]:
        save_router(model, adapter)
        return write_routing_report(adapter / "report", report, model.router.evidence, outcomes)

    return Ranks().first(save)


def save_router(model: Any, adapter: Path) -> None:
    """Put a model's router into the adapter folder it was loaded from; card, report and checksums there stay."""
    fresh = adapter.with_name(f".{adapter.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(str(fresh))
        # Where the backbone lies was true for the folder; it need not be for the temporary one.
        settings = read_raw_config(fresh)
        settings["base_model_name_or_path"] = read_raw_config(adapter).get("base_model_name_or_path")
        (fresh / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copymode(adapter / name, fresh / name)
            os.replace(fresh / name, adapter / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
