"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""``progress(phase, total)`` opens a phase of ``total`` steps; what it yields is called after each."""


@contextmanager
def no_progress(phase: str, total: int) -> Iterator[Advance]:
    """Say nothing."""
    yield lambda: None


@contextmanager
def bar_progress(phase: str, total: int) -> Iterator[Advance]:
    """A bar on the error stream with time left; a plain line a phase where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{phase} ...")
        yield lambda: None
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        task = bars.add_task(phase, total=total)
        yield lambda: bars.advance(task)
