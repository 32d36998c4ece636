"""Why a prompt goes where it goes, in numbers and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gate import GateSettings, gate
from .ood import Known, fit_tail, gate_coefficients, threshold
from .uncertainty import normalised_entropy


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
    """The OOD score above which a prompt of this expert is flagged as unknown."""

    tail_share: float
    """Share of the nearest expert's known prompts that are at least as novel."""

    gate_coefficient: float
    """Weight given to the experts, in [0, 1]; the rest goes to the fallback."""

    uncertainty: float
    """In [0, 1], larger is less sure."""

    is_ood: bool
    """Whether the OOD score is above the threshold. ``is_ood`` alone does not
    force the fallback: see ``gate_coefficient``."""

    expert_weights: dict[str, float]
    """What is mixed; columns of no weight are left out."""

    @property
    def novelty(self) -> float:
        """Former name of ``ood_score``."""
        return self.ood_score

    @property
    def trust(self) -> float:
        """Former name of ``gate_coefficient``."""
        return self.gate_coefficient

    def __str__(self) -> str:
        mix = " + ".join(f"{weight:.2f} {name}" for name, weight in self.expert_weights.items()) or "the backbone"
        above, verdict = ("above", "unlike its calibration texts") if self.is_ood else ("within", "like them")
        return (
            f"{mix}: nearest is {self.nearest} (p = {self.probabilities[self.nearest]:.2f}), "
            f"OOD score {self.ood_score:.4g} "
            f"{above} its threshold {self.threshold:.4g}: {verdict} "
            f"(gate coefficient {self.gate_coefficient:.2f}, uncertainty {self.uncertainty:.2f})"
        )


def explain_rows(
    scores: Tensor,
    ood_score: Tensor,
    distance: Tensor,
    known: Known,
    settings: GateSettings,
    columns: Sequence[str],
) -> list[Explanation]:
    """One explanation a prompt.

    Args:
        scores: (B, K), log-probabilities over their temperature, unnormalised.
        ood_score: (B,)
        distance: (B,)
        known: the held-out statistics of both.
        settings: of the gate.
        columns: names of the expert-weight columns, the K experts first.
    """
    decided = gate(scores, ood_score, distance, known, settings)
    tail = fit_tail(known.ood_score, known.labels, scores.shape[1])
    nearest = scores.argmax(dim=1)
    trusted = gate_coefficients(ood_score, distance, nearest, known, settings.ood_alpha, settings.ood_beta)
    limits = threshold(tail, settings.ood_alpha)[nearest]
    ambiguity = normalised_entropy(scores.float().softmax(dim=1))
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
                tail_share=float(trusted.tail_share[row]),
                gate_coefficient=float(trusted.gate_coefficient[row]),
                uncertainty=float(decided.uncertainty[row]),
                is_ood=bool(decided.is_ood[row]),
                expert_weights={name: weight for name, weight in weights if weight > 0},
            )
        )
    return explanations
