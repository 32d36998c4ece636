"""How large the kept entries of a thinned delta are made, from a few sums over its rows.

Signs get one scale a row (``SIGN_SCALES``), numbers a factor (``NUMBER_SCALES``); both tables have the same keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class RowSums(NamedTuple):
    """What the rows of a delta come to, before and after thinning; (O,) each."""

    square: Vector
    """Sum of the squares of all entries."""

    kept_sum: Vector
    """Sum of the magnitudes of the kept entries."""

    num_kept: NDArray[np.int64]


def norm_scales(rows: RowSums) -> Vector:
    r"""Each row keeps its Euclidean norm.

    .. math:: s_r = \|\Delta_r\| / \sqrt{n_r}
    """
    return np.sqrt(rows.square / np.maximum(rows.num_kept, 1)) * (rows.num_kept > 0)


def mean_scales(rows: RowSums) -> Vector:
    """The mean magnitude of the kept entries: nearest to the delta in the sense of least squares."""
    return rows.kept_sum / np.maximum(rows.num_kept, 1)


def projection_scales(rows: RowSums) -> Vector:
    r"""As :func:`norm_scales`, times one factor a matrix, so that the projection on the whole delta is the delta.

    What signs and thinning add to the delta is nearly at right angles to it, and to most inputs. What they take from
    it must be made up for: with scales of equal norm, :math:`\langle S, \Delta \rangle` is a share (0.8 to 0.9) of
    :math:`\|\Delta\|^2`, and the expert acts that much weaker. The factor is one for the matrix, not for the row: a
    row of which a single entry was kept would get a huge scale.

    .. math::
        s_r = c \|\Delta_r\| / \sqrt{n_r}, \quad c = \|\Delta\|^2 / \langle S, \Delta \rangle \text{ for } c = 1

    Our choice; compare the rescaling of what random dropping keeps (DARE, https://arxiv.org/abs/2311.03099).
    """
    scales = norm_scales(rows)
    inner = float(scales @ rows.kept_sum)
    return scales * (float(rows.square.sum()) / inner) if inner > 0 else scales


SIGN_SCALES: dict[str, Callable[[RowSums], Vector]] = {
    "projection": projection_scales,
    "norm": norm_scales,
    "mean": mean_scales,
}


def projection_factors(square: Vector, kept_square: Vector) -> Vector:
    r"""One factor a matrix, so that the projection on the whole delta is the delta.

    .. math:: c = \|\Delta\|^2 / \|\text{kept}\|^2

    It makes up for what thinning takes away, as in :func:`projection_scales`. Where nothing but zeros was dropped it is
    exactly 1.
    """
    total, kept = float(square.sum()), float(kept_square.sum())
    return np.full_like(square, total / kept if kept > 0 else 1.0)


def norm_factors(square: Vector, kept_square: Vector) -> Vector:
    """Each row keeps its Euclidean norm."""
    return np.sqrt(square / np.where(kept_square > 0, kept_square, 1.0))


def unit_factors(square: Vector, kept_square: Vector) -> Vector:
    """Numbers as the sparsifier left them: nearest to the delta in the sense of least squares."""
    return np.ones_like(square)


NUMBER_SCALES: dict[str, Callable[[Vector, Vector], Vector]] = {
    "projection": projection_factors,
    "norm": norm_factors,
    "mean": unit_factors,
}
"""Sums of squares of each row, (O,) whole and (O,) kept → factor of each row (O,)."""
