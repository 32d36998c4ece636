"""Sub-commands of the study."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Root = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the study; the demo's can be shared.")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this expert; repeatable.")]
Base = Annotated[
    str, typer.Option("--base", metavar="NAME", help="smollm2, gemma3, or the folder of a checkpoint of one file.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every process.")]


def say(text: str) -> None:
    """A line on the error stream."""
    print(text, file=sys.stderr, flush=True)


@app.callback()
def study() -> None:
    """The study behind docs/evidence.md. Each step goes on where it stopped, and takes what is there."""


@app.command()
def experts(
    folder: Root,
    base: Base = "smollm2",
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Train the experts that are not in FOLDER yet."""
    from .bases import find_base
    from .cost import count_cost
    from .experts import StudyFolder, settings_for, study_experts
    from .settings import FULL_STUDY

    model = find_base(base)
    place = StudyFolder(folder, model)
    place.check_writable()
    count_cost(place.cost, "experts")
    for name, expert in study_experts(settings_for(FULL_STUDY, model), place, only, threads).items():
        how = "cached" if expert.was_cached else f"{expert.seconds:.0f} s"
        say(f"{name}: loss {expert.losses[0]:.3f} → {expert.losses[-1]:.3f} ({how})")


def _bench(folder: Path, base: str, threads: int, only: list[str] | None) -> Any:
    """Everything that measuring needs, with the experts that have been trained."""
    import torch

    from ..demo.data import make_tasks
    from ..demo.settings import FULL
    from .bases import find_base
    from .cost import count_cost
    from .experts import StudyFolder, load_tasks, settings_for, trained_experts
    from .general import general_task
    from .scores import GENERAL
    from .settings import FULL_STUDY
    from .systems import Bench, make_sample

    torch.set_num_threads(threads)
    model = find_base(base)
    settings, place = settings_for(FULL_STUDY, model), StudyFolder(folder, model)
    place.check_trained()
    count_cost(place.cost, "measuring")
    tasks = {name: model.formed_task(task) for name, task in load_tasks(settings, place).items()}
    found = trained_experts(settings, place)
    known = [name for name in FULL_STUDY.main if name in found and (not only or name in only)]
    for name in FULL_STUDY.main:
        if name not in known:
            say(f"left out, not trained: {name}")
    drawn = make_tasks(FULL, place.materials)
    unknown = {name: model.formed_task(task) for name, task in drawn.items() if name not in FULL.recipes}
    unknown[GENERAL] = general_task(place, settings.seed)
    return Bench(
        settings,
        place,
        {name: found[name] for name in known},
        make_sample(tasks, known, unknown, settings.num_answers, settings.num_losses),
        say,
    )


def _lab(bench: Any) -> Any:
    from .lab import Lab

    return Lab(bench.folder.base, {name: expert.path for name, expert in bench.experts.items()})


