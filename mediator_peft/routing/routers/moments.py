"""Class means and one pooled covariance, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running counts, means and scatters of K classes in H features, in float64: one pass, any batch order.

    Merged with the update of Chan, Golub & LeVeque (1979), so that large common offsets cost no digits. Memory is
    O(K H + H^2) for ``add_class``-wise data and O(K H^2) at the most while batches mix classes.
    """

    def __init__(self, num_classes: int, num_features: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.long)
        self.means = torch.zeros(num_classes, num_features, dtype=torch.float64)
        self._scatters: dict[int, Tensor] = {}

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch: (N, H) and (N,)."""
        for label in labels.unique().tolist():
            rows = features[labels == label].double().cpu()
            mean = rows.mean(dim=0)
            centred = rows - mean
            scatter = centred.T @ centred
            before, new = int(self.counts[label]), len(rows)
            shift = mean - self.means[label]
            if before:
                scatter += self._scatters[label] + shift.outer(shift) * (before * new / (before + new))
            self._scatters[label] = scatter
            self.means[label] += shift * (new / (before + new))
            self.counts[label] += new

    def pooled_covariance(self) -> Tensor:
        """(H, H) mean over classes of their covariances, so that large classes weigh no more than small ones."""
        num_features = self.means.shape[1]
        total = torch.zeros(num_features, num_features, dtype=torch.float64)
        for label, scatter in self._scatters.items():
            total += scatter / int(self.counts[label])
        return total / len(self._scatters)
