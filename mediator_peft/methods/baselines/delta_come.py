"""Delta-CoMe: singular vectors of a delta, the larger ones in more bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..merging.row import TensorContext
from .row import Baseline, Bits, is_linear, whole_numbers

BANDS = ((2, 8), (32, 3))
"""(singular vectors, bits) from the largest on; the rest has 2 bits."""

REST_BITS = 2
GROUP = 128
"""Entries of a singular vector that share one scale."""

# Shares of the largest magnitude at which a group is clipped: the one with the smallest square error is taken.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def bands(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(singular vectors, bits) of a matrix: as many as one bit an entry has room for.

    Delta-CoMe (NeurIPS 2024) takes 2 at 8 bits, 32 at 3 bits and 968 (attention) or 1,428 (MLP) at 2 bits for
    7 B models, which is one bit an entry; the number of the last ones follows from that here. Scales are not counted,
    as in the paper.

    Args:
        shape: (O, I)
    """
    left, room = shape[0] * shape[1] / (shape[0] + shape[1]), min(shape)
    for count, width in (*BANDS, (room, REST_BITS)):
        taken = max(0, min(count, room, int(left // width)))
        if taken:
            yield taken, width
        left, room = left - taken * width, room - taken


def rounded(columns: Tensor, width: int) -> Tensor:
    """Columns rounded to ``2 ** width`` evenly spaced levels around zero, one scale a group of 128 entries.

    The authors round by GPTQ with calibration texts. Here each group is rounded to the nearest level, with the clipping
    of the smallest square error (our choice): no data is needed.

    Args:
        columns: (N, r)
        width: bits.
    """
    groups = columns.T.split(GROUP, dim=1)
    return torch.cat([_rounded_group(group, width) for group in groups], dim=1).T


def _rounded_group(rows: Tensor, width: int) -> Tensor:
    highest = rows.abs().amax(dim=1, keepdim=True)
    best, smallest = torch.zeros_like(rows), torch.full_like(highest, torch.inf)
    for clip in _CLIPS:
        # 2 ** width levels at odd multiples of half a step.
        step = (2 * clip * highest / (2**width - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
        levels = ((rows / step - 0.5).round().clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1) + 0.5) * step
        error = (levels - rows).square().sum(dim=1, keepdim=True)
        best, smallest = torch.where(error < smallest, levels, best), torch.minimum(error, smallest)
    return torch.where(highest > 0, best, 0.0)


def restore(task_vectors: Tensor, number: int, context: TensorContext, survey: None) -> Tensor:
    r"""Rounded :math:`U \sqrt S` times rounded :math:`\sqrt S V^T` for linear layers, all else as it is.

    Returns:
        (*shape)
    """
    delta = task_vectors[number]
    if not is_linear(context):
        return delta.clone()
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    root = sizes.sqrt()
    left, right = left * root, right.T * root
    found, start = torch.zeros_like(delta), 0
    for count, width in bands((delta.shape[0], delta.shape[1])):
        chosen = slice(start, start + count)
        found += rounded(left[:, chosen], width) @ rounded(right[:, chosen], width).T
        start += count
    return found


def bits(context: TensorContext, num_experts: int) -> Bits:
    """About one an entry of linear layers; 16 an entry of all else (embeddings, norms)."""
    if not is_linear(context):
        return whole_numbers(context)
    rows, columns = context.stored_shape
    return Bits(0.0, float(sum(count * width for count, width in bands((rows, columns))) * (rows + columns)))


DELTA_COME = Baseline(
    restore,
    bits,
    paper="Delta-CoMe, arXiv 2406.08903",
    text="singular vectors in 8, 3 and 2 bits for each matrix of a block; everything else in 16 bits",
)
