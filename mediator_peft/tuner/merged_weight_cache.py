"""Weights of hot experts, kept whole beside the backbone: memory for speed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..bank.layer_bank import LayerBank
from .merged_weight import Mix, mixed_weight, plain_weight


class MergedWeightCache:
    """``D + S_k`` of some experts of one layer, each a dense copy in the dtype of the backbone's weight."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._weights: dict[str, Tensor] = {}

    def keep(self, names: Sequence[str], base_layer: nn.Linear, bank: LayerBank) -> None:
        """Make the weights of these experts, and drop all others. The backbone's weight must not be folded now."""
        kept = {name: self._weights[name] for name in names if name in self._weights}
        self.names, self._weights = tuple(names), kept
        for name in names:
            if name not in kept and bank.get(name) is not None:
                kept[name] = mixed_weight(plain_weight(base_layer), bank, ((name, 1.0),))

    def drop(self) -> None:
        """Keep nothing."""
        self.names, self._weights = (), {}

    def has(self, mix: Mix) -> bool:
        """Whether nothing is left to add for a mix: one kept expert in full, or the backbone alone."""
        return not mix or (len(mix) == 1 and mix[0][1] == 1.0 and mix[0][0] in self.names)

    def weight(self, mix: Mix) -> Tensor | None:
        """The weight (O, I) of a mix, if kept; None where the expert has no delta here or is not kept."""
        return self._weights.get(mix[0][0]) if mix and self.has(mix) else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(weight.nbytes for weight in self._weights.values())
