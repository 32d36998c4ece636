"""How commands load a model and put prompts to it: one declaration an option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data_files import DataFileError
from ..errors import MediatorError
from ..optional import bitsandbytes_functional
from ..tables import unknown_name
from .common import MOST_ROWS, check_output, quiet_transformers, reading_output, say

if TYPE_CHECKING:
    from ..evaluation.batching import PromptSettings
    from ..ranks import Ranks

Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on a CPU, the stored dtype on a GPU.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …, or auto: a GPU if there is one.")]
Quantize = Annotated[
    str | None, typer.Option(help="Load the backbone in nf4, fp4 or int8 (needs bitsandbytes).", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Prompts in one batch.")]
Raw = Annotated[bool, typer.Option("--raw", help="Use prompts without the tokenizer's chat template.")]


@dataclass(frozen=True)
class Loading:
    """Options of every command that loads a model."""

    dtype: Dtype = "auto"
    device: Device = "auto"

    def picked(self) -> tuple[Any, Any]:
        """Device and dtype of torch, the dtype perhaps ``"auto"``.

        Raises:
            typer.BadParameter: one is unknown, or not there.
        """
        place = pick_device(self.device)
        return place, pick_dtype(self.dtype, place.type)

    def how(self) -> tuple[Any, dict[str, Any]]:
        """Device, and keywords of :func:`load_mediator`; a ``device_map`` among them puts the model there.

        Raises:
            typer.BadParameter: as :meth:`picked`.
        """
        place, kind = self.picked()
        return place, {"dtype": kind}


@dataclass(frozen=True)
class ModelLoading(Loading):
    """Options of every command that loads a built model to answer or to fit its router."""

    quantize: Quantize = None

    def how(self) -> tuple[Any, dict[str, Any]]:
        """The same, with the quantisation.

        Raises:
            typer.BadParameter: device, dtype or quantisation is unknown, or not there.
        """
        place, how = super().how()
        if self.quantize is not None:
            how |= {"quantization_config": _quantization(self.quantize, how["dtype"]), "device_map": place}
        return place, how


@dataclass(frozen=True)
class Prompting:
    """Options of every command that puts prompts to a model."""

    raw: Raw = False
    batch_size: BatchSize = 16

    def settings(self, ranks: Ranks | None = None) -> PromptSettings:
        """The same, as the library takes it."""
        from ..evaluation.batching import PromptSettings

        return PromptSettings(self.batch_size, not self.raw, ranks)


LOADING, MODEL_LOADING, PROMPTING = Loading(), ModelLoading(), Prompting()
"""What is taken where nothing is said."""


def load(path: Path, loading: Loading) -> tuple[Any, Any]:
    """Model and tokenizer of an output folder, ready to generate.

    Raises:
        MediatorError: the folder holds no adapter, or a damaged one; there is no tokenizer, or an unusable one.
        typer.BadParameter: the dtype, the device or the quantisation is unknown.
    """
    from ..evaluation.prompts import check_template
    from ..tuner.loading import load_mediator

    quiet_transformers()
    place, how = loading.how()
    check_output(path)
    say(f"loading {path}")
    with reading_output(path):
        model, tokenizer = load_mediator(path, **how)
    if tokenizer is None:
        raise MissingTokenizerError(
            f"the backbone of {str(path)!r} has no tokenizer files, or damaged ones. Save the base model's tokenizer "
            "there: tokenizer.save_pretrained(folder)."
        )
    check_template(tokenizer)
    return (model if "device_map" in how else model.to(place)), tokenizer


def load_plain(path: Path, loading: Loading) -> tuple[Any, Any]:
    """Model and tokenizer of a plain checkpoint.

    Raises:
        DataFileError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    place, kind = loading.picked()
    say(f"loading {path}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
        return model.to(place), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as fault:
        raise DataFileError(f"the checkpoint {str(path)!r} cannot be loaded: {fault}") from fault


class MissingTokenizerError(MediatorError, ValueError):
    """Prompts cannot be read, for the tokenizer is missing."""


def pick_device(name: str) -> Any:
    """A device of torch by name; ``auto`` is a GPU if there is one.

    Raises:
        typer.BadParameter: it is unknown, or not there.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        place = torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
    except (RuntimeError, ValueError, OverflowError):
        raise typer.BadParameter(f"{name!r} is no device. Take cpu, cuda or auto.", param_hint="--device") from None
    if place.type == "cuda" and not has_gpu:
        raise typer.BadParameter("there is no GPU that torch can use here.", param_hint="--device")
    try:
        torch.ones(1, device=place).item()  # ``meta`` has no values
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as fault:
        reason = str(fault).strip().partition("\n")[0]
        raise typer.BadParameter(
            f"{name!r} cannot be computed on here ({reason}). Take cpu, cuda or auto.", param_hint="--device"
        ) from None
    return place


def pick_dtype(name: str, device_type: str) -> Any:
    """A dtype of torch by name, or ``"auto"``, which takes the stored one.

    Raises:
        typer.BadParameter: it is unknown.
    """
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

    from ..methods.rounding import ROUNDINGS
    from ..tuner.loading import bitsandbytes_settings

    if name not in ROUNDINGS:
        raise typer.BadParameter(unknown_name(name, ROUNDINGS, "quantisation"), param_hint="--quantize")
    bitsandbytes_functional("--quantize")
    return bitsandbytes_settings(name, torch.bfloat16 if dtype == "auto" else dtype)
