"""Weighted sum of task vectors, with coefficients from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from ...data_files import DataFileError, MalformedJsonError, parse_json, read_text
from ...deferred import torch
from ...errors import ConfigError
from ...tables import unknown_name
from .row import MergeMethod, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


COEFFICIENTS_VERSION = 1
_KEYS = ("coefficients_version", "experts", "blocks", "tensors", "about")
_LISTED = 8
_MOST_FAULTS = 20
_COUNTED = 1000


@dataclass(frozen=True)
class Coefficients:
    """The content of a ``coefficients.json``, checked for one model."""

    of_tensor: Mapping[str, tuple[tuple[float, ...], ...]]
    """Tensor name → expert, in the order of the task vectors → chunk of rows → number."""


def weighted(task_vectors: Tensor, context: TensorContext) -> Tensor:
    r"""Weighted sum of the task vectors, :math:`\sum_k c_{k,r} \tau_{k,r}`, coefficients by tensor and chunk of rows.

    Layer-wise task arithmetic, AdaMerging, Expert Merging, Frank-Wolfe, MAP and evolutionary searches end in this form;
    the file says which coefficients. With n numbers for an expert, chunk i holds the output rows from
    i * ceil(O / n) on, as ``torch.chunk`` divides them.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: with :class:`Coefficients` as its data.

    Returns:
        (r, I)
    """
    merged = torch.zeros_like(task_vectors[0])
    num_rows = _num_rows(context)
    places = torch.arange(context.start, context.start + len(merged))
    for vector, numbers in zip(task_vectors, context.data.of_tensor[context.name], strict=True):
        chunk = math.ceil(num_rows / len(numbers))
        merged += torch.tensor(numbers, dtype=torch.float32)[places // chunk][:, None] * vector
    return merged


def read_coefficients(path: Path, contexts: Mapping[str, TensorContext]) -> Coefficients:
    """Read a ``coefficients.json`` and check it against a model.

    A JSON object. ``coefficients_version`` is 1. ``experts`` (expert → number) holds for every tensor that nothing else
    names, ``blocks`` (number of a block → expert → number) for the tensors of a block, ``tensors`` (tensor → expert →
    number, or list of numbers for chunks of output rows) for one tensor and before all. Each names every expert.
    ``about`` may hold anything.

    Args:
        path: of the file.
        contexts: tensor name → context, of all tensors that are merged.

    Raises:
        ConfigError: it cannot be read; a name is unknown, a tensor or an expert is missing, a number is not finite. All
            the first faults are listed.
    """
    try:
        content = parse_json(read_text(path), unique_names=True)
    except (DataFileError, MalformedJsonError) as fault:
        raise ConfigError(f"coefficients {str(path)!r} cannot be read: {fault}") from fault
    experts = next(iter(contexts.values())).experts
    found_faults = _faults(content, contexts, experts)
    faults = list(islice(found_faults, _MOST_FAULTS))
    if faults:
        num_more = sum(1 for _ in islice(found_faults, _COUNTED))
        more = f"\nand {num_more}{' or' if num_more == _COUNTED else ''} more" if num_more else ""
        raise ConfigError(f"coefficients {str(path)!r}:\n- " + "\n- ".join(faults) + more)
    default, blocks, tensors = (content.get(key) or {} for key in ("experts", "blocks", "tensors"))
    found = {}
    for name, context in contexts.items():
        numbers = tensors.get(name) or blocks.get(str(context.block)) or default
        found[name] = tuple(_chunks(numbers[expert]) for expert in experts)
    return Coefficients(found)


def _chunks(numbers: Any) -> tuple[float, ...]:
    return tuple(float(number) for number in (numbers if isinstance(numbers, list) else [numbers]))


def _faults(content: Any, contexts: Mapping[str, TensorContext], experts: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(content, dict):
        yield "it is no JSON object with 'experts', 'blocks' or 'tensors'"
        return
    yield from (unknown_name(key, _KEYS, "key") for key in content if key not in _KEYS)
    version = content.get("coefficients_version")
    if isinstance(version, bool) or version != COEFFICIENTS_VERSION:
        yield f"coefficients_version is {shortened(version)}, this mediator_peft reads {COEFFICIENTS_VERSION}"
    default, blocks, tensors = (content.get(key, {}) for key in ("experts", "blocks", "tensors"))
    for key, table in (("experts", default), ("blocks", blocks), ("tensors", tensors)):
        if not isinstance(table, dict):
            yield f"{key!r} must be an object, got {shortened(table)}"
            return
    if default:
        yield from _entry_faults("experts", default, experts, 1)
    known = {str(context.block) for context in contexts.values() if context.block is not None}
    for block, entry in blocks.items():
        if block not in known:
            yield f"block {block!r} is not in this model, whose blocks are 0 to {len(known) - 1}"
        yield from _entry_faults(f"block {block}", entry, experts, 1)
    for name, entry in tensors.items():
        if name not in contexts:
            yield unknown_name(name, contexts, "tensor") if len(contexts) < 100 else f"unknown tensor {name!r}"
        else:
            yield from _entry_faults(name, entry, experts, _num_rows(contexts[name]))
    if not default:
        missing = [name for name, its in contexts.items() if name not in tensors and str(its.block) not in blocks]
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            yield f"no coefficients, and no 'experts' for all others: {', '.join(missing[:_LISTED])}{more}"


def _entry_faults(where: str, entry: Any, experts: tuple[str, ...], most_chunks: int) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{where} must give a number for each expert, got {shortened(entry)}"
        return
    yield from (unknown_name(name, experts, f"expert of {where}") for name in entry if name not in experts)
    for expert in experts:
        if expert not in entry:
            yield f"{where} has no number for expert {expert!r}"
            continue
        numbers = entry[expert] if isinstance(entry[expert], list) else [entry[expert]]
        if not all(_is_finite(number) for number in numbers):
            yield f"{where}, expert {expert!r}: {shortened(entry[expert])} is no finite number"
        elif not 1 <= len(numbers) <= most_chunks:
            yield f"{where}, expert {expert!r}: {len(numbers)} chunks, it can have 1 to {most_chunks}"


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e30


def _num_rows(context: TensorContext) -> int:
    shape = context.stored_shape
    return (shape[-1] if context.is_transposed else shape[0]) if shape else 1


WEIGHTED = MergeMethod(
    weighted,
    is_entrywise=True,
    takes_context=True,
    is_oriented=True,
    open_data=read_coefficients,
    needs_data=True,
    paper="layer-wise task arithmetic, e.g. AdaMerging, arXiv 2310.02575",
    data="coefficients.json",
    good_for="coefficients from a search or from validation scores, by expert, block, tensor or chunk of rows",
)
