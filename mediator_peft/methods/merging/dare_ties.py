"""DARE, then TIES without trimming."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dare import DENSITY, DENSITY_PARAMETER, dropped_and_rescaled
from .row import MergeMethod, Parameter, TensorContext
from .summing import disjoint_mean

if TYPE_CHECKING:
    from torch import Tensor


def dare_ties(task_vectors: Tensor, context: TensorContext, density: float = DENSITY, scale: float = 1.0) -> Tensor:
    r"""Thin the task vectors at random, elect a sign for each entry, and average those that agree with it.

    *Language Models are Super Mario*, https://arxiv.org/abs/2311.03099, with the last two steps of *TIES-Merging*,
    https://arxiv.org/abs/2306.01708. Nothing is trimmed after the draw, as in PEFT and mergekit. Entries that were
    dropped do not count in the mean, so the result is larger than the mean: two agreeing entries a and b give
    (a + b)(1 - p / 2) on average.

    Args:
        task_vectors: (K, r, I) rows of a tensor.
        context: names them and says where they are, which decides the draw.
        density: p, in (0, 1]; the paper's drop rate is 1 - p.
        scale: λ, by which the result is multiplied.

    Returns:
        (r, I)
    """
    return disjoint_mean(dropped_and_rescaled(task_vectors, context, density)).mul_(scale)


DARE_TIES = MergeMethod(
    dare_ties,
    is_entrywise=True,
    takes_context=True,
    parameters={
        "density": DENSITY_PARAMETER,
        "scale": Parameter(1.0, "factor λ of the disjoint mean", "(0, inf)"),
    },
    needs_base=True,
    paper="DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708",
    data="none; draws by seed",
    good_for="as dare, where task vectors conflict in sign",
)
