"""Class-conditional Gaussians with one shrunk covariance: linear discriminant analysis, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..hard_negatives import HARD_NEGATIVE_FORMS
from ..uncertainty import squared_mahalanobis
from .base import Router
from .moments import Moments

_LEAST_SHRINKAGE = 0.5
_TEXTS_A_FEATURE = 5
"""With more texts than so many a feature, the covariance is trusted more and more."""

_FEWEST_NEAR = 5
"""Background prompts that are needed near an expert for a mean of their own."""

_KINDS = 1 + len(HARD_NEGATIVE_FORMS)
"""Kinds of prompts that have a mean near each expert: background ones, and each way of hard negatives."""


class GaussianRouter(Router):
    r"""Posterior of K Gaussians with means :math:`\mu_k`, equal priors and one shrunk covariance.

    .. math:: s_k(z) = \mu_k^\top \Sigma^{-1} z - \tfrac12 \mu_k^\top \Sigma^{-1} \mu_k

    ``weight`` and ``bias`` hold these linear scores and are trainable; what is behind the OOD score is not. Ordinary
    prompts are further Gaussians of the same covariance: one for all of them, and for each expert one for those nearest
    to it and one for each way of other requests about its subjects, so that few prompts near its task can show where
    it ends. The covariance stays the experts' own: with the background prompts' part in it, known and unknown were told
    apart less well.
    """

    trainable = ("weight", "bias")
    weight: Tensor
    bias: Tensor
    means: Tensor
    whitening: Tensor
    background_means: Tensor
    has_background: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, h = self.num_experts, self.num_features
        shapes: dict[str, tuple[int, ...]] = {"weight": (k, h), "bias": (k,), "means": (k, h), "whitening": (h, h)}
        return {**shapes, "background_means": (_KINDS * k + 1, h), "has_background": (1,)}

    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        self.fit_batches([(features, labels)], background, hard_negatives)

    def fit_batches(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        background: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> None:
        """As :meth:`fit`, from (features, labels) batches that are seen once and not kept."""
        moments = Moments(self.num_experts, self.num_features)
        for features, labels in batches:
            moments.update(features, labels)
        num_samples = int(moments.counts.sum()) - self.num_experts
        covariance = moments.pooled_covariance()
        if self.basis is None:
            whitening = inverse_root(covariance, num_samples)
        else:
            basis = self.basis.double().cpu()
            whitening = basis @ inverse_root(basis.T @ covariance @ basis, num_samples)
        weight, bias = linear_scores(moments.means, whitening)
        self._set("weight", weight)
        self._set("bias", bias)
        self._set("means", moments.means.float())
        self._set("whitening", whitening.float())
        ordinary = torch.zeros(self.shapes()["background_means"])
        if background is not None:
            ordinary = self._ordinary_means(background.double().cpu(), hard_negatives)
        self._set("background_means", ordinary.float())
        self._set("has_background", torch.tensor([float(background is not None)]))

    def _ordinary_means(self, background: Tensor, hard_negatives: Tensor | None) -> Tensor:
        """Means (_KINDS * K + 1, H): of background prompts nearest to each expert, of each form of hard negatives, of
        all background prompts. The last stands in where there are too few."""
        everything = background.mean(dim=0, keepdim=True)
        ways = list(hard_negatives.double().cpu()) if hard_negatives is not None else []
        means = [self._means_by_nearest(some, everything) for some in (background, *ways)]
        missing = everything.repeat((_KINDS - len(means)) * self.num_experts, 1)
        return torch.cat([*means, missing, everything])

    def _means_by_nearest(self, features: Tensor, otherwise: Tensor) -> Tensor:
        nearest = self.scores(features.to(self.weight.device)).argmax(dim=1).cpu()
        groups = [features[nearest == expert] for expert in range(self.num_experts)]
        return torch.cat([g.mean(dim=0, keepdim=True) if len(g) >= _FEWEST_NEAR else otherwise for g in groups])

    def load_flat(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Earlier versions had a mean of all background prompts alone, then those nearest to each expert as well.
        kept = {name: value for name, value in stored.items() if name != "background_mean"}
        old = stored.get("background_mean", stored.get("background_means"))
        rows, size = self.shapes()["background_means"]
        if old is not None and old.numel() in (size, (self.num_experts + 1) * size):
            near, everything = old.reshape(-1, size)[:-1], old.reshape(-1, size)[-1:]
            kept["background_means"] = torch.cat([near, everything.repeat(rows - len(near), 1)]).flatten()
        return super().load_flat(kept)

    def add_class(self, features: Tensor, hard_negatives: Tensor | None = None) -> None:
        # The covariance stays as it was: it is what the other experts' held-out statistics were taken with.
        mean = features.double().mean(dim=0, keepdim=True).to(self.means.device)
        weight, bias = linear_scores(mean, self.whitening.double())
        kinds, everything = self._kinds_of_means()
        self.num_experts += 1
        self._set("weight", torch.cat([self.weight, weight]))
        self._set("bias", torch.cat([self.bias, bias]))
        self._set("means", torch.cat([self.means, mean.float()]))
        new = everything.repeat(_KINDS, 1)
        for way, some in enumerate(hard_negatives if hard_negatives is not None and self.has_background else ()):
            new[way + 1] = self._means_by_nearest(some.double().cpu(), everything.double().cpu())[-1]
        self._set(
            "background_means", torch.cat([torch.cat([kinds, new.unsqueeze(1)], dim=1).flatten(0, 1), everything])
        )

    def remove_class(self, number: int) -> None:
        stay = [row for row in range(self.num_experts) if row != number]
        kinds, everything = self._kinds_of_means()
        self.num_experts -= 1
        for name in ("weight", "bias", "means"):
            self._set(name, getattr(self, name)[stay])
        self._set("background_means", torch.cat([kinds[:, stay].flatten(0, 1), everything]))

    def _kinds_of_means(self) -> tuple[Tensor, Tensor]:
        """(_KINDS, K, H) means near each expert, and (1, H) that of all background prompts."""
        return self.background_means[:-1].unflatten(0, (_KINDS, -1)), self.background_means[-1:]

    def scores(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features.float(), self.weight, self.bias)

    def distance(self, features: Tensor) -> Tensor:
        """Logarithm of the squared Mahalanobis distance to the nearest expert's mean."""
        return self._squared(features, self.means).amin(dim=1).clamp(min=1e-12).log()

    @staticmethod
    def times_usual(distance: Tensor, usual: Tensor) -> Tensor:
        """Ratio of two Mahalanobis distances, from the logarithms of their squares."""
        return (0.5 * (distance - usual)).exp()

    def background_log_odds(self, features: Tensor) -> Tensor:
        if not self.has_background:
            return self.distance(features)
        nearest = self.scores(features).argmax(dim=1, keepdim=True)
        to_experts, to_ordinary = self._squared(features, self.means), self._squared(features, self.background_means)
        # Half the difference of two squared distances is the log-odds of two Gaussians of one covariance.
        return 0.5 * (to_experts.gather(1, nearest).squeeze(1) - to_ordinary.amin(dim=1))

    def _squared(self, features: Tensor, centres: Tensor) -> Tensor:
        # Centred before whitening: the common offset of hidden states is large and would cost digits.
        offset = self.means[0]
        return squared_mahalanobis((features.float() - offset) @ self.whitening, (centres - offset) @ self.whitening)


