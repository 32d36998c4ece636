"""What systems of the comparison share, and what one of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lab import Lab
from .scores import Sizes
from .systems import Bench, Parts, build_default, load_built


@dataclass
class Comparison:
    """What all systems share."""

    bench: Bench
    lab: Lab
    limit: Sizes | None = None
    """Most answers and losses of a task; None takes those of the table of systems."""

    memory: dict[str, Any] = field(default_factory=dict)
    """What is loaded once."""

    def sizes(self, task: str) -> Sizes:
        """Items of a task."""
        wanted = self.bench.sample.sizes[task]
        if self.limit is None:
            return wanted
        return Sizes(min(wanted.answers, self.limit.answers), min(wanted.losses, self.limit.losses))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave before."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    @property
    def default(self) -> Path:
        """The Mediator model whose router and bank are used."""
        folder: Path = self.once("default", lambda: build_default(self.bench))
        return folder

    def default_model(self) -> tuple[Any, Any]:
        """It, loaded."""
        found: tuple[Any, Any] = self.once("default model", lambda: load_built(self.default))
        return found


@dataclass(frozen=True)
class System:
    """One system to be scored."""

    depends: Any
    """What its figures depend on, known without any work."""

    parts: Callable[[str], Parts]
    """Task → items → parts."""

    num_bytes: Callable[[], int | None]
    """Of its weights; None for one model."""

    answers_unknown: bool = True
    """Whether it answers tasks without an expert."""
