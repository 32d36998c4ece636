"""How far experts lie from their base: what was never fine-tuned from it is noticed before the work."""

from __future__ import annotations

from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointMismatchError
from ..kernels.build_loops import rounded
from ..storage import FLOAT64
from .compatibility import Job

UNUSUAL = 0.5
"""Distance from which on a build warns. Fine-tunes lie at 0.005 to 0.05, long further training at up to about 0.3; at
0.5 a fifth of an expert's squared norm is not the base's."""

UNUSUAL_MATRIX = 1.0
"""Distance of a single matrix from which on a build warns, where the expert as a whole is near enough."""

UNRELATED_COSINE = 0.1
"""Cosine of expert and base below which a build is refused. Weights that were drawn or trained apart have 0, within
0.01 for the samples taken here, and thus a distance of sqrt(2) at equal norms; an expert that went as far as five times
the base's own norm still has 0.2."""

ABSURD = 10.0
"""Distance from which on a build is refused whatever the cosine: the base is a rounding error in such an expert."""

_MATRICES, _GROUPS, _GROUP_ROWS = 24, 8, 4


class Distance(NamedTuple):
    """One expert against the base, over sampled rows of the matrices of the blocks."""

    relative: float
    """Norm of the task vector over norm of the base."""

    cosine: float
    """Of the expert's weights and the base's."""

    furthest: float
    """The largest relative distance of one matrix."""

    matrix: str
    """Which one."""


def distances(job: Job) -> dict[str, Distance]:
    r"""Distance of every expert, from a few rows of up to 24 matrices, evenly spread over the model.

    .. math:: d_t = \lVert \theta_t - \theta_0 \rVert / \lVert \theta_0 \rVert,
        \quad c_t = \langle \theta_t, \theta_0 \rangle / (\lVert \theta_t \rVert \lVert \theta_0 \rVert)

    Our choice. Experts whose samples hold NaN or infinity are left out; the build refuses these by name.

    Returns:
        Expert name → distance.
    """
    base = _samples(job, job.base)
    found = {}
    for label, expert in job.experts.items():
        own, shared, inner, apart = 0.0, 0.0, 0.0, 0.0
        furthest = (0.0, "")
        for name, ours in base.items():
            theirs = _sample(expert, name)
            furthest = max(furthest, (_relative(ours, theirs), name))
            own += float(np.square(theirs).sum())
            shared += float(np.square(ours).sum())
            inner += float((theirs * ours).sum())
            apart += float(np.square(theirs - ours).sum())
        if not all(isfinite(number) for number in (own, shared, inner, apart)) or not own:
            continue
        relative = sqrt(apart / shared) if shared else float("inf")
        found[label] = Distance(relative, inner / sqrt(own * shared) if shared else 0.0, *furthest)
    return found


def sampled_differences(job: Job) -> dict[str, list[NDArray[np.float64]]]:
    """Expert name → rows of its task vector, (n, I) float64 a matrix: those that :func:`distances` looks at."""
    base = _samples(job, job.base)
    return {
        label: [_sample(expert, name) - ours for name, ours in base.items()] for label, expert in job.experts.items()
    }


def sampled_norms(job: Job, reference: Checkpoint, checkpoint: Checkpoint) -> float:
    """Norm of the difference of two checkpoints over the rows that :func:`distances` looks at."""
    ours = _samples(job, reference)
    return sqrt(sum(float(np.square(_sample(checkpoint, name) - rows).sum()) for name, rows in ours.items()))


def check_distances(job: Job, allow_distant: bool = False) -> list[str]:
    """Warn of experts that lie far from the base, and refuse those that have nothing of it.

    Args:
        job: checkpoints of one shape.
        allow_distant: warn where it would refuse.

    Returns:
        Warnings.

    Raises:
        CheckpointMismatchError: an expert lies absurdly far; all such are listed.
    """
    warnings: list[str] = []
    faults: list[str] = []
    for name, (relative, cosine, furthest, matrix) in distances(job).items():
        is_absurd = relative >= ABSURD or cosine < UNRELATED_COSINE
        if relative < UNUSUAL and not is_absurd:
            if furthest >= UNUSUAL_MATRIX:
                warnings.append(
                    f"{job.experts[name].label} has a matrix that is hardly {job.base.label}'s: {matrix!r} differs by "
                    f"{furthest:.2f} times its norm, all matrices together by {relative:.2f} (by a sample)"
                )
            continue
        said = (
            f"{job.experts[name].label} lies far from {job.base.label}: the norm of its difference is {relative:.2f} "
            f"times that of the base, their cosine is {cosine:.2f} (by a sample; fine-tunes usually differ by 0.005 to "
            "0.05)"
        )
        (faults if is_absurd else warnings).append(said)
    if faults and not allow_distant:
        raise CheckpointMismatchError(
            "\n".join(faults)
            + "\nIt was hardly fine-tuned from this base. Give the right base, or build all the same with "
            "allow_distant=True (--allow-distant)."
        )
    return warnings + faults


def _samples(job: Job, checkpoint: Checkpoint) -> dict[str, NDArray[np.float64]]:
    """Matrix → some of its rows, for up to 24 matrices of the blocks."""
    known = set(job.names)
    names = [f"{layer.name}.weight" for layer in job.structure.layers if f"{layer.name}.weight" in known]
    return {name: _sample(checkpoint, name) for name in names[:: max(1, -(-len(names) // _MATRICES))]}


def _relative(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    norm = float(np.linalg.norm(ours))
    return float(np.linalg.norm(theirs - ours)) / norm if norm else 0.0


def _sample(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    rows = checkpoint.tensors[name].shape[0]
    groups = [(0, rows)]
    if rows > _GROUPS * _GROUP_ROWS:
        starts = [rows * number // _GROUPS for number in range(_GROUPS)]
        groups = [(start, start + _GROUP_ROWS) for start in starts]
    # What is read lies in a buffer that the next reading uses.
    return rounded(checkpoint.read_groups(name, groups), FLOAT64).copy()
