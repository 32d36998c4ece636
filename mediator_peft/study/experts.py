"""Items and experts of the study: made from fixed seeds, cached by a hash of all they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..demo.data import make_tasks
from ..demo.settings import FULL
from ..demo.tasks import Item, Task
from ..demo.training import TrainedExpert, expert_folder, train_experts
from ..errors import CheckpointError, OutputError
from .bases import SMOLLM2, StudyBase
from .settings import StudyExpert, StudySettings
from .tasks import STUDY_TASKS, make_study_task


@dataclass(frozen=True)
class StudyFolder:
    """Where everything of the study lies.

    What belongs to SmolLM2 is laid out as the demo's folder, so that both can share one; another base has a folder of
    its own in it. Data packages and result files are shared.
    """

    root: Path
    model: StudyBase = SMOLLM2

    @property
    def home(self) -> Path:
        """Of all that depends on the base."""
        return self.root if self.model.is_demo else self.root / self.model.name

    def check_writable(self) -> None:
        """Refuse, before anything is made, a place where no folder can be.

        Raises:
            OutputError: a file is in its place, or above it.
        """
        existing = next(place for place in (self.root, *self.root.absolute().parents) if os.path.lexists(place))
        if not existing.is_dir():
            raise OutputError(f"{str(self.root)!r} cannot be a folder: {str(existing)!r} is a file.")

    def check_trained(self) -> None:
        """Refuse a folder in which no expert of this base was trained, and make nothing in it.

        Raises:
            CheckpointError: it is no such folder.
        """
        if not any(self.experts.glob("*/losses.json")):
            raise CheckpointError(
                f"{str(self.root)!r} holds no trained experts of {self.model.name!r}. Run `experts` with this folder "
                "and base first, or give another folder."
            )

    @property
    def base(self) -> Path:
        """The base checkpoint."""
        return self.home / "base"

    @property
    def materials(self) -> Path:
        """Unpacked data packages."""
        return self.root / "materials"

    @property
    def experts(self) -> Path:
        """Trained experts, one folder each."""
        return self.home / "experts"

    @property
    def results(self) -> Path:
        """Result files, one a table."""
        return self.root / "results"

    @property
    def cost(self) -> Path:
        """File with the processor time of all that was done for this base."""
        return self.results / f"cost{self.model.suffix}.json"

    @property
    def scores(self) -> Path:
        """Scores of single systems, from which the tables are made."""
        return self.home / "scores"

    @property
    def statistics(self) -> Path:
        """Statistics of experts that some merge methods read."""
        return self.home / "statistics"

    @property
    def models(self) -> Path:
        """Built models."""
        return self.home / "models"


def settings_for(settings: StudySettings, base: StudyBase) -> StudySettings:
    """The study with the recipes, numbers of items and merges that a base has of its own."""
    own = {
        name: replace(expert, recipe=base.recipes[name]) if name in base.recipes else expert
        for name, expert in settings.experts.items()
    }
    return replace(
        settings,
        experts=own,
        num_answers=base.num_answers or settings.num_answers,
        num_losses=base.num_losses or settings.num_losses,
        answered_merges=(*base.merges, *settings.answered_merges),
    )


def load_tasks(settings: StudySettings, folder: StudyFolder) -> dict[str, Task]:
    """Items of all tasks that have an expert, the demo's with the demo's own splits; prompts in no base's form."""
    demo = make_tasks(FULL, folder.materials)
    wanted = dict.fromkeys(expert.task for expert in settings.experts.values())
    return {name: demo[name] if name in demo else _study_task(name, settings, folder) for name in wanted}


def _study_task(name: str, settings: StudySettings, folder: StudyFolder) -> Task:
    num_train = max(_num_items(expert) for expert in settings.experts.values() if expert.task == name)
    # The validation items come after the training ones, so that their number changes no expert.
    num_drawn = num_train + settings.num_validation
    return make_study_task(
        name, num_drawn, settings.num_calibration, settings.num_test, settings.seed, folder.materials
    )


def _num_items(expert: StudyExpert) -> int:
    return expert.recipe.num_steps * expert.recipe.batch_size


def training_items(expert: StudyExpert, tasks: dict[str, Task], folder: StudyFolder) -> list[Item]:
    """What one expert is trained on, prompts in the base's form."""
    task = tasks[expert.task]
    items = task.train[: _num_items(expert)]
    if expert.data != "train":
        taken = {item.prompt for split in (task.train, task.calibration, task.test) for item in split}
        items = make_study_task(expert.task, _num_items(expert), 0, 0, expert.seed, folder.materials, taken).train
    return [folder.model.formed(item) for item in items]


def validation_items(name: str, settings: StudySettings, tasks: dict[str, Task], folder: StudyFolder) -> list[Item]:
    """Items of one task that no expert was trained on and no test holds."""
    if name in STUDY_TASKS and name not in FULL.recipes:
        return tasks[name].train[-settings.num_validation :]
    # The demo draws no more than it trains on; its calibration prompts come with answers as well.
    return tasks[name].calibration[: settings.num_validation]


def study_experts(
    settings: StudySettings, folder: StudyFolder, names: Sequence[str] | None = None, num_threads: int | None = 1
) -> dict[str, TrainedExpert]:
    """Train the experts that are not in the folder yet, one after the other.

    Args:
        settings: which experts there are.
        folder: of the study.
        names: those to train; None for all.
        num_threads: of the training process; None for all cores.
    """
    base = folder.model.make(folder.base, folder.materials)
    identity = folder.model.identity
    tasks = load_tasks(settings, folder)
    trained: dict[str, TrainedExpert] = {}
    for name in names or settings.experts:
        expert = settings.experts[name]
        items = {name: training_items(expert, tasks, folder)}
        recipes = {name: expert.recipe}
        trained |= train_experts(
            base, items, recipes, folder.experts, expert.seed, num_threads=num_threads, base_identity=identity
        )
    return trained


def trained_experts(settings: StudySettings, folder: StudyFolder) -> dict[str, TrainedExpert]:
    """The experts that are in the folder already, in the order of the settings; nothing is trained."""
    tasks = load_tasks(settings, folder)
    found = {}
    for name, expert in settings.experts.items():
        items = training_items(expert, tasks, folder)
        path = expert_folder(name, items, expert.recipe, folder.experts, expert.seed, folder.model.identity)
        if (path / "losses.json").exists():
            losses = json.loads((path / "losses.json").read_text(encoding="utf-8"))
            found[name] = TrainedExpert(path, losses, True, 0.0)
    return found
