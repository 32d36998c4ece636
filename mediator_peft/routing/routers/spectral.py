r"""Which expert's delta responds most to a prompt: a router made from the deltas alone, without calibration texts.

As Arrow (https://arxiv.org/abs/2405.11157) and SMILE (https://arxiv.org/abs/2408.10174) route LoRA by the right
singular vectors of an update. Ours differs in the statistic, in its standardisation and in that the base can be chosen:

.. math::
    s_k(x) = \log \operatorname{mean}_t \| V_k^\top (g \odot \hat x_t) \|^2, \qquad
    z_k(x) = \frac{s_k(x) - \mu_k}{\sigma_k}, \qquad \text{OOD score} = -\max_k z_k

:math:`\hat x_t` is the hidden state of a token before a block, scaled to a mean square of 1; :math:`g` is the scale of
the norm after it, whose shift and centring are left out; :math:`V_k` (H, R) are the top right singular vectors of the
expert's delta in the layers that read this norm (query, key and value). :math:`\mu_k` and :math:`\sigma_k` are taken
over background prompts, families weighing the same. Scores are :math:`\operatorname{sgn}(z_k) z_k^2 / 2`:
log-posteriors if exactly one expert's response is not that of a standard normal background prompt, and any value is as
likely there. Measured in ``docs/routing.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AdapterError, UnsupportedError
from ..ood import Known
from .base import Router

_LEAST_RESPONSE = 1e-12
_LEAST_DEVIATION = 1e-3


class SpectralRouter(Router):
    """Standardised response of each expert's delta; made by :meth:`set_deltas`, not by :meth:`fit`."""

    directions: Tensor
    background_responses: Tensor
    background_kinds: Tensor

    @property
    def pools_by(self) -> tuple[Tensor, ...]:
        return (self.directions,)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        r"""Responses :math:`s_k`.

        Args:
            hidden: (B, T, H)
            mask: (B, T), 1 for tokens that are routed on; a row without any gives zeros.

        Returns:
            (B, K) float32
        """
        directions = self.directions
        kept = mask.to(directions.device).unsqueeze(-1) > 0
        # Chosen, not multiplied: a padded position may hold anything, NaN included.
        states = torch.where(kept, hidden.to(directions.device).float(), 0)
        states = states * states.square().mean(dim=2, keepdim=True).clamp(min=_LEAST_RESPONSE).rsqrt()
        count = kept.sum(dim=(1, 2))
        # One expert at a time, so that none's number depends on the others.
        sums = torch.stack([(states @ own).square().sum(dim=(1, 2)) for own in directions], dim=1)
        responses = (sums / count.clamp(min=1).unsqueeze(1)).clamp(min=_LEAST_RESPONSE).log()
        return torch.where(count.unsqueeze(1) > 0, responses, 0)

    def set_directions(self, directions: Tensor) -> None:
        """Keep (K, H, R) directions, from which on prompts can be pooled."""
        self._set("directions", directions.float())

    def set_background(self, responses: Tensor, shares: Tensor, kinds: Tensor) -> None:
        """Take means, deviations and the border from background prompts; the router is fitted then.

        Args:
            responses: (M, K) pooled background prompts.
            shares: (M,) weight of each prompt; they sum to 1.
            kinds: (M,) number of each prompt's kind. What the gate compares with are OOD scores by means and deviations
                without the prompt's own kind.
        """
        # Expert by expert in memory, so that sums do not depend on the other experts.
        responses, shares, kinds = responses.float().cpu().T.contiguous(), shares.float().cpu(), kinds.float().cpu()
        left_out = torch.zeros(len(kinds))
        for kind in kinds.unique():
            own = kinds == kind
            moments = _moments(responses[:, ~own], shares[~own])
            left_out[own] = -_standardised(responses[:, own].T, moments).amax(dim=1)
        self._set("background_responses", responses)
        self._set("background_kinds", kinds)
        none = torch.zeros(0)
        self.set_known(Known(none, none, none, left_out, torch.zeros(len(kinds)), shares))

    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        """Refused.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a SpectralRouter is made from deltas: use model.fit_router_from_deltas(tokenizer).")

    def standardised(self, features: Tensor) -> Tensor:
        """(B, K) responses → (B, K) :math:`z_k`, in standard deviations of background prompts."""
        return _standardised(features, _moments(self.background_responses, self.background_share))

    def scores(self, features: Tensor) -> Tensor:
        deviations = self.standardised(features)
        return deviations.sign() * deviations.square() / 2

    def distance(self, features: Tensor) -> Tensor:
        """Minus the largest response in standard deviations."""
        return -self.standardised(features).amax(dim=1)

    def background_log_odds(self, features: Tensor) -> Tensor:
        return self.distance(features)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "directions": (self.num_experts, self.num_features, -1),
            "background_responses": (self.num_experts, -1),
            "background_kinds": (-1,),
            "background_share": (-1,),
        }

    def remove_class(self, number: int) -> None:
        """Forget one expert. The border is taken anew, from the largest responses of those that stay."""
        stay = [row for row in range(self.num_experts) if row != number]
        responses = self.background_responses[stay].T
        self.num_experts -= 1
        self.set_directions(self.directions[stay])
        self.set_background(responses, self.background_share, self.background_kinds)

    def check_known(self) -> None:
        known, count = self.known, self.background_responses.shape[1]
        parts = (known.background_novelty, known.background_excess, self.background_share, self.background_kinds)
        is_whole = count > 0 and self.directions.shape[2] > 0 and all(len(part) == count for part in parts)
        if not is_whole or known.has_texts or len(known.ood_score) or len(known.distance):
            raise AdapterError("the router's background values do not fit together: the adapter is damaged.")


def _moments(responses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """(K, M) responses and (M,) weights → means and standard deviations (K,)."""
    weights = (shares / shares.sum()).double()
    mean = (responses.double() * weights).sum(dim=1)
    variance = ((responses.double() - mean.unsqueeze(1)).square() * weights).sum(dim=1)
    return mean, variance.sqrt().clamp(min=_LEAST_DEVIATION)


def _standardised(responses: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    """(B, K)"""
    mean, deviation = moments
    return ((responses.double() - mean) / deviation).float()
