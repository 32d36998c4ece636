"""Why a prompt goes where it goes, in numbers and in one plain sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gate import GateSettings, gate
from .ood import Known, gate_coefficients, ood_threshold
from .uncertainty import normalised_entropy
from .unreadable import to_the_base

_LITTLE = 0.05
_NOT_FAR = 1.2


class Explanation(NamedTuple):
    """One prompt's decision."""

    nearest: str
    """The best-scored expert."""

    probabilities: dict[str, float]
    """Expert → probability, the most likely first."""

    ambiguity: float
    """Entropy of the probabilities, in [0, 1]."""

    ood_score: float
    """How much more it looks like a background prompt than like the nearest expert's; its unit is the router's."""

    threshold: float
    """The OOD score above which a prompt of this expert is OOD."""

    tail_share: float | None
    """Share of the nearest expert's known prompts that are at least as novel; None where the router was made from the
    deltas, without texts."""

    gate_coefficient: float
    """Weight given to the experts, in [0, 1]; the rest goes to the fallback."""

    uncertainty: float
    """In [0, 1], larger is less sure."""

    is_ood: bool
    """Whether the fallback gets more than the experts; the OOD score is above the threshold then. Routers that were
    fitted without a decision rule: whether the OOD score is above the threshold, whatever the weights are."""

    expert_weights: dict[str, float]
    """What is mixed; columns of no weight are left out."""

    times_usual: float | None = None
    """Distance to the nearest expert's texts over the median distance of its own known prompts; None where the
    router's distance has no such scale."""

    like_calibration: bool = True
    """Whether the nearest expert's known prompts are as novel in a share ``ood_alpha`` of cases at least. Most prompts
    in a wording that no calibration text has are not, and may belong to the expert all the same: see ``is_ood``."""

    @property
    def novelty(self) -> float:
        """Former name of ``ood_score``."""
        return self.ood_score

    @property
    def trust(self) -> float:
        """Former name of ``gate_coefficient``."""
        return self.gate_coefficient

    @property
    def reason(self) -> str:
        """One plain sentence: what the prompt is like, and where it goes for that."""
        return f"{self._likeness()} → {self._destination()}"

    def _likeness(self) -> str:
        if not math.isfinite(self.ood_score):
            return "there is nothing to read: no text, or a hidden state that holds NaN or infinity"
        if self.tail_share is None:
            return self._response()
        times = "" if self.times_usual is None else f", {self.times_usual:.1f} × its usual distance"
        if self.gate_coefficient <= _LITTLE:
            if self.times_usual is not None and self.times_usual < _NOT_FAR:
                return f"near the calibration texts of {self.nearest}{times}, but more like background prompts"
            return f"unlike every calibration text (closest: {self.nearest}{times})"
        if self.gate_coefficient < 1 - _LITTLE:
            return f"between the calibration texts of {self.nearest}{times} and background prompts"
        if not self.like_calibration:
            return f"unlike the calibration texts of {self.nearest}{times}, but more like them than background prompts"
        return f"like the calibration texts of {self.nearest}"

    def _response(self) -> str:
        """For routers made from deltas, whose OOD score is minus the largest response."""
        response, border = f"{-self.ood_score:.1f} standard deviations", f"border {-self.threshold:.1f}"
        if self.gate_coefficient <= _LITTLE:
            most = f"most: {self.nearest}, {response}, {border}"
            return f"no delta responds much more than to background prompts ({most})"
        more = "more than" if self.gate_coefficient >= 1 - _LITTLE else "about as much as the strongest"
        return f"the delta of {self.nearest} responds {more} to background prompts ({response}, {border})"

    def _destination(self) -> str:
        if len(self.expert_weights) == 1 and max(self.expert_weights.values()) > 1 - _LITTLE:
            return next(iter(self.expert_weights))
        return " + ".join(f"{weight:.2f} {name}" for name, weight in self.expert_weights.items()) or "the backbone"

    def __str__(self) -> str:
        return (
            f"{self.reason} (p = {self.probabilities[self.nearest]:.2f}, OOD score {self.ood_score:.4g} "
            f"{'above' if self.is_ood else 'within'} its threshold {self.threshold:.4g}, "
            f"gate coefficient {self.gate_coefficient:.2f}, uncertainty {self.uncertainty:.2f})"
        )


def explain_rows(
    scores: Tensor,
    ood_score: Tensor,
    distance: Tensor,
    known: Known,
    settings: GateSettings,
    columns: Sequence[str],
    unreadable: Tensor | None = None,
    times_usual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Explanation]:
    """One explanation a prompt.

    Args:
        scores: (B, K), log-probabilities over their temperature, unnormalised.
        ood_score: (B,)
        distance: (B,)
        known: the held-out statistics of both.
        settings: of the gate.
        columns: names of the expert-weight columns, the K experts first.
        unreadable: (B,) bool, True for prompts of which nothing can be read; None for none.
        times_usual: (distances, usual ones) → how many times as far; None for distances without such a scale.
    """
    decided = gate(scores, ood_score, distance, known, settings)
    if unreadable is not None:
        decided = to_the_base(decided, unreadable, settings.fallback_column)
        scores = torch.where(unreadable[:, None], 0.0, scores)
        ood_score = torch.where(unreadable, torch.inf, ood_score)
    nearest = scores.argmax(dim=1)
    trusted = gate_coefficients(ood_score, distance, nearest, known, settings.ood_alpha, settings.ood_beta)
    limits = ood_threshold(known, settings.ood_alpha, settings.ood_beta).expand(scores.shape[1])[nearest]
    ambiguity = normalised_entropy(scores.float().softmax(dim=1))
    times = None
    if times_usual is not None:
        usual = torch.stack([known.distance[known.labels == k].median() for k in range(scores.shape[1])])
        times = times_usual(distance, usual[nearest])
    explanations = []
    for row in range(len(scores)):
        probabilities = scores[row].float().softmax(dim=0)
        order = torch.argsort(probabilities, descending=True).tolist()
        weights = zip(columns, decided.expert_weights[row].tolist(), strict=True)
        explanations.append(
            Explanation(
                nearest=columns[int(nearest[row])],
                probabilities={columns[number]: float(probabilities[number]) for number in order},
                ambiguity=float(ambiguity[row]),
                ood_score=float(ood_score[row]),
                threshold=float(limits[row]),
                tail_share=float(trusted.tail_share[row]) if known.has_texts else None,
                gate_coefficient=float(trusted.gate_coefficient[row]),
                uncertainty=float(decided.uncertainty[row]),
                is_ood=bool(decided.is_ood[row]),
                expert_weights={name: weight for name, weight in weights if weight > 0},
                times_usual=None if times is None else float(times[row]),
                like_calibration=not known.has_texts or bool(trusted.tail_share[row] >= settings.ood_alpha),
            )
        )
    return explanations
