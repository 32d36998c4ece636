"""A small head trained with cross-entropy, stopped early."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..uncertainty import free_energy
from .base import Router

_HIDDEN = 64
_MAX_EPOCHS, _PATIENCE = 300, 30
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2
_SHARE_HELD_OUT = 0.2


class MlpRouter(Router):
    r"""Two layers on standardised features, :math:`s(z) = W_2\,\mathrm{gelu}(W_1 \tilde z + b_1) + b_2`.

    Full-batch AdamW on the class-balanced cross-entropy; the weights of the epoch with the smallest held-out loss are
    kept. The same seed gives the same weights. Background prompts have the last output; the distance is
    the energy of Liu et al. 2020 (https://arxiv.org/abs/2010.03759).
    """

    trainable = ("weight_in", "bias_in", "weight_out", "bias_out")
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    centre: Tensor
    scale: Tensor
    has_background: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, h = self.num_experts, self.num_features
        return {
            "weight_in": (_HIDDEN, h),
            "bias_in": (_HIDDEN,),
            "weight_out": (k + 1, _HIDDEN),
            "bias_out": (k + 1,),
            "centre": (h,),
            "scale": (h,),
            "has_background": (1,),
        }

    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        features, labels = features.float(), labels.long()
        self._set("has_background", torch.tensor([float(background is not None)]))
        num_classes = self.num_experts
        if background is not None:  # one class more, of its own output
            if hard_negatives is not None:
                background = torch.cat([background, hard_negatives.flatten(0, 1)])
            num_classes += 1
            features = torch.cat([features, background.float()])
            labels = torch.cat([labels, torch.full((len(background),), self.num_experts).to(labels)])
        generator = torch.Generator().manual_seed(self.seed)
        held_out = _held_out(labels, generator)
        judged = held_out if held_out.any() else ~held_out
        scale = features.std(dim=0)
        self._set("centre", features.mean(dim=0))
        self._set("scale", scale.clamp(min=max(1e-12, 1e-6 * float(scale.max()))))
        for name in self.trainable:
            shape = self.shapes()[name]
            spread = shape[1] ** -0.5 if len(shape) == 2 else 0.0
            self._set(name, torch.randn(shape, generator=generator).to(features.device) * spread)
        frequency = torch.bincount(labels[~held_out], minlength=num_classes).clamp(min=1)
        balance = len(labels) / (num_classes * frequency.float())
        with torch.enable_grad():
            self._descend(features, labels, ~held_out, judged, balance.to(features.device))

    def _descend(self, features: Tensor, labels: Tensor, fitted: Tensor, judged: Tensor, balance: Tensor) -> None:
        weights = [getattr(self, name) for name in self.trainable]
        frozen = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        best, best_loss, waited = [weight.detach().clone() for weight in weights], float("inf"), 0
        for _ in range(_MAX_EPOCHS):
            optimizer.zero_grad()
            F.cross_entropy(self._outputs(features[fitted], len(balance)), labels[fitted], balance).backward()
            optimizer.step()
            with torch.no_grad():
                loss = float(F.cross_entropy(self._outputs(features[judged], len(balance)), labels[judged], balance))
            waited += 1
            if loss < best_loss - 1e-5:
                best, best_loss, waited = [weight.detach().clone() for weight in weights], loss, 0
            if waited >= _PATIENCE:
                break
        for weight, kept, requires in zip(weights, best, frozen, strict=True):
            weight.data.copy_(kept)
            weight.grad = None
            weight.requires_grad_(requires)

    def _outputs(self, features: Tensor, num_outputs: int) -> Tensor:
        standard = (features.float() - self.centre) / self.scale
        hidden = F.gelu(F.linear(standard, self.weight_in, self.bias_in))
        return F.linear(hidden, self.weight_out, self.bias_out)[:, :num_outputs]

    def scores(self, features: Tensor) -> Tensor:
        return self._outputs(features, self.num_experts)

    def distance(self, features: Tensor) -> Tensor:
        """Free energy of the experts' scores."""
        return free_energy(self.scores(features))

    def background_log_odds(self, features: Tensor) -> Tensor:
        if not self.has_background:
            return self.distance(features)
        outputs = self._outputs(features, self.num_experts + 1)
        return outputs[:, -1] - outputs[:, :-1].amax(dim=1)


def _held_out(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) bool, about a fifth of each class; none of a class with a single row."""
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        if len(rows) > 1:
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            chosen[rows[order[: max(1, round(len(rows) * _SHARE_HELD_OUT))]]] = True
    return chosen
