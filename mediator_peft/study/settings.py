"""What the study trains and measures: experts, items, steps, seeds."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo.settings import FULL, ExpertRecipe


@dataclass(frozen=True)
class StudyRecipe(ExpertRecipe):
    """How one expert of the study is trained."""

    lora_rank: int = 0
    """Rank of a LoRA on all linear layers; 0 trains all weights."""


@dataclass(frozen=True)
class StudyExpert:
    """One expert: its task, its recipe and its seeds."""

    task: str
    """A task of the demo or of the study."""

    recipe: ExpertRecipe
    """A plain ``ExpertRecipe`` for the demo's own three, which are thereby shared with the demo's cache."""

    seed: int = 0
    """Order of the batches and a LoRA's initial weights."""

    data: str = "train"
    """``train``, or ``other``: items that share no prompt with any split of the task."""


@dataclass(frozen=True)
class StudySettings:
    """Sizes of the study."""

    experts: dict[str, StudyExpert]
    """Name → expert, in the order in which they are trained: the most important first."""

    main: tuple[str, ...]
    """The experts of the tables: one of each task."""

    num_test: int
    """Test items of each task of the study; the demo's tasks have the demo's numbers."""

    num_answers: int
    """Test items of each task that are answered greedily: the first ones."""

    answered_merges: tuple[str, ...]
    """Single-model merges in the table of systems; the comparison has the others."""

    num_losses: int
    """Test items of each task whose answer loss is measured; half of them for long and unknown tasks."""

    num_calibration: int
    """Prompts of each task that the router is fitted on."""

    num_validation: int
    """Items of each task, from the training split, on which coefficients are chosen."""

    seed: int = 0


FULL_STUDY = StudySettings(
    experts={
        **{name: StudyExpert(name, recipe) for name, recipe in FULL.recipes.items()},
        "numbers": StudyExpert("numbers", StudyRecipe(60)),
        "wordnet": StudyExpert("wordnet", StudyRecipe(60)),
        "inflection": StudyExpert("inflection", StudyRecipe(40)),
        "spelling-large-step": StudyExpert("spelling", StudyRecipe(40, learning_rate=1e-3)),
        "spelling-other": StudyExpert("spelling", StudyRecipe(50), data="other"),
        "wordnet-seed1": StudyExpert("wordnet", StudyRecipe(60), seed=1),
        "spelling-seed1": StudyExpert("spelling", FULL.recipes["spelling"], seed=1),
        "wordnet-lora": StudyExpert("wordnet", StudyRecipe(60, learning_rate=5e-4, lora_rank=16)),
    },
    main=("maths", "cron", "spelling", "numbers", "wordnet", "inflection"),
    num_test=200,
    num_answers=200,
    answered_merges=("average", "task_arithmetic", "ties"),
    num_losses=40,
    num_calibration=100,
    num_validation=40,
)