@app.command()
def alone(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Score the base, and each expert on its own task."""
    from .systems import score_alone

    bench = _bench(folder, base, threads, only)
    score_alone(bench, _lab(bench))


@app.command()
def systems(
    folder: Root,
    base: Base = "smollm2",
    merge: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Single-model merge; repeatable. By default the study's.")
    ] = None,
    without_base: Annotated[bool, typer.Option(help="Leave the base out of the table.")] = False,
    second_seeds: Annotated[
        bool, typer.Option(help="With the second seed of experts that have one; the table is systems_seed1.")
    ] = False,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Score single-model merges and the Mediator model, and write the table of all systems."""
    from dataclasses import replace

    from .comparison import score_merges
    from .systems import build_default, score_base, score_experts, score_mediator, with_second_seeds
    from .tables import systems_result

    bench = _bench(folder, base, threads, only)
    if second_seeds:
        bench = with_second_seeds(bench)
    if merge:
        bench = replace(bench, settings=replace(bench.settings, answered_merges=tuple(merge)))
    lab = _lab(bench)
    # The most important first: a stopped run has them.
    own = score_experts(bench, lab)
    model = build_default(bench)
    mediator = score_mediator(bench, model)
    merged = score_merges(bench, lab)
    table = ({} if without_base else score_base(bench, lab)) | own | mediator | merged
    _keep(bench, "systems", systems_result(bench, table, model))


@app.command()
def routes(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Route the test prompts anew with the model that `systems` built, and renew that part of its table."""
    from .systems import rerouted
    from .tables import with_new_routes

    bench = _bench(folder, base, threads, only)
    path = bench.folder.results / f"systems{bench.folder.model.suffix}.json"
    say(f"written: {with_new_routes(path, rerouted(bench), bench)}")


@app.command()
def merges(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Score single-model merges alone; `systems` then takes their scores from FOLDER."""
    from .comparison import score_merges

    bench = _bench(folder, base, threads, only)
    score_merges(bench, _lab(bench))


@app.command()
def compare(
    folder: Root,
    base: Base = "smollm2",
    system: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this system; repeatable. By default all in order.")
    ] = None,
    answers: Annotated[int | None, typer.Option(min=0, help="Most answers a task.")] = None,
    losses: Annotated[int | None, typer.Option(min=1, help="Most answer losses a task.")] = None,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Score baselines of other papers and every merge method on the items of `systems`, and write the table.

    Systems that were scored before, by this or another run, are in the table as well; with fewer answers than the
    study's, it is a table of its own, on the first items of each task.
    """
    from .compared_system import Comparison
    from .comparison import ORDER
    from .comparison import compare as compare_systems
    from .scores import Sizes

    bench = _bench(folder, base, threads, only)
    limit = None
    if answers is not None or losses is not None:
        limit = Sizes(10**9 if answers is None else answers, 10**9 if losses is None else losses)
    run = Comparison(bench, _lab(bench), limit)
    is_short = answers is not None and answers < bench.settings.num_answers
    name = f"comparison_first{answers}" if is_short else "comparison"
    _keep(bench, name, compare_systems(run, system or ORDER))


@app.command()
def runtime(
    folder: Root,
    base: Base = "smollm2",
    rounds: Annotated[int, typer.Option(min=1, help="How often each system is made and asked, by turns.")] = 3,
    system: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this merge or baseline; repeatable. By default all.")
    ] = None,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Time what every system takes to make, and how fast the Mediator model answers; best on a quiet machine."""
    from .compared_system import Comparison
    from .comparison import ORDER, check_system
    from .runtime import runtime as measured

    for name in system or ():
        check_system(name)
    bench = _bench(folder, base, threads, only)
    _keep(bench, "runtime", measured(Comparison(bench, _lab(bench)), rounds, system or ORDER))


@app.command()
def conflict(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Measure conflict per block and matrix kind, for each choice of seeds, and write the table."""
    from .tables import conflict_result

    bench = _bench(folder, base, threads, only)
    _keep(bench, "conflict", conflict_result(bench))


@app.command()
def ablation(
    folder: Root,
    base: Base = "smollm2",
    ranking: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this ranking of blocks; repeatable.")
    ] = None,
    share: Annotated[
        list[float] | None, typer.Option(min=0.0, max=1.0, help="Only this share of blocks; repeatable.")
    ] = None,
    blocks_only: Annotated[
        bool, typer.Option(help="Only which blocks are routed: no changed parts, equal bytes or numbers of experts.")
    ] = False,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Measure answer losses with one part of the method changed, and with deltas in a share of the blocks."""
    from .ablation import SHARES, Choice, ablate

    bench = _bench(folder, base, threads, only)
    choice = Choice(None if ranking is None else tuple(ranking), tuple(share or SHARES), blocks_only)
    ablate(bench, _lab(bench), lambda found: _keep(bench, "ablation", found), choice)


@app.command()
def hard(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Measure hard cases: experts that share a task, large steps, LoRA, prompts of two tasks, later turns, gates."""
    from .hard import hard_cases
    from .systems import build_default

    bench = _bench(folder, base, threads, only)
    hard_cases(bench, _lab(bench), build_default(bench), lambda found: _keep(bench, "hard", found))


@app.command()
def forms(folder: Root, base: Base = "smollm2", only: Only = None, threads: Threads = 1) -> None:
    """Measure how near experts come back from each form of their deltas, against bytes, and write the table."""
    from .forms import FORMS, compare_forms

    bench = _bench(folder, base, threads, only)
    _keep(bench, "forms", compare_forms(bench, _lab(bench), FORMS, bench.folder.scores / "forms.json"))


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="Folder of the result files.")] = Path("docs/results"),
    path: Annotated[Path, typer.Option(help="The page.")] = Path("docs/evidence.md"),
) -> None:
    """Put the tables of the result files into the page, between its markers, and draw the figures beside it."""
    from ..checkpoints.replacing import write_replacing
    from ..data_files import read_text
    from .page import PageError, draw_figures, fill_page, read_results

    found = read_results(results)
    if not found:
        raise PageError(f"{str(results)!r} holds no result files. Give the folder results of a study, or docs/results.")
    write_replacing(path, fill_page(read_text(path), results))
    for figure in draw_figures(found, path.parent):
        say(f"drawn: {figure}")


def _keep(bench: Any, name: str, found: Any) -> None:
    from .tables import about, write_result

    path = write_result(
        bench.folder.results, name + bench.suffix + bench.folder.model.suffix, {"about": about(bench), **found}
    )
    say(f"written: {path}")


def main() -> None:
    """Run the command line; errors that a caller can mend are a message and exit code 3."""
    from ..errors import MediatorError

    try:
        app()
    except (MediatorError, OSError) as fault:
        say(f"error: {fault}")
        raise SystemExit(3) from fault
