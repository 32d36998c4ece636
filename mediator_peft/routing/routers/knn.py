"""Nearest neighbours among the calibration texts: no training, and no assumption about the shape of a task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import AdapterError
from .base import Router

_MOST_NEIGHBOURS = 15
_SHARE_OF_SMALLEST = 0.1
_SHARPNESS = 20.0
"""A neighbour whose cosine is a twentieth smaller than the nearest one's has 1 / e of its vote."""


class KnnRouter(Router):
    r"""Votes of the nearest calibration texts by cosine, after standardising every feature.

    .. math:: s_k(z) = \log\Bigl(\frac{\sum_{i \in N_n(z)} v_i [y_i = k]}{\sum_{i \in N_n(z)} v_i} + \frac1N\Bigr),
        \qquad v_i = e^{20 (c_i - \max_j c_j)}

    Auto-Switch's training-free retrieval (https://arxiv.org/abs/2412.00054). Votes fall off with the cosine
    :math:`c_i`, so that two experts rarely have the same score; and :math:`n` is the largest odd number up to a tenth
    of the smallest expert's texts, at most 15 (our choices). All texts are stored, augmented copies as well:
    2.3 kB each with 576 features.
    """

    uses_hard_negatives = False
    references: Tensor
    reference_labels: Tensor
    background: Tensor
    centre: Tensor
    scale: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h = self.num_features
        rows, others = (
            -1 if getattr(self, name, None) is None else len(getattr(self, name))
            for name in ("references", "background")
        )
        return {
            "references": (rows, h),
            "reference_labels": (rows,),
            "background": (others, h),
            "centre": (h,),
            "scale": (h,),
        }

    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        rows = features.double()
        means = torch.stack([rows[labels == label].mean(dim=0) for label in range(self.num_experts)])
        centre = means.mean(dim=0) if self.num_experts > 1 else torch.zeros_like(means[0])
        spread = torch.stack([(rows[labels == k] - centre).square().mean(dim=0) for k in range(self.num_experts)])
        scale = spread.mean(dim=0).sqrt()
        self._set("centre", centre.float())
        self._set("scale", scale.clamp(min=max(1e-12, 1e-6 * float(scale.max()))).float())
        self._set("references", self._standard(features))
        self._set("reference_labels", labels.to(features.device).float())
        none = features.new_zeros((0, self.num_features))
        self._set("background", none if background is None else self._standard(background.to(features.device)))

    def add_class(self, features: Tensor, hard_negatives: Tensor | None = None) -> None:
        new = self._standard(features.to(self.centre.device))
        labels = torch.full_like(new[:, 0], float(self.num_experts))
        self.num_experts += 1
        self._set("references", torch.cat([self.references, new]))
        self._set("reference_labels", torch.cat([self.reference_labels, labels]))

    def remove_class(self, number: int) -> None:
        stay = self.reference_labels != number
        labels = self.reference_labels[stay]
        self.num_experts -= 1
        self._set("references", self.references[stay])
        self._set("reference_labels", labels - (labels > number).float())

    def load_flat(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The number of texts is that of the file, whatever was fitted before.
        for name in ("references", "background"):
            self._buffers.pop(name, None)
        return super().load_flat(stored)

    def check_known(self) -> None:
        super().check_known()
        self._check_references()

    def _check_references(self) -> None:
        labels = self.reference_labels
        if len(labels) != len(self.references) or set(labels.tolist()) != set(range(self.num_experts)):
            raise AdapterError(
                "the router's stored texts and their experts do not fit together: the adapter is damaged."
            )

    @property
    def num_neighbours(self) -> int:
        """How many texts vote."""
        smallest = int(torch.bincount(self.reference_labels.long(), minlength=self.num_experts).min())
        count = min(_MOST_NEIGHBOURS, int(_SHARE_OF_SMALLEST * smallest))
        return max(1, count - (count + 1) % 2)

    def _standard(self, features: Tensor) -> Tensor:
        return F.normalize((features.float() - self.centre) / self.scale, dim=1)

    def scores(self, features: Tensor) -> Tensor:
        cosines, places = (self._standard(features) @ self.references.T).topk(self.num_neighbours, dim=1)
        votes = (_SHARPNESS * (cosines - cosines[:, :1])).exp()
        shares = votes.new_zeros((len(votes), self.num_experts))
        shares = shares.scatter_add(1, self.reference_labels.long()[places], votes / votes.sum(dim=1, keepdim=True))
        return (shares + 1 / len(self.references)).log()

    def distance(self, features: Tensor) -> Tensor:
        """Logarithm of one minus the cosine to the last neighbour that votes (deep nearest neighbours, Sun et al. 2022,
        https://arxiv.org/abs/2204.06507)."""
        return _to_neighbour(self._standard(features), self.references, self.num_neighbours)

    @staticmethod
    def times_usual(distance: Tensor, usual: Tensor) -> Tensor:
        """Ratio of two cosine distances, from their logarithms."""
        return (distance - usual).exp()

    def background_log_odds(self, features: Tensor) -> Tensor:
        if not len(self.background):
            return self.distance(features)
        count = min(self.num_neighbours, len(self.background))
        return self.distance(features) - _to_neighbour(self._standard(features), self.background, count)


def _to_neighbour(rows: Tensor, others: Tensor, number: int) -> Tensor:
    """(B,) log of one minus the cosine to the nearest row but ``number - 1``."""
    cosine = (rows @ others.T).topk(number, dim=1).values[:, -1]
    return (1 - cosine).clamp(min=1e-6).log()
