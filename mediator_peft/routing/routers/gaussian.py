"""Class-conditional Gaussians with one shrunk covariance: linear discriminant analysis, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..uncertainty import squared_mahalanobis
from .base import Router, pooled_moments


class GaussianRouter(Router):
    r"""Posterior of K Gaussians with means :math:`\mu_k`, equal priors and one shrunk covariance.

    .. math:: s_k(z) = \mu_k^\top \Sigma^{-1} z - \tfrac12 \mu_k^\top \Sigma^{-1} \mu_k

    ``weight`` and ``bias`` hold these linear scores and are trainable; the distances behind the novelty are not.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, h = self.num_experts, self.num_features
        return {"weight": (k, h), "bias": (k,), "means": (k, h), "whitening": (h, h)}

    def fit(self, features: Tensor, labels: Tensor) -> None:
        means, covariance = pooled_moments(features, labels, self.num_experts)
        whitening = inverse_root(covariance, len(features) - self.num_experts)
        precision = whitening @ whitening.T
        weight = means @ precision
        self._set("weight", weight.float(), trainable=True)
        self._set("bias", (-0.5 * (weight * means).sum(dim=1)).float(), trainable=True)
        self._set("means", means.float(), trainable=False)
        self._set("whitening", whitening.float(), trainable=False)

    def scores(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features.float(), self.weight, self.bias)

    def novelty(self, features: Tensor) -> Tensor:
        # Centred before whitening: the common offset of hidden states is large and would cost digits.
        centre = self.means.mean(dim=0)
        return squared_mahalanobis((features.float() - centre) @ self.whitening, (self.means - centre) @ self.whitening)


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
    rest, and the identity that shrinkage mixes in would drown all others (our choice).

    Args:
        covariance: (H, H)
        num_samples: how many samples it was taken from.

    Returns:
        (H, H), with ``W @ W.T`` the inverse.
    """
    scale = covariance.diagonal().sqrt()
    scale = scale.clamp(min=max(1e-12, 1e-6 * float(scale.max())))
    correlation = covariance / scale.outer(scale)
    share = oas_shrinkage(correlation, num_samples)
    identity = torch.eye(len(scale), dtype=covariance.dtype, device=covariance.device)
    mean_variance = max(float(correlation.trace()) / len(scale), 1e-12)
    shrunk = (1 - share) * correlation + max(share, 1e-6) * mean_variance * identity
    factor = torch.linalg.cholesky(shrunk)
    # shrunk = L L^T, so (L^-1)^T is a root of the inverse; the scaling goes on its rows.
    return torch.linalg.solve_triangular(factor, identity, upper=False).T / scale.unsqueeze(1)
