"""What all commands share: consoles, messages, exit codes, checks of what is given."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..checkpoints.adapter_files import CONFIG_FILE, backbone_of, find_adapter, read_raw_config
from ..data_files import DataFileError, MalformedJsonError, parse_json, read_text, special_files
from ..errors import AdapterError, MediatorError, OutputError
from ..tables import unknown_name

if TYPE_CHECKING:
    from rich.console import Console

UNEXPECTED, BAD_INPUT, NO_RESOURCES = 1, 3, 4
"""Exit codes; 0 is success and 2 a wrong command line."""

MOST_TOKENS, MOST_ROWS, MOST_ROUNDS, MOST_WORKERS = 1 << 20, 1 << 16, 100, 1024
"""Upper bounds of what may be asked for: tokens, rows of a batch, rounds, processes."""

_TRACEBACK, _TRACEBACK_VARIABLE = "--traceback", "MEDIATOR_PEFT_TRACEBACK"
# typer brings its own copy of click's classes.
_ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

_RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE}
_RESOURCE_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "no space left on device")
_PART_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts")
_MOST_PARTS = 2000
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# Field of an adapter's configuration → its type, and what that is called.
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "expert_names": (_are_texts, "a list of names"),
    "routed_modules": (_are_texts, "a list of names"),
    "experts": (lambda value: isinstance(value, dict), "an object"),
    "backbone_fingerprint": (lambda value: isinstance(value, dict), "an object"),
    "provenance": (lambda value: isinstance(value, dict), "an object"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    "num_blocks": (lambda value: type(value) is int, "a whole number"),
    "turn_markers": (lambda value: isinstance(value, list), "a list"),
}
_BAD_PATH_MESSAGES = ("embedded null byte", "Could not determine home directory")
_WIDTH_OF_FILES = 140

OutputFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder of `build`.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output; messages go to standard error.")]


class GuardedGroup(TyperGroup):
    """Turns every error into a message and an exit code; a traceback comes with ``--traceback`` alone."""

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> Any:
        # Help and version are printed here, before anything is invoked.
        with _reporting(lambda: _TRACEBACK in args[: _end_of_options(args)]):
            return super().make_context(info_name, args, *others, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = _end_of_options(args)
        if _TRACEBACK in args[:end]:
            ctx.meta[_TRACEBACK] = True
            args = [argument for argument in args[:end] if argument != _TRACEBACK] + args[end:]
        return super().parse_args(ctx, [_todays_option(argument) for argument in args])

    def invoke(self, ctx: Any) -> Any:
        with _reporting(lambda: bool(ctx.meta.get(_TRACEBACK))):
            return super().invoke(ctx)


def _end_of_options(args: Sequence[str]) -> int:
    return args.index("--") if "--" in args else len(args)


@contextmanager
def _reporting(wants_traceback: Callable[[], bool]) -> Iterator[None]:
    """Say what goes wrong inside and end with its exit code; so, too, where the standard output takes no more."""
    try:
        try:
            yield
        except typer.Exit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (_ClickException, typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as fault:
        code = exit_code(fault)
        if wants_traceback() or os.environ.get(_TRACEBACK_VARIABLE, "") not in ("", "0"):
            traceback.print_exc()
        if code is None:
            say(
                f"error: {type(fault).__name__}: {explain(fault)}\nThis may be a fault of mediator_peft. Run the "
                f"command again with {_TRACEBACK} (or {_TRACEBACK_VARIABLE}=1) and report what it prints."
            )
            code = UNEXPECTED
        else:
            say(f"error: {explain(fault)}")
        _drop_output()
        raise typer.Exit(code) from fault


def _drop_output() -> None:
    """Forget what the standard output could not take, so that closing it does not fail once more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Make the three standard streams usable: open, and able to print any text.

    A file opened while one of the first three descriptors is closed would take its place, and receive what libraries
    print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)


_OLD_OPTIONS = {
    "--values": "--encoding",
    "--sign-scale": "--rescale",
    "--top-p": "--routing-top-p",
}


def _todays_option(argument: str) -> str:
    """An argument with the name that its option has today; a former name is understood for one more release."""
    name, equals, value = argument.partition("=")
    if name not in _OLD_OPTIONS:
        return argument
    say(f"warning: {name} is now called {_OLD_OPTIONS[name]}; the old name goes with the next release.")
    return _OLD_OPTIONS[name] + equals + value


def exit_code(fault: BaseException) -> int | None:
    """3 for bad input, 4 for a lack of memory or disk, None for a fault of this library or its parts."""
    for cause in _causes(fault):
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return NO_RESOURCES
        if isinstance(cause, OSError) and cause.errno in _RESOURCE_ERRNOS:
            return NO_RESOURCES
        if any(message in str(cause).lower() for message in _RESOURCE_MESSAGES):
            return NO_RESOURCES
    # What the operating system refuses: missing, forbidden, a folder, a read-only disk, too long a name.
    if isinstance(fault, (MediatorError, OSError)) or any(text in str(fault) for text in _BAD_PATH_MESSAGES):
        return BAD_INPUT
    return None


def explain(fault: BaseException) -> str:
    """The message of an error; where memory or disk ran out, also what may help."""
    message = str(fault) or type(fault).__name__
    if exit_code(fault) == NO_RESOURCES:
        return f"{message}\nMemory or disk space ran out. Free some, or use a smaller --batch-size where there is one."
    return message


