"""Merging single tensors with any row of the table, through the same tiles as a build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mediator_peft.merge import tiles
from mediator_peft.methods.merging import MERGE_METHODS, TensorContext, TensorMethod
from mediator_peft.methods.merging.row import LINEAR
from mediator_peft.methods.merging.weighted import Coefficients
from mediator_peft.storage import float_type, to_tensor
from tests.merge.helpers import InMemory

NAMES = tuple("abcdefgh")


def data_for(name: str, num_experts: int, **context: Any) -> Any:
    """What a row that reads data is given where a test does not care: what makes it the average."""
    if name == "weighted":
        return Coefficients({"w": ((1 / num_experts,),) * num_experts})
    return Statistics() if name in ("regmean", "fisher", "ota") else None


class Statistics:
    """Side tensors: given ones, (O, I) by expert, or else random ones of the shape that is asked for."""

    def __init__(self, given: dict[str, Tensor] | None = None) -> None:
        self.given = given or {}

    def whole(self, expert: str, rows: int, columns: int) -> Tensor:
        """Of one expert, by its name alone."""
        generator = torch.Generator().manual_seed(NAMES.index(expert))
        return self.given.get(expert, torch.rand(rows, columns, generator=generator, dtype=torch.float64)).double()

    def tile(self, expert: str, context: TensorContext, num_rows: int, num_columns: int) -> Tensor:
        """As ``SideTensors.tile``."""
        total = context.stored_shape[-1 if context.is_transposed else 0]
        return self.whole(expert, total, num_columns)[context.start : context.start + num_rows]

    def gram(self, expert: str, context: TensorContext) -> Tensor:
        """As ``SideTensors.gram``."""
        width = context.stored_shape[0 if context.is_transposed else -1]
        if expert in self.given:
            return self.given[expert]
        inputs = self.whole(expert, 2 * width, width) - 0.5
        return (inputs.T @ inputs).float()


def tensor_tiles(
    name: str,
    base: Tensor,
    vectors: Sequence[Tensor],
    *,
    kind: str = LINEAR,
    is_transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    parameters: dict[str, Any] | None = None,
    experts: Sequence[str] | None = None,
    factor: float = 1.0,
    **context: Any,
) -> tiles.TensorTiles:
    """Tiles of a tensor named ``w``.

    Args:
        name: of the row.
        base: (O, I); with ``is_transposed`` the checkpoints hold its transpose.
        vectors: K task vectors of the same shape.
    """
    weights = [base, *(base + vector for vector in vectors)]
    stored = [weight.T.contiguous() if is_transposed else weight for weight in weights]
    about = TensorContext(
        name="w",
        experts=tuple(experts or NAMES[: len(vectors)]),
        stored_shape=tuple(stored[0].shape),
        is_transposed=is_transposed,
        kind=kind,
        block=0,
        **{"data": data_for(name, len(vectors)), **context},
    )
    method = TensorMethod(MERGE_METHODS[name], about, parameters or {}, factor)
    checkpoints = [
        InMemory({"w": weight}, label) for label, weight in zip(("base", *about.experts), stored, strict=True)
    ]
    return tiles.TensorTiles("w", checkpoints, float_type(dtype), method, tiles.Workspace(), is_transposed)


def backbone_of(name: str, base: Tensor, vectors: Sequence[Tensor], **options: Any) -> Tensor:
    """The backbone, (O, I) also where it is stored the other way."""
    parts = [tile.backbone.copy() for tile in tensor_tiles(name, base, vectors, **options)]
    return to_tensor(np.concatenate(parts)).reshape(base.shape)


def merged(name: str, base: Tensor, vectors: Sequence[Tensor], **options: Any) -> Tensor:
    """The merged task vector in float64."""
    return backbone_of(name, base, vectors, **options).double() - base.double()