def linear_scores(means: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (K, H) and biases (K,) of the classes' linear scores, float32.

    Args:
        means: (K, H) float64
        whitening: (H, H) float64, a root of the precision.
    """
    weight = means @ whitening @ whitening.T
    return weight.float(), (-0.5 * (weight * means).sum(dim=1)).float()


def oas_shrinkage(covariance: Tensor, num_samples: int) -> float:
    """Share of a scaled identity to mix into a covariance.

    Oracle approximating shrinkage, eq. (23) of Chen et al. 2010 (https://arxiv.org/abs/0907.4698), from the sample
    covariance and the number of samples alone, so that one pass over the data is enough.

    Args:
        covariance: (H, H)
        num_samples: how many it was taken from.

    Returns:
        In [0, 1].
    """
    size = covariance.shape[0]
    mean_square = float(covariance.square().mean())
    square_mean = float(covariance.trace() / size) ** 2
    denominator = (max(1, num_samples) + 1) * (mean_square - square_mean / size)
    return 1.0 if denominator <= 0 else min(1.0, (mean_square + square_mean) / denominator)


def inverse_root(covariance: Tensor, num_samples: int) -> Tensor:
    """A root W of the inverse of the shrunk covariance: distances of ``z @ W`` are Mahalanobis distances of ``z``.

    Features are first brought to unit variance: a few entries of a hidden state are hundreds of times larger than the
    rest, and the identity that shrinkage mixes in would drown all others (our choice). And at least half of the result
    is that identity, less with more than five samples a feature: the best estimate for prompts like the calibration
    texts trusts directions in which these hardly vary and a new wording does (measured in ``docs/routing.md``).

    Args:
        covariance: (H, H)
        num_samples: how many samples it was taken from.

    Returns:
        (H, H), with ``W @ W.T`` the inverse.
    """
    scale = covariance.diagonal().sqrt()
    scale = scale.clamp(min=max(1e-12, 1e-6 * float(scale.max())))
    correlation = covariance / scale.outer(scale)
    least = _LEAST_SHRINKAGE * min(1.0, _TEXTS_A_FEATURE * len(scale) / max(1, num_samples))
    share = max(least, oas_shrinkage(correlation, num_samples))
    identity = torch.eye(len(scale), dtype=covariance.dtype, device=covariance.device)
    mean_variance = max(float(correlation.trace()) / len(scale), 1e-12)
    shrunk = (1 - share) * correlation + max(share, 1e-6) * mean_variance * identity
    factor = torch.linalg.cholesky(shrunk)
    # shrunk = L L^T, so (L^-1)^T is a root of the inverse; the scaling goes on its rows.
    return torch.linalg.solve_triangular(factor, identity, upper=False).T / scale.unsqueeze(1)
