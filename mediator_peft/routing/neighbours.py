"""Whether a prompt is closer to an expert's texts than to any background prompt, by the nearest of each.

A linear detector sees the mean of many families at once; the nearest neighbour sees each prompt alone. Distances are
cosines in the basis of wordings (deep nearest neighbours, Sun et al. 2022, https://arxiv.org/abs/2204.06507), here of
both sides. Measured in ``docs/routing.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_DIRECTIONS = 256
BACKGROUND = -1


class Neighbours(NamedTuple):
    """Stored texts and background prompts, as unit vectors of a subspace."""

    centre: Tensor
    """(H,) mean of the background prompts."""

    projection: Tensor
    """(H, R) from centred features to the principal directions of the background in the basis."""

    rows: Tensor
    """(N, R) of unit length."""

    labels: Tensor
    """(N,) number of each row's expert, ``BACKGROUND`` for background prompts."""

    def inside(self, features: Tensor) -> Tensor:
        """(B, H) → (B, R) of unit length."""
        return F.normalize((features.float() - self.centre) @ self.projection, dim=1)

    def closeness(self, features: Tensor, nearest: Tensor) -> Tensor:
        """(B,) cosine to the closest text of an expert, minus that to the closest background prompt.

        Args:
            features: (B, H)
            nearest: (B,) number of the best-scored expert.
        """
        cosines = self.inside(features) @ self.rows.T
        own = self.labels.unsqueeze(0) == nearest.unsqueeze(1)
        other = (self.labels == BACKGROUND).unsqueeze(0)
        lowest = torch.full_like(cosines, -1.0)
        return torch.where(own, cosines, lowest).amax(dim=1) - torch.where(other, cosines, lowest).amax(dim=1)

    def with_expert(self, features: Tensor, number: int) -> Neighbours:
        """With an expert's (N, H) texts as well."""
        rows = self.inside(features.to(self.rows.device))
        labels = torch.full_like(rows[:, 0], float(number)).to(self.labels)
        return self._replace(rows=torch.cat([self.rows, rows]), labels=torch.cat([self.labels, labels]))

    def without_expert(self, number: int) -> Neighbours:
        """Without one expert's texts; later experts move up."""
        stay = self.labels != number
        labels = self.labels[stay]
        return self._replace(rows=self.rows[stay], labels=labels - (labels > number).to(labels))


def fit_neighbours(features: Tensor, labels: Tensor, background: Tensor, basis: Tensor) -> Neighbours:
    """Store texts and background prompts.

    Args:
        features: (N, H) of the experts' texts.
        labels: (N,)
        background: (M, H)
        basis: (H, H) of :func:`~mediator_peft.routing.wording.wording_basis`.
    """
    centre = background.double().cpu().mean(dim=0)
    wide = basis.double().cpu()
    inside = (background.double().cpu() - centre) @ wide
    directions = _principal_directions(inside)
    empty = Neighbours(centre.float(), (wide @ directions).float(), torch.zeros(0), torch.zeros(0))
    rows = torch.cat([features.float().cpu(), background.float().cpu()])
    marks = torch.cat([labels.cpu().float(), torch.full((len(background),), float(BACKGROUND))])
    return empty._replace(rows=empty.inside(rows), labels=marks)


def _principal_directions(rows: Tensor) -> Tensor:
    """(H, R) orthonormal; by the smaller one of covariance (H, H) and Gram matrix (M, M) of the (M, H) rows."""
    by_gram = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if by_gram else rows.T @ rows)
    values, vectors = values.flip(0)[:MOST_DIRECTIONS], vectors.flip(1)[:, :MOST_DIRECTIONS]
    useful = values > 1e-10 * values[0].clamp(min=1e-12)
    vectors, values = vectors[:, useful], values[useful]
    return rows.T @ (vectors * values.clamp(min=1e-12).rsqrt()) if by_gram else vectors
