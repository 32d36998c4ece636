"""What the base could do before: its own greedy answers to general questions, which a system should not make unlikely.

The questions are collected ones of many kinds (trivia, science, computers, small talk ...) of the package
``chatterbot-corpus`` (BSD licence). No expert is trained on such questions, and no router is fitted on them.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from ..demo.tasks import Item, Task
from ..errors import MissingPackageError
from ..evaluation.report import write_json
from .experts import StudyFolder
from .scores import CONTINUATION

NUM_OF_KIND, NUM_TOKENS = 3, 32
"""Questions of each kind; most tokens of an answer."""

_LONGEST, _PACKAGE = 150, "chatterbot_corpus"


def general_task(folder: StudyFolder, seed: int) -> Task:
    """The questions in the base's form, with the base's answers; made once, kept in the folder.

    Raises:
        MissingPackageError: the package with the questions is not installed.
    """
    path = folder.home / "general.json"
    key = [seed, NUM_OF_KIND, NUM_TOKENS, folder.model.identity, folder.model.prompt_form]
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return Task([], [], [Item(*item) for item in kept["items"]], CONTINUATION)
    asked = [folder.model.formed(Item(text, "", kind)) for kind, text in general_questions(seed)]
    answers = _base_answers(folder, [item.prompt for item in asked])
    items = [item._replace(answer=answer) for item, answer in zip(asked, answers, strict=True) if answer.strip()]
    about = {"package": f"{_PACKAGE} {version(_PACKAGE)}"}
    write_json({"key": key, "about": about, "items": [list(item) for item in items]}, path)
    return Task([], [], items, CONTINUATION)


def general_questions(seed: int) -> list[tuple[str, str]]:
    """(kind, question): the first sayings of conversations, as many of each kind."""
    import yaml

    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingPackageError("the study needs chatterbot-corpus: pip install 'mediator_peft[study]'")
    found = []
    for path in sorted((Path(spec.origin).parent / "data" / "english").glob("*.yml")):
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        openings = dict.fromkeys(str(talk[0]).strip() for talk in content["conversations"])
        usable = [text for text in openings if text.isascii() and len(text.split()) > 1 and len(text) <= _LONGEST]
        drawn = Random(f"general-{path.stem}-{seed}").sample(usable, min(NUM_OF_KIND, len(usable)))
        found += [(path.stem, text) for text in drawn]
    return found


def _base_answers(folder: StudyFolder, prompts: list[str]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..evaluation.generation import answer_prompts

    model = AutoModelForCausalLM.from_pretrained(folder.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.base)
    return answer_prompts(model, tokenizer, prompts, max_new_tokens=NUM_TOKENS)
