"""What every router does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import AdapterError


class Router(nn.Module, ABC):
    """Pooled features → a score for each expert, and how novel the prompt is.

    A router has no tensors before it is fitted; their shapes follow from the number of experts and of features.
    """

    def __init__(self, num_experts: int, num_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_features = num_features

    @property
    def is_fitted(self) -> bool:
        """Whether scores can be asked for."""
        return getattr(self, "known_novelty", None) is not None

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Fit to (N, H) float features and (N,) integer labels, each expert at least once."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """(B, H) → (B, K) unnormalised log-probabilities; larger is a better match."""

    @abstractmethod
    def novelty(self, features: Tensor) -> Tensor:
        """(B, H) → (B,), how far a prompt is from all known ones; larger is farther."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each tensor of a fitted router, ``known_novelty`` (of any length) apart."""

    def set_known_novelty(self, novelty: Tensor) -> None:
        """Keep the novelty of held-out known prompts, (N,), as the yardstick of the gate."""
        self._set("known_novelty", novelty.float().sort().values, trainable=False)

    def load_flat(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over a fitted state whose tensors were flattened for the file.

        Returns:
            Name → tensor in its shape.

        Raises:
            AdapterError: a tensor is missing, unknown or has a wrong size.
        """
        shapes = {**self.shapes(), "known_novelty": (-1,)}
        if set(stored) != set(shapes):
            odd = sorted(set(stored) ^ set(shapes))
            raise AdapterError(f"the router in the adapter file lacks or has too many tensors: {odd}. Fit it again.")
        shaped = {}
        for name, shape in shapes.items():
            try:
                shaped[name] = stored[name].float().reshape(shape)
            except RuntimeError:
                raise AdapterError(
                    f"router tensor {name!r} has {stored[name].numel()} values, shape {shape} was expected. The "
                    "adapter belongs to another backbone or is damaged."
                ) from None
            self._set(name, shaped[name], trainable=name in ("weight", "bias"))
        return shaped

    def _set(self, name: str, value: Tensor, trainable: bool) -> None:
        """Set or replace a parameter or buffer, on the device the router already has."""
        old = getattr(self, name, None)
        value = value.detach().to(old.device if isinstance(old, Tensor) else value.device)
        if trainable:
            setattr(self, name, nn.Parameter(value.clone(), requires_grad=old is None or old.requires_grad))
        elif name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value)


def pooled_moments(features: Tensor, labels: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Class means, and the mean over classes of their covariances, so that large classes weigh no more than small.

    Args:
        features: (N, H)
        labels: (N,)
        num_experts: K

    Returns:
        (K, H) and (H, H), float64.
    """
    features = features.double()
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(num_experts)])
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for label in range(num_experts):
        centred = features[labels == label] - means[label]
        covariance += centred.T @ centred / (len(centred) * num_experts)
    return means, covariance
