"""A merge method for one model: its parameters, its data, its pass over the whole model, scaling by depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.opening import MeanCheckpoint
from ..config import MediatorSettings
from ..deferred import torch
from ..errors import ConfigError
from ..methods.merging import MERGE_METHODS, MergeMethod, TensorContext, TensorMethod
from ..methods.merging.row import EMBEDDING, HEAD, LINEAR, OTHER
from ..structure import Structure
from .compatibility import Job
from .measured_models import check_measured_models
from .tiles import TensorTiles, Workspace, check_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ModelMethod:
    """What every tensor of a model is merged by."""

    config: MediatorSettings
    contexts: dict[str, TensorContext] = field(default_factory=dict)
    """Tensor name → what is known of it, for every tensor that is merged."""

    alpha: float = 1.0
    beta: float = 0.0
    """Tensors of block l of L are multiplied by alpha + beta * l / (L - 1), all others by alpha."""

    @property
    def row(self) -> MergeMethod:
        """Of the table of methods."""
        return MERGE_METHODS[self.config.merge_method]

    def of_tensor(self, name: str, is_transposed: bool) -> TensorMethod:
        """The method as it works on one tensor."""
        context = self.contexts.get(name)
        if context is None:
            context = TensorContext(name, is_transposed=is_transposed, seed=self.config.seed)
        return TensorMethod(self.row, context, self.config.merge_parameters, self._factor(context))

    def _factor(self, context: TensorContext) -> float:
        if context.block is None or context.num_blocks < 2:
            return self.alpha
        return self.alpha + self.beta * context.block / (context.num_blocks - 1)

    def prepared(self, job: Job) -> ModelMethod:
        """The same after whatever passes over the whole model it needs."""
        views = ModelViews(self, job)
        found = self
        if self.row.prepass is not None:
            settings = {**self.row.defaults(), **self.config.merge_parameters}
            shared = self.row.prepass(list(views), **settings)
            contexts = {name: replace(context, shared=shared) for name, context in self.contexts.items()}
            found = replace(self, contexts=contexts)
        if self.config.depth_scaling is None:
            return found
        return found._scaled_by_depth(ModelViews(found, job))

    def _scaled_by_depth(self, views: ModelViews) -> ModelMethod:
        r"""LiNeS: alpha and beta of the factors :math:`\alpha + \beta\, l / (L - 1)`.

        *LiNeS*, https://arxiv.org/abs/2410.17146:
        :math:`\alpha = \frac1K |\sum_k \tau_k|_1 / |\tau|_1`, norms over the whole model. β is tuned there; without
        data it is (K - 1) α here (our choice): of task arithmetic with λ = 1, the first block becomes the average and
        the last one the sum.
        """
        wanted, num_experts = self.config.depth_scaling, len(self.config.experts)
        if isinstance(wanted, (list, tuple)):
            return replace(self, alpha=float(wanted[0]), beta=float(wanted[1]))
        if self.row.scale_of_sum is not None:
            settings = {**self.row.defaults(), **self.config.merge_parameters}
            scale = self.row.scale_of_sum(num_experts, **settings)
            alpha = 1 / (num_experts * scale) if scale else 1.0
        else:
            norms = [tiles.l1_norms() for tiles in views.all_tiles()]
            of_sum, of_merged = (sum(column) for column in zip(*norms, strict=True))
            alpha = of_sum / of_merged / num_experts if of_merged else 1.0
        return replace(self, alpha=alpha, beta=(num_experts - 1) * alpha)


def method_for(job: Job, config: MediatorSettings, oriented: Mapping[str, bool]) -> ModelMethod:
    """The configuration's merge method for a model, with its data opened and checked.

    Args:
        job: base and experts.
        config: names method, parameters and data.
        oriented: tensors that are merged → whether they are read as the transpose of what is stored.

    Raises:
        ConfigError: the method needs a base that is not at hand, or its data cannot be used.
    """
    row = MERGE_METHODS[config.merge_method]
    if row.needs_base and isinstance(job.base, MeanCheckpoint):
        raise ConfigError(
            f"merge_method {config.merge_method!r} needs the base: the mean of the experts stands in for it, and task "
            "vectors to the mean add up to zero. Give base=, or take another method, e.g. 'average'."
        )
    kinds = _kinds(job.structure)
    experts = tuple(sorted(job.experts))
    contexts = {
        name: TensorContext(
            name=name,
            experts=experts,
            stored_shape=tuple(job.base.tensors[name].shape),
            is_transposed=is_transposed,
            kind=kinds.get(name, OTHER),
            block=block_of(name, job.structure),
            num_blocks=job.structure.num_blocks,
            seed=config.seed,
        )
        for name, is_transposed in oriented.items()
    }
    if row.open_data is not None and config.merge_data is not None:
        data = row.open_data(Path(config.merge_data).expanduser(), contexts)
        check_measured_models(getattr(data, "fingerprints", {}), job)
        contexts = {name: replace(context, data=data) for name, context in contexts.items()}
    return ModelMethod(config, contexts)


def block_of(name: str, structure: Structure) -> int | None:
    """The block in which a tensor lies; None outside of the blocks."""
    prefix = f"{structure.blocks}."
    number = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdigit() else None


def _kinds(structure: Structure) -> dict[str, str]:
    """Weights of layers → their kind."""
    kinds = {f"{layer.name}.weight": LINEAR for layer in (*structure.layers, *structure.gate_layers)}
    # The embedding stands first.
    outer = zip(structure.outer, (EMBEDDING, HEAD), strict=False)
    return kinds | {f"{layer.name}.weight": kind for layer, kind in outer}


class ModelViews:
    """The tensors of a model, one after the other.

    Args:
        method: what they are seen for.
        job: the checkpoints.
    """

    def __init__(self, method: ModelMethod, job: Job) -> None:
        self._method = method
        self.checkpoints = [job.base, *(job.experts[name] for name in sorted(job.experts))]
        self.dtype = job.dtype
        self._space = Workspace()

    def __iter__(self) -> Iterator[ModelView]:
        return (ModelView(self, context) for context in self._method.contexts.values())

    def tiles_of(self, context: TensorContext) -> TensorTiles:
        """One tensor, of which nothing is read before it is asked for rows, unless it is stored as its transpose."""
        method = self._method.of_tensor(context.name, context.is_transposed)
        return TensorTiles(context.name, self.checkpoints, self.dtype, method, self._space, context.is_transposed)

    def all_tiles(self) -> Iterator[TensorTiles]:
        """Of every tensor."""
        return (self.tiles_of(context) for context in self._method.contexts.values())


class ModelView:
    """A ``TensorView``: reads its tensor anew each time, so that a list of all views of a model holds no weights."""

    def __init__(self, views: ModelViews, context: TensorContext) -> None:
        self.context = context
        self._views = views

    def tiles(self) -> Iterator[tuple[Tensor, TensorContext]]:
        """Task vectors of some rows at a time; NaN and infinity are refused."""
        for task_vectors, context in self._views.tiles_of(self.context).task_vectors():
            self._check(task_vectors)
            yield task_vectors, context

    def whole(self) -> tuple[Tensor, TensorContext]:
        """Task vectors of the whole tensor; NaN and infinity are refused."""
        task_vectors, context = self._views.tiles_of(self.context).whole_task_vectors()
        self._check(task_vectors)
        return task_vectors, context

    def _check(self, task_vectors: Tensor) -> None:
        if bool(torch.isfinite(task_vectors).all()):
            return
        checkpoints = self._views.checkpoints
        plain = TensorTiles(self.context.name, checkpoints, self._views.dtype, "base", Workspace())
        for tile in plain:
            check_finite(self.context.name, tile, checkpoints)
