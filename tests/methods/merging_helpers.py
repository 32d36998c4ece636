"""Merging single tensors with any row of the table, through the same tiles as a build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mediator_peft.merge import tiles
from mediator_peft.methods.merging import MERGE_METHODS, TensorContext, TensorMethod
from mediator_peft.methods.merging.row import LINEAR
from mediator_peft.methods.merging.weighted import Coefficients
from tests.merge.helpers import InMemory

NAMES = tuple("abcdefgh")


def data_for(name: str, num_experts: int, **context: Any) -> Any:
    """What a row that reads data is given where a test does not care: what makes it the average."""
    if name == "weighted":
        return Coefficients({"w": ((1 / num_experts,),) * num_experts})
    return None


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
    return tiles.TensorTiles("w", checkpoints, dtype, method, tiles.Workspace(), is_transposed)


def backbone_of(name: str, base: Tensor, vectors: Sequence[Tensor], **options: Any) -> Tensor:
    """The backbone, (O, I) also where it is stored the other way."""
    parts = [tile.backbone.clone() for tile in tensor_tiles(name, base, vectors, **options)]
    return torch.cat(parts).reshape(base.shape)


def merged(name: str, base: Tensor, vectors: Sequence[Tensor], **options: Any) -> Tensor:
    """The merged task vector in float64."""
    return backbone_of(name, base, vectors, **options).double() - base.double()
