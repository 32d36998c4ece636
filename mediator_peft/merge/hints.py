"""What is unusual about an expert, as hints for a person: no proof of anything, and its absence proves nothing.

A backdoor that was trained into an expert often moves the rows of few trigger tokens much further than other rows, or
puts much of a task vector into one direction. So does much honest training (new chat tokens, LoRA). Averaging dilutes
what one expert does; routing a prompt to it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..kernels.build_loops import rounded
from ..methods.sparsifying.selection import Floats
from ..storage import FloatType, widened
from .compatibility import Job
from .distance import sampled_differences

UNUSUAL_ROW = 30.0
"""Robust z-score from which on an embedding row is listed. See docs/building.md for what fine-tunes have."""

UNUSUAL_RATIO = 4.0
"""An expert is listed whose task vector is so many times larger than the median expert's, or so many times more of
which lies in one direction."""

_MOST_BYTES = 1 << 30
"""Embeddings that take more in float32 are not read for a plan."""

_FEWEST_EXPERTS = 3
_FEWEST_ROWS = 16
_CHUNK = 4096
_LISTED = 5


def hints(job: Job) -> list[str]:
    """Sentences about embedding rows and outlying experts; empty where nothing is unusual."""
    return [*_row_hints(job), *_expert_hints(job)]


def robust_scores(values: Floats) -> Floats:
    r"""How far each value lies above the median, in robust standard deviations.

    .. math:: z_i = 0.6745\, (x_i - \operatorname{median} x) / \operatorname{MAD} x

    Iglewicz and Hoaglin (1993).

    Args:
        values: (N,) float32

    Returns:
        (N,); zeros where more than half of all values are equal.
    """
    apart = values - _median(values)
    spread = _median(np.abs(apart))
    return np.float32(0.6745) * apart / spread if spread > 0 else np.zeros_like(apart)


def _median(values: Floats) -> np.float32:
    """The middle value; of an even number the smaller of both."""
    middle: np.float32 = np.sort(values)[(len(values) - 1) // 2]
    return middle


def unusual_rows(norms: Floats) -> list[tuple[int, float]]:
    """(row, z-score) of rows of a difference that moved much further than most that moved, the furthest first.

    Args:
        norms: (N,) norm of each row of the difference. Rows that did not move are not counted.
    """
    moved = np.flatnonzero(norms > 0)
    if len(moved) < _FEWEST_ROWS:
        return []
    scores = robust_scores(norms[moved])
    order = np.argsort(-scores, kind="stable")
    return [(int(moved[place]), float(scores[place])) for place in order.tolist() if scores[place] >= UNUSUAL_ROW]


def _row_hints(job: Job) -> Iterator[str]:
    for layer in job.structure.outer[:1]:
        name = f"{layer.name}.weight"
        shape = job.base.tensors[name].shape
        if shape[0] * shape[1] * 4 > _MOST_BYTES:
            continue
        for expert in job.experts.values():
            found = unusual_rows(_row_norms(job.base, expert, name, job.dtype))
            if found:
                listed = ", ".join(f"{row} (z {score:.0f})" for row, score in found[:_LISTED])
                more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
                yield (
                    f"{expert.label}: {len(found)} rows of {layer.name} moved unusually far, those of tokens {listed}"
                    f"{more}. New or special tokens do; so can a trigger of a backdoor. Look at what these tokens are"
                )


def _row_norms(base: Checkpoint, expert: Checkpoint, name: str, kind: FloatType) -> Floats:
    """Norm of each row of the difference, both rounded to one dtype: (N,) float32."""
    rows, norms = base.tensors[name].shape[0], []
    for start in range(0, rows, _CHUNK):
        stop = min(rows, start + _CHUNK)
        ours, theirs = (
            widened(rounded(checkpoint.read_rows(name, start, stop), kind)) for checkpoint in (base, expert)
        )
        norms.append(np.linalg.norm(theirs - ours, axis=1))
    return np.concatenate(norms)


def _expert_hints(job: Job) -> Iterator[str]:
    if len(job.experts) < _FEWEST_EXPERTS:
        return
    sizes: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name, differences in sampled_differences(job).items():
        energy = sum(float(np.square(rows).sum()) for rows in differences)
        if energy > 0:
            top = sum(float(np.linalg.norm(rows, 2)) ** 2 for rows in differences)
            sizes[name], shares[name] = energy**0.5, top / energy
    for values, what in (
        (sizes, "its task vector is {ratio:.1f} times as large as the median expert's"),
        (shares, "{value:.0%} of its task vector lies in one direction of each matrix, {ratio:.1f} times the median"),
    ):
        middle = median(values.values()) if len(values) >= _FEWEST_EXPERTS else float("inf")
        for name, value in values.items():
            if value >= UNUSUAL_RATIO * middle:
                said = what.format(value=value, ratio=value / middle)
                yield f"{job.experts[name].label} is unlike the others: {said} (by a sample). Check where it comes from"
