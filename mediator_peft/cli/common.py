"""What all commands share: options, consoles, exit codes, loading a model."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import MediatorError
from ..optional import bitsandbytes_functional
from ..tables import unknown_name

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT, NO_RESOURCES = 3, 4
"""Exit codes; 0 is success and 2 a wrong command line."""

_RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE}
_PATH_ERRNOS = {errno.ENAMETOOLONG, errno.ELOOP}
_RESOURCE_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "no space left on device")
_WIDTH_OF_FILES = 140

OutputFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `build` wrote.", show_default=False)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write JSON to the standard output, all else to the error stream.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on a CPU, the stored one on a GPU.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …, or auto: a GPU if there is one.")]
Quantize = Annotated[
    str | None, typer.Option(help="Load the backbone in nf4, fp4 or int8 (needs bitsandbytes).", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at once.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as they are, without the tokenizer's chat template.")]


class GuardedGroup(TyperGroup):
    """Turns errors that a user can mend into a message and an exit code, without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_todays_option(argument) for argument in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as fault:
            code = exit_code(fault)
            if code is None:
                raise
            say(f"error: {explain(fault)}")
            raise typer.Exit(code) from fault


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
    if isinstance(fault, OSError) and fault.errno in _PATH_ERRNOS:
        return BAD_INPUT
    if isinstance(fault, (MediatorError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
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
    while current is not None:
        yield current
        current = current.__cause__


def say(text: str) -> None:
    """One message on the error stream, as it is."""
    print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """For results. Wide where the output is no terminal, so that nothing of a table is cut off in a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def print_json(content: Any) -> None:
    """One JSON document on the standard output."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def parse_pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """``["math=a.jsonl", …]`` as a dict.

    Raises:
        typer.BadParameter: no ``=``, nothing on one side of it, or a name that comes twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and name and path):
            raise typer.BadParameter(f"{value!r} is not NAME=PATH.", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"the name {name!r} comes twice.", param_hint=option)
        pairs[name] = path
    return pairs


def load(path: Path, dtype: str, device: str, quantize: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of an output folder, ready to generate.

    Raises:
        MediatorError: the folder holds no adapter, or a damaged one; there is no tokenizer.
        typer.BadParameter: the dtype, the device or the quantisation is unknown.
    """
    from ..tuner.loading import load_mediator

    quiet_transformers()
    place = pick_device(device)
    kind = _dtype(dtype, place.type)
    say(f"loading {path}")
    how = {} if quantize is None else {"quantization_config": _quantization(quantize, kind), "device_map": place}
    model, tokenizer = load_mediator(path, dtype=kind, **how)
    if tokenizer is None:
        raise MissingTokenizerError(
            f"the backbone of {str(path)!r} has no tokenizer files. Save the base model's tokenizer there: "
            "tokenizer.save_pretrained(folder)."
        )
    return (model.to(place) if quantize is None else model), tokenizer


def pick_device(name: str) -> Any:
    """A device of torch by name; ``auto`` is a GPU if there is one.

    Raises:
        typer.BadParameter: it is unknown, or not there.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        place = torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is no device. Take cpu, cuda or auto.", param_hint="--device") from None
    if place.type == "cuda" and not has_gpu:
        raise typer.BadParameter("there is no GPU that torch can use here.", param_hint="--device")
    return place


class MissingTokenizerError(MediatorError, ValueError):
    """Prompts cannot be read, for the tokenizer is missing."""


def _dtype(name: str, device_type: str) -> Any:
    import torch

    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        # Many processors multiply bfloat16 several times slower than float32.
        return torch.float32 if device_type == "cpu" else "auto"
    if name not in choices:
        raise typer.BadParameter(unknown_name(name, [*choices, "auto"], "dtype"), param_hint="--dtype")
    return choices[name]


def _quantization(name: str, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    from ..methods.rounding import ROUNDINGS

    if name not in ROUNDINGS:
        raise typer.BadParameter(unknown_name(name, ROUNDINGS, "quantisation"), param_hint="--quantize")
    bitsandbytes_functional("--quantize")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    computes_in = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=computes_in)


def quiet_transformers() -> None:
    """Keep transformers' own bars and hints out of the way; errors still come through."""
    if "transformers" not in sys.modules:  # not all commands need it, and importing it takes a second
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
