"""Nearest class mean by cosine, from a handful of texts per expert and without any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Router

_SHARPNESS = 10.0
"""Cosines differ by tenths: ten times a cosine is a log-probability of useful size. The temperature does the rest."""


class PrototypeRouter(Router):
    r"""Cosine to each expert's mean, after standardising every feature over all calibration texts.

    .. math:: s_k(z) = 10 \cos(\tilde z, \tilde\mu_k), \qquad \tilde z = (z - c) / d

    Snell et al., Prototypical Networks (https://arxiv.org/abs/1703.05175), with a cosine in place of a learnt distance.
    With ``c`` the mean of the class means and ``d`` the root mean square of the features around it.
    """

    trainable = ("prototypes",)
    uses_hard_negatives = False
    prototypes: Tensor
    centre: Tensor
    scale: Tensor
    background: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, h = self.num_experts, self.num_features
        return {"prototypes": (k, h), "centre": (h,), "scale": (h,), "background": (h,)}

    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        features = features.double()
        means = torch.stack([features[labels == label].mean(dim=0) for label in range(self.num_experts)])
        centre = means.mean(dim=0)
        if self.num_experts == 1:  # around its own mean one class has no direction
            centre = torch.zeros_like(centre)
        spread = torch.stack(
            [(features[labels == label] - centre).square().mean(dim=0) for label in range(self.num_experts)]
        )
        scale = spread.mean(dim=0).sqrt()
        scale = scale.clamp(min=max(1e-12, 1e-6 * float(scale.max())))
        self._set("prototypes", F.normalize((means - centre) / scale, dim=1).float())
        self._set("centre", centre.float())
        self._set("scale", scale.float())
        # A background of zeros is none: no mean of real prompts is the centre itself.
        ordinary = torch.zeros_like(centre)
        if background is not None:
            ordinary = F.normalize((background.double().mean(dim=0) - centre) / scale, dim=0)
        self._set("background", ordinary.float())

    def add_class(self, features: Tensor, hard_negatives: Tensor | None = None) -> None:
        mean = features.float().mean(dim=0, keepdim=True).to(self.centre.device)
        self.num_experts += 1
        new = F.normalize((mean - self.centre) / self.scale, dim=1)
        self._set("prototypes", torch.cat([self.prototypes, new]))

    def remove_class(self, number: int) -> None:
        stay = [row for row in range(self.num_experts) if row != number]
        self.num_experts -= 1
        self._set("prototypes", self.prototypes[stay])

    def _standard(self, features: Tensor) -> Tensor:
        return F.normalize((features.float() - self.centre) / self.scale, dim=1)

    def scores(self, features: Tensor) -> Tensor:
        return _SHARPNESS * self._standard(features) @ F.normalize(self.prototypes, dim=1).T

    def distance(self, features: Tensor) -> Tensor:
        """One minus the largest cosine."""
        return 1 - self.scores(features).amax(dim=1) / _SHARPNESS

    @staticmethod
    def times_usual(distance: Tensor, usual: Tensor) -> Tensor:
        """Ratio of two cosine distances."""
        return distance / usual.clamp(min=1e-6)

    def background_log_odds(self, features: Tensor) -> Tensor:
        if not self.background.any():
            return self.distance(features)
        return self._standard(features) @ self.background - self.scores(features).amax(dim=1) / _SHARPNESS
