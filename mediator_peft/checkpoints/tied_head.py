"""An ``lm_head`` of its own in a file whose configuration ties it to the embedding."""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from ..errors import UnsupportedError
from .checkpoint import Checkpoint
from .tensor_inventory import Outline, outline_of

_ROWS = 4096


def tied_sources(outline: Outline) -> dict[str, str]:
    """Name of the tied ``lm_head.weight`` → name of the embedding that it repeats; empty where nothing is tied."""
    head, outer = outline.structure.tied_head, outline.structure.outer
    return {f"{head}.weight": f"{outer[0].name}.weight"} if head is not None and outer else {}


def settle_heads(checkpoints: Iterable[Checkpoint], outline: Outline, may_untie: bool) -> list[str]:
    """Decide as transformers does on loading: a stored head that differs from the embedding is not tied.

    Where one checkpoint is untied, all are: the others get their embedding as their head, which is what they compute.
    A file with the head alone is one whose embedding has the other name.

    Args:
        checkpoints: base and whole experts, as their files are.
        outline: of the base.
        may_untie: whether the output may be untied.

    Returns:
        What was done, one message for each checkpoint with a head of its own; empty where all stay tied.

    Raises:
        UnsupportedError: heads differ from embeddings, and the output must stay tied.
    """
    checkpoints, notes = list(checkpoints), []
    for head, embedding in tied_sources(outline).items():
        for checkpoint in checkpoints:
            _name_embedding(checkpoint, head, embedding)
        own = [checkpoint for checkpoint in checkpoints if _has_own_head(checkpoint, head, embedding)]
        if own and not may_untie:
            raise UnsupportedError(
                f"{own[0].label} ({own[0].source}): its file has a {head} that differs from its {embedding}, though "
                "the base ties the two. A model in memory stays tied: use build_mediator(), which unties the output."
            )
        for checkpoint in checkpoints if own else ():
            _untie(checkpoint, head, embedding)
        notes += [
            f"{checkpoint.label} has a {head} of its own beside its embedding, to which the configuration ties it: the "
            "output is untied (tie_word_embeddings is false)"
            for checkpoint in own
        ]
    return notes


def supply_head(checkpoint: Checkpoint, wanted: Container[str]) -> None:
    """Give a tied checkpoint both names of its one matrix, as far as they are among the wanted tensors."""
    for head, embedding in tied_sources(outline_of(checkpoint)).items():
        _name_embedding(checkpoint, head, embedding)
        if head in wanted:
            _untie(checkpoint, head, embedding)


def _name_embedding(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    if head in checkpoint.tensors and embedding not in checkpoint.tensors:
        checkpoint.take_as(embedding, head)


def _untie(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    if head not in checkpoint.tensors and embedding in checkpoint.tensors and checkpoint.is_tied:
        checkpoint.take_as(head, embedding)
    checkpoint.set_untied()


def _has_own_head(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
        return False
    ours, theirs = checkpoint.tensors[head], checkpoint.tensors[embedding]
    if ours != theirs:
        return True
    if ours.dtype is None:
        return False
    for start in range(0, ours.shape[0], _ROWS):
        stop = min(start + _ROWS, ours.shape[0])
        rows = checkpoint.read_rows(head, start, stop).copy()
        if not np.array_equal(rows, checkpoint.read_rows(embedding, start, stop)):
            return True
    return False
