"""``mediator-peft``: the command line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .bench import bench
from .build import build
from .common import GuardedGroup, prepare_streams
from .condense import condense
from .demo import demo
from .env import env
from .evaluate import evaluate
from .fit_router import fit_router
from .fit_scales import fit_scales
from .generate import generate
from .inspect import inspect
from .measure import measure
from .merge import merge
from .methods import methods
from .option_needs import CheckedCommand
from .plan import plan
from .run import run
from .search import search
from .verify import verify

app = typer.Typer(
    name="mediator-peft",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge fine-tuned models of one base into a backbone plus sparse experts, routed per prompt by uncertainty.",
    epilog="Exit codes: 0 done, 1 unexpected error or interrupted, 2 wrong command line, 3 bad input, 4 out of memory "
    "or disk. Example: mediator-peft plan --base base --expert math=math --expert cron=cron",
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "build": build,
    "merge": merge,
    "measure": measure,
    "search": search,
    "run": run,
    "fit-router": fit_router,
    "calibrate": fit_router,
    "fit-scales": fit_scales,
    "generate": generate,
    "eval": evaluate,
    "inspect": inspect,
    "condense": condense,
    "verify": verify,
    "bench": bench,
    "demo": demo,
    "methods": methods,
    "env": env,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, hidden=_name == "calibrate", cls=CheckedCommand)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(version("mediator_peft"))
        except PackageNotFoundError:
            print("not installed")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of an error; allowed anywhere in the command line.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command."""
    prepare_streams()
    # PEFT 0.21 reads a property that transformers 5.24 renames; a user of the command can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # Renamed in transformers 5.24; the former name works in all versions that are supported.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    app()
