"""Sizes of the demo in full and in quick form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertRecipe:
    """How one expert is fine-tuned."""

    num_steps: int
    batch_size: int = 8
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo."""

    recipes: dict[str, ExpertRecipe]
    """Task → how its expert is trained. The first ones are started first: the longest should lead."""

    num_test: dict[str, int]
    """Task → held-out items, known and unknown tasks."""

    num_elsewhere: int
    """Items on which the base, and experts outside their own task, are tested; their answers are nearly all wrong."""

    num_calibration: int
    """Prompts per expert from which the router is fitted."""

    num_losses: int  # see score_system
    """Items per task whose answer loss is measured."""

    batch_size: int = 50
    seed: int = 0


FULL = DemoSettings(
    recipes={"maths": ExpertRecipe(100), "cron": ExpertRecipe(150), "spelling": ExpertRecipe(90)},
    num_test={"maths": 100, "cron": 200, "spelling": 200, "capitals": 100, "opposites": 100},
    num_elsewhere=50,
    num_calibration=100,
    num_losses=50,
)
QUICK = DemoSettings(
    recipes={"maths": ExpertRecipe(25), "cron": ExpertRecipe(45), "spelling": ExpertRecipe(45)},
    num_test={"maths": 25, "cron": 50, "spelling": 50, "capitals": 25, "opposites": 25},
    num_elsewhere=10,
    num_calibration=50,
    num_losses=10,
)
