"""What every router does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError, UnsupportedError
from ..decision_rule import DecisionRule
from ..features import mean_over_tokens
from ..neighbours import Neighbours
from ..ood import Known

_YARDSTICKS = {
    "known_novelty": (-1,),
    "known_labels": (-1,),
    "known_distance": (-1,),
    "background_novelty": (-1,),
    "background_excess": (-1,),
    "temperature": (1,),
}


_RULE = {"background_share": (-1,), "detector_bias": (-1,)}
"""Tensors of the decision rule, beside ``detector_weight`` and ``combination``; routers that were fitted without one
lack them all."""

_NEIGHBOURS = tuple(f"neighbour_{name}" for name in Neighbours._fields)
"""Tensors of the rule's neighbours; rules of earlier versions, and those without a basis of wordings, lack them."""


class Router(nn.Module, ABC):
    """Pooled features → a score for each expert, and how novel the prompt is.

    A router has no tensors before it is fitted; their shapes follow from the number of experts and of features.
    """

    known_novelty: Tensor
    known_labels: Tensor
    known_distance: Tensor
    background_novelty: Tensor
    background_excess: Tensor
    background_share: Tensor
    detector_bias: Tensor
    combination: Tensor
    temperature: Tensor

    trainable: tuple[str, ...] = ()
    """Names of the tensors that training may change."""

    num_folds: int = 20
    """Into how many folds calibration texts are split. A router fitted on fewer texts finds the others more novel than
    the final one will: with 5 folds and 100 texts an expert, a tenth of the stated rate was flagged; with 20, nearly
    all of it (``docs/routing.md``)."""

    uses_hard_negatives: bool = True
    """Whether ``hard_negatives`` make a difference: they need not be read for a router that leaves them aside."""

    def __init__(self, num_experts: int, num_features: int, seed: int = 0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_features = num_features
        self.seed = seed
        self.is_trainable = True
        """Whether new tensors require gradients."""
        self.basis: Tensor | None = None
        """(H, H) in which the covariance is estimated at a fit, for routers that have one; not saved."""
        self.evidence: Any = None
        """What held-out prompts said at the last fit (``calibration.Evidence``); not saved."""

    @property
    def is_fitted(self) -> bool:
        """Whether scores can be asked for."""
        return getattr(self, "known_novelty", None) is not None

    @property
    def pools_by(self) -> tuple[Tensor, ...]:
        """Tensors of the router on which :meth:`pool` depends."""
        return ()

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the router sees of a prompt: here the mean hidden state over its tokens.

        Args:
            hidden: (B, T, H) after the first blocks.
            mask: (B, T), 1 for tokens that are routed on; a row without any gives zeros.

        Returns:
            (B, H) float32; other routers may have another number of features.
        """
        return mean_over_tokens(hidden, mask)

    @abstractmethod
    def fit(
        self, features: Tensor, labels: Tensor, background: Tensor | None = None, hard_negatives: Tensor | None = None
    ) -> None:
        """Fit to (N, H) float features and (N,) integer labels, each expert at least once.

        Args:
            features: (N, H)
            labels: (N,)
            background: (M, H) features of background prompts that belong to no expert, one class more; None for none.
            hard_negatives: (W, N', H) features of other requests about the experts' subjects, by their form; they
                belong to no expert either. Taken only beside ``background``.
        """

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """(B, H) → (B, K) unnormalised log-probabilities before the temperature; larger is a better match."""

    @abstractmethod
    def background_log_odds(self, features: Tensor) -> Tensor:
        """(B, H) → (B,), log-odds of a background prompt against the best-scored expert; larger is more novel.

        Without a background it is the distance.
        """

    @abstractmethod
    def distance(self, features: Tensor) -> Tensor:
        """(B, H) → (B,), how far a prompt is from the nearest expert, on a scale where differences count."""

    times_usual: Callable[[Tensor, Tensor], Tensor] | None = None
    """(distances, usual ones), (B,) each → how many times as far; None where distances have no such scale."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each tensor of a fitted router, the held-out statistics apart; -1 where the file decides."""

    def add_class(self, features: Tensor, hard_negatives: Tensor | None = None) -> None:
        """Take in one more expert from its (N, H) features, the others' tensors left as they are, bit for bit.

        Args:
            features: (N, H)
            hard_negatives: (W, N', H) of other requests about the new expert's subjects, or None.

        Raises:
            UnsupportedError: this router cannot; it has to be fitted again.
        """
        raise UnsupportedError(
            f"a {type(self).__name__} cannot take in an expert without being fitted again. Use router='gaussian' or "
            "'prototype', or call fit_router with texts of all experts."
        )

    def remove_class(self, number: int) -> None:
        """Forget one expert; the others' tensors stay as they are.

        Raises:
            UnsupportedError: this router cannot; it has to be fitted again.
        """
        raise UnsupportedError(
            f"a {type(self).__name__} cannot forget an expert without being fitted again. Use router='gaussian' or "
            "'prototype', or call fit_router with texts of the experts that stay."
        )

    def calibrated(self, features: Tensor) -> Tensor:
        """(B, H) → (B, K), scores over the temperature: log-probabilities that can be believed, unnormalised."""
        scores = self.scores(features)
        temperature = getattr(self, "temperature", None)
        return scores if temperature is None else scores / temperature

    @property
    def known(self) -> Known:
        """Held-out statistics, by which the gate decides."""
        return Known(
            self.known_novelty, self.known_labels.long(), self.known_distance, self.background_novelty,
            self.background_excess, getattr(self, "background_share", None),
        )  # fmt: skip

    @property
    def rule(self) -> DecisionRule | None:
        """The learned decision rule; None for a router that was fitted without background prompts, or long ago."""
        weight = getattr(self, "detector_weight", None)
        if weight is None:
            return None
        parts = [getattr(self, name, None) for name in _NEIGHBOURS]
        neighbours = None if any(part is None for part in parts) else Neighbours(*parts)  # type: ignore[arg-type]
        return DecisionRule(weight, self.detector_bias, self.combination, neighbours)

    def set_rule(self, rule: DecisionRule | None) -> None:
        """Keep a decision rule, or drop the one at hand."""
        for name in _NEIGHBOURS:
            self._buffers.pop(name, None)
        if rule is None:
            for name in ("detector_weight", "combination", *_RULE):
                self._buffers.pop(name, None)
            return
        for name in ("detector_weight", "detector_bias", "combination"):
            self._set(name, getattr(rule, name).float())
        if rule.neighbours is not None:
            for name, value in zip(_NEIGHBOURS, rule.neighbours, strict=True):
                self._set(name, value.float())

    def ood_score(self, features: Tensor) -> Tensor:
        """(B, H) → (B,) log-odds that a prompt belongs to no expert: the decision rule's, or else :meth:`ood_score`."""
        rule = self.rule
        if rule is None:
            return self.background_log_odds(features)
        return rule.ood_score(features, self.scores(features).argmax(dim=1), self.distance(features))

    def set_known(self, known: Known, temperature: float = 1.0) -> None:
        """Keep what prompts said that the router was not fitted on, and by what its scores are divided."""
        self._set("known_novelty", known.ood_score.float())
        self._set("known_labels", known.labels.float())
        self._set("known_distance", known.distance.float())
        self._set("background_novelty", known.background_novelty.float())
        self._set("background_excess", known.background_excess.float())
        self._set("temperature", torch.tensor([temperature]))
        if known.background_share is not None:
            self._set("background_share", known.background_share.float())

    def load_flat(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over a fitted state whose tensors were flattened for the file.

        Returns:
            Name → tensor in its shape.

        Raises:
            AdapterError: a tensor is missing, unknown or has a wrong size.
        """
        shapes = self._fitted_shapes(stored)
        if set(stored) != set(shapes):
            odd = sorted(set(stored) ^ set(shapes))
            raise AdapterError(f"the router in the adapter file lacks or has too many tensors: {odd}. Fit it again.")
        shaped = {}
        for name, shape in shapes.items():
            try:
                # A copy: a view would hold the whole mapped file in memory.
                shaped[name] = stored[name].to(torch.float32, copy=True).reshape(_given(shape, stored[name].numel()))
            except RuntimeError:
                raise AdapterError(
                    f"router tensor {name!r} has {stored[name].numel()} values, shape {shape} was expected. The "
                    "adapter belongs to another backbone or is damaged."
                ) from None
            self._set(name, shaped[name])
        self.check_known()
        return shaped

    def _fitted_shapes(self, stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Name → shape of each tensor of a fitted state; with a decision rule where ``stored`` has one."""
        shapes = {**self.shapes(), **_YARDSTICKS}
        if "detector_weight" in stored:
            shapes |= {**_RULE, "detector_weight": (self.num_experts, self.num_features), "combination": (3,)}
        if _NEIGHBOURS[0] in stored:
            shapes |= _neighbour_shapes(stored, self.num_features)
        return shapes

    def check_known(self) -> None:
        """Refuse held-out statistics whose parts do not fit together.

        Raises:
            AdapterError: they do not.
        """
        labels, values = self.known_labels, (self.known_novelty, self.known_distance)
        same = all(len(labels) == len(value) for value in values)
        same = same and len(self.background_novelty) == len(self.background_excess)
        rule = self.rule
        if rule is not None:
            same = same and len(rule.detector_bias) == self.num_experts
            same = same and len(self.background_share) == len(self.background_novelty)
            if rule.neighbours is not None:
                same = same and set(rule.neighbours.labels.tolist()) == {-1.0, *range(self.num_experts)}
        if not same or set(labels.tolist()) != set(range(self.num_experts)):
            raise AdapterError("the router's calibration values do not fit together: the adapter is damaged.")

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        # Tensors and their sizes come with fitting: a fitted state makes them.
        stored = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if set(stored) == set(self._fitted_shapes(stored)):
            for name, tensor in stored.items():
                self._set(name, tensor.to(torch.float32, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Moves between devices are wanted, changes of dtype (model.half()) are not: scores are computed in float32.
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _set(self, name: str, value: Tensor) -> None:
        """Set or replace a parameter or buffer, on the device the router already has."""
        old = getattr(self, name, None)
        value = value.detach().to(old.device if isinstance(old, Tensor) else value.device)
        if name in self.trainable:
            requires_grad = self.is_trainable if old is None else old.requires_grad
            setattr(self, name, nn.Parameter(value.clone(), requires_grad=requires_grad))
        elif name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value)


def _neighbour_shapes(stored: Mapping[str, Tensor], num_features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the neighbours' tensors, whose number of directions the file decides; and of the combination."""
    values = [stored[name].numel() if name in stored else 0 for name in _NEIGHBOURS]
    directions = values[1] // max(1, num_features)
    shapes = ((num_features,), (num_features, directions), (values[3], directions), (-1,))
    return {**dict(zip(_NEIGHBOURS, shapes, strict=True)), "combination": (4,)}


def _given(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape, with no rows where -1 stands for the rows of an empty tensor."""
    return tuple(0 if count == -1 and size == 0 else count for count in shape)