def _causes(fault: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = fault
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def say(text: str) -> None:
    """One message on the error stream, as it is; nowhere if that is closed."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """For results. Wide where the output is no terminal, so that nothing of a table is cut off in a file.

    Text is printed as it is: names and answers may hold what rich would take for markup.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    return Console(width=width, markup=False, emoji=False, highlight=False)


def print_json(content: Any) -> None:
    """One JSON document on the standard output, in ASCII where that cannot take all characters."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2)
    print(text)


def parse_pairs(values: Sequence[str], option: str, form: str = "NAME=PATH") -> dict[str, str]:
    """``["math=a.jsonl", …]`` as a dict.

    Args:
        values: what was typed.
        option: for messages.
        form: what a value is like, for messages.

    Raises:
        typer.BadParameter: no ``=``, nothing on one side of it, or a name that comes twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and name and path):
            raise typer.BadParameter(f"{value!r} is not {form}.", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"the name {name!r} comes twice.", param_hint=option)
        pairs[name] = path
    return pairs


@contextmanager
def reading_output(path: Path) -> Iterator[None]:
    """Name the folder in errors that damaged files of an output cause in other packages.

    Raises:
        AdapterError: in place of such an error. Ours and those of the operating system pass.
    """
    try:
        yield
    except Exception as fault:
        if exit_code(fault) is not None or isinstance(fault, (_ClickException, typer.Exit)):
            raise
        reason = " ".join(str(fault).split()) or "no further message"
        raise AdapterError(
            f"{str(path)!r} cannot be read ({type(fault).__name__}: {reason}). A file is damaged or was edited: run "
            f"`mediator-peft verify`, then copy or build the folder again. {_TRACEBACK} shows where it failed."
        ) from fault


def check_output(path: Path) -> None:
    """Check, before anything is loaded, what would block, run without end, or fail in the middle of another package.

    Pipes and devices in an output folder, settings of the wrong type, JSON files beside the weights that are no JSON,
    and a backbone with more layers than any model has, which would take hours or all memory to be made.

    Raises:
        AdapterError: something is wrong; the message names the file.
    """
    folder = path.expanduser()
    if not folder.is_dir():
        return  # a hub id, or nothing; loading says which
    adapter = find_adapter(folder)
    _refuse_special({folder, adapter, adapter / "report"})
    settings = read_raw_config(adapter)
    for name, (kind, what) in _TYPES.items():
        value = settings.get(name)
        if value is not None and not kind(value):
            raise AdapterError(f"{adapter / CONFIG_FILE}: {name} must be {what}, got {short(value)}.")
    reference = settings.get("base_model_name_or_path")
    if not reference:
        return
    backbone = Path(backbone_of(adapter, str(reference)))
    _refuse_special({backbone})
    for name in _JSON_FILES:
        if (backbone / name).is_file():
            _check_json(backbone / name)


def _refuse_special(folders: set[Path]) -> None:
    found = [name for place in sorted(folders) for name in special_files(place)]
    if found:
        raise AdapterError(f"pipes, sockets or devices stand in place of files: {', '.join(found)}. Take them away.")


def _check_json(file: Path) -> None:
    try:
        content = parse_json(read_text(file))
    except (MalformedJsonError, DataFileError) as fault:
        raise AdapterError(f"{file} is damaged ({fault}). Copy or build the folder again.") from fault
    if not isinstance(content, dict):
        raise AdapterError(f"{file} must hold a JSON object. Copy or build the folder again.")
    for name, number in _part_counts(content) if file.name == "config.json" else ():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MOST_PARTS:
            raise AdapterError(
                f"{file}: {name} must be a whole number, {_MOST_PARTS:,} at most, got {short(number)}. Copy or build "
                "the folder again."
            )


def _part_counts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if name in _PART_COUNTS and value is not None:
            yield name, value
        elif isinstance(value, dict) and name.endswith("config"):
            yield from _part_counts(value)


def usable_cpus() -> int:
    """Processors that this process may use: its affinity, and the quota of its control group (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, ceil(int(quota) / int(period)))  # "max" is no number
    return max(1, count)


def check_match(name: str) -> str:
    """Refuse an unknown way of judging answers; the same name is returned, as a callback of an option must.

    Raises:
        typer.BadParameter: it is unknown.
    """
    from ..evaluation.scoring import MATCHERS

    if name not in MATCHERS:
        raise typer.BadParameter(unknown_name(name, MATCHERS, "way to match"), param_hint="--match")
    return name


def check_folder(path: Path, what: str) -> None:
    """Refuse, before the work, a folder that could not be written to.

    Raises:
        OutputError: a file stands in its place or above it, or it is not writable.
    """
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise OutputError(f"{what} {str(path)!r} cannot be a folder: {str(existing)!r} is a file. Choose another path.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"{what} {str(path)!r} cannot be written: {str(existing)!r} is read-only. Choose another path."
        )


def check_file(path: Path, option: str) -> None:
    """Refuse, before the work, the place of a file that could not be written, or that holds something else.

    Raises:
        OutputError: its folder cannot be written to.
        typer.BadParameter: a folder, a device or a pipe is in its place.
    """
    check_folder(path.absolute().parent, f"{option}'s folder")
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; give a file.", param_hint=option)
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{str(path)!r} is a device or a pipe; give a file.", param_hint=option)


def quiet_transformers() -> None:
    """Keep transformers' own bars and hints out of the way; errors still come through."""
    if "transformers" not in sys.modules:  # not all commands need it, and importing it takes a second
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
