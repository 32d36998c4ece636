"""Making a router from the experts' deltas, without texts of theirs: deltas and background prompts → router."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.column_map import Rows, identity_rows
from ..bank.sparse_delta import SparseDelta
from ..errors import RoutingError, UnsupportedError
from ..methods.sparsifying.svd import low_rank
from ..ranks import Ranks
from ..routing.background import kind_numbers
from ..routing.decision_rule import equal_weights, family_numbers
from ..routing.ood import gate_coefficients
from ..routing.routers import SpectralRouter
from .config import FALLBACK_EXPERT, FitSettings, MediatorConfig
from .fitting import row_features, settle
from .fitting_rows import NegativeRows, background_rows
from .layer import MediatorLayer, routed_layers
from .merged_weight import mixed_delta
from .routing import PromptRouter
from .sharded import check_not_sharded

KIND = "spectral"
_DEPTH_SHARE = 0.25
"""Share of the blocks after which prompts are read, with ``router_layer="auto"`` (``docs/routing.md``)."""

_NUM_DIRECTIONS = 16
_SAME_DIRECTIONS = 0.99
"""From this share of common directions on, two experts' responses cannot be told apart."""

Differences = Callable[[str, MediatorLayer], Tensor]
"""(expert, layer) → the expert's weight minus the base's, (O, I) float32."""


class DeltaReport(NamedTuple):
    """What background prompts say of a router that was made from deltas; nothing is known of the experts' prompts."""

    router_layer: int
    """After how many blocks the hidden state is read."""

    layers: list[str]
    """Names of the layers whose deltas were taken: those of the next block that read this state."""

    num_background: int
    """Number of background prompts."""

    unknown_to_expert: float
    """Mean weight that background prompts give to experts, each judged by means, deviations and border of the other
    kinds of families, families counting the same; ``ood_beta`` was asked for."""

    base_weight_by_family: dict[str, float]
    """Background family → mean weight of the fallback, when its kind was left out."""


class DeltaFit(NamedTuple):
    """A router made from deltas, and what goes with it."""

    router: SpectralRouter
    settings: FitSettings
    report: DeltaReport


def fit_router_from_deltas(
    prompts: PromptRouter,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int,
    background: Any,
    show_progress: bool,
    ranks: Ranks,
) -> DeltaReport:
    """See :meth:`MediatorModel.fit_router_from_deltas`."""
    active = prompts.active
    names = list(active.config.expert_names or ())
    differences = expert_differences(names, active.name, active.config.column_map)
    made = router_from_deltas(
        prompts, names, differences, tokenizer, batch_size, max_length, background, show_progress, ranks
    )
    active.put_fit(made.router, names, made.settings)
    prompts.background = background
    return made.report


def router_from_deltas(
    prompts: PromptRouter,
    names: Sequence[str],
    differences: Differences,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    background: Any,
    show_progress: bool = False,
    ranks: Ranks | None = None,
) -> DeltaFit:
    """A router of some experts.

    Args:
        prompts: of the model.
        names: of the experts; the columns of the scores, in this order.
        differences: of each expert from the base.
        tokenizer: the backbone's.
        batch_size: background prompts per forward pass.
        max_length: longer ones are cut after this many tokens.
        background: the user's prompts, added to the library's; None for the library's alone.
        show_progress: a bar on the error stream.
        ranks: that share the reading.

    Raises:
        RoutingError: there are too few background prompts.
        UnsupportedError: no routed layer reads the hidden state at the wanted depth, or two experts cannot be told
            apart by their deltas.
    """
    active = prompts.active
    check_not_sharded(active.model, "a router from deltas")
    config = active.config
    against = NegativeRows.of(background_rows(config.seed, tokenizer, background, prompts.within_positions(max_length)))
    if not against.can_make_a_rule:
        raise RoutingError(
            "a router without texts takes its border from background prompts, and there are too few: the tokenizer can "
            "read none of the library's, or background=[] leaves them out. Give 20 or more: background=[...]."
        )
    block = _block(prompts)
    settings = prompts.learned(tokenizer)._replace(
        fitted_router_layer=block,
        fitted_router=KIND,
        fitted_quantization=active.uncorrected_quantization(),
    )
    readers = _first_readers(prompts, block, against.rows[0])
    router = SpectralRouter(len(names), active.model.config.get_text_config().hidden_size, config.seed)
    router.is_trainable = active.router.is_trainable
    router.train(active.router.training)
    directions = _directions(names, differences, readers.layers, config.seed)
    router.set_directions(readers.scale[:, None] * directions)
    settle(router, active)
    reading = prompts.reading(settings)._replace(router=router)
    responses = row_features(prompts, against.rows, batch_size, None, show_progress, ranks, reading=reading)
    families, kinds = family_numbers(against.families), torch.tensor(kind_numbers(against.families))
    if len(kinds.unique()) == 1:
        kinds = torch.arange(len(kinds))
    router.set_background(responses, equal_weights(families), kinds)
    return DeltaFit(router, settings, _report(router, config, block, list(readers.layers), against, families))


def expert_differences(
    names: Sequence[str],
    adapter_name: str,
    rows: Rows | None,
    new: Callable[[str, MediatorLayer], SparseDelta | None] = lambda stored, layer: None,
) -> Differences:
    """Differences of experts from the base, from what a bank stores.

    Args:
        names: of the experts.
        adapter_name: of the adapter.
        rows: its column map.
        new: (stored column, layer) → a delta that the bank does not have yet, or None.
    """
    table = identity_rows([*names, FALLBACK_EXPERT]) if rows is None else rows

    def difference(expert: str, layer: MediatorLayer) -> Tensor:
        entries = {stored: row.get(expert, 0.0) - row.get(FALLBACK_EXPERT, 0.0) for stored, row in table.items()}
        mix = tuple((stored, entry) for stored, entry in sorted(entries.items()) if entry)
        total, mixed = torch.zeros(layer.shape), mixed_delta(layer.bank(adapter_name), mix)
        for stored, entry in mix:
            delta = new(stored, layer)
            total += 0 if delta is None else entry * delta.dense().cpu()
        return total if mixed is None else total + mixed.cpu()

    return difference


def _block(prompts: PromptRouter) -> int:
    """Number of the block whose deltas are taken: the one that is set, or that with deltas nearest to a quarter of all.

    Raises:
        UnsupportedError: the one that is set has none, or none has.
    """
    config, blocks = prompts.active.config, prompts.blocks
    candidates = [number for number, block in enumerate(blocks) if routed_layers(block)]
    wanted = config.router_layer if isinstance(config.router_layer, int) else round(_DEPTH_SHARE * len(blocks))
    block = min(candidates, key=lambda number: (abs(number - wanted), number), default=None)
    if block is None or (isinstance(config.router_layer, int) and block != wanted):
        raise UnsupportedError(
            f"a router without texts needs deltas in the block after {wanted} blocks; blocks with deltas: "
            f"{candidates}. Set router_layer to one of them or to 'auto', or fit the router on texts."
        )
    return block


class _Readers(NamedTuple):
    """What reads the hidden state first in a block."""

    layers: dict[str, MediatorLayer]
    """Routed layers that take the same input as the first of them that is called: query, key and value."""

    scale: Tensor
    """(H,) by which the norm before them multiplies a state of mean square 1; ones where there is no norm."""


def _first_readers(prompts: PromptRouter, block: int, row: list[int]) -> _Readers:
    """Found by one pass, whatever the layers are called."""
    calls: list[tuple[nn.Module, Any, Any]] = []
    thread = threading.get_ident()

    def hear(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and threading.get_ident() == thread:
            calls.append((module, args[0], output))

    ids = torch.tensor([row], device=prompts.active.device)
    handles = [module.register_forward_hook(hear) for module in prompts.blocks[block].modules()]
    try:
        with torch.no_grad():
            prompts.states_at([block + 1], ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    state = next((read for module, read, _ in calls if isinstance(module, MediatorLayer)), None)
    if state is None:
        raise UnsupportedError(f"no layer with deltas is called in block {block}. Fit the router on texts.")
    readers = [module for module, read, _ in calls if isinstance(module, MediatorLayer) and read is state]
    layers = {name: layer for name, layer in prompts.active.layers.items() if layer in readers}
    norm = next((module for module, _, output in calls if output is state and not list(module.children())), None)
    return _Readers(layers, torch.ones(state.shape[-1]) if norm is None else _scale_of(norm, state))


@torch.no_grad()
def _scale_of(norm: nn.Module, state: Tensor) -> Tensor:
    """(H,) the scale of a norm, whether it centres its input or not and however it keeps the scale."""
    probe = torch.ones_like(state.flatten(0, -2)[:1])
    probe[:, 1::2] = -1
    return ((norm(probe) - norm(-probe)) / 2 * probe)[0].float().cpu()


def _directions(names: Sequence[str], differences: Differences, layers: dict[str, MediatorLayer], seed: int) -> Tensor:
    """(K, H, R): each expert's top right singular vectors; zeros where its delta has fewer.

    Raises:
        UnsupportedError: two different experts have the same.
    """

    def stacked(name: str) -> Tensor:
        return torch.cat([differences(name, layer) for layer in layers.values()])

    directions = []
    for name in names:
        matrix = stacked(name)
        # The same start for all, so that an expert's directions do not depend on its place.
        right = low_rank(matrix, _NUM_DIRECTIONS, torch.Generator().manual_seed(seed))[1]
        right = F.normalize(right, dim=1)
        directions.append(F.pad(right, (0, 0, 0, _NUM_DIRECTIONS - len(right))).T)
    for one, other in combinations(range(len(names)), 2):
        common = float((directions[one].T @ directions[other]).square().sum())
        if common > _SAME_DIRECTIONS * _NUM_DIRECTIONS and not torch.equal(stacked(names[one]), stacked(names[other])):
            raise UnsupportedError(
                f"the deltas of {names[one]!r} and {names[other]!r} have the same directions, so a router without "
                "texts cannot tell these experts apart. With two experts and an averaged backbone each delta is minus "
                "the other: build with fallback='base', or fit the router on texts."
            )
    return torch.stack(directions)


def _report(
    router: SpectralRouter,
    config: MediatorConfig,
    block: int,
    layers: list[str],
    against: NegativeRows,
    families: Tensor,
) -> DeltaReport:
    """What the background prompts of each kind get by the border of the others."""
    known = router.known
    share, scores = known.background_share, known.background_novelty.cpu()
    assert share is not None
    share, kinds = share.cpu(), router.background_kinds.cpu()
    to_expert = torch.zeros(len(scores))
    for kind in kinds.unique():
        own = kinds == kind
        others = known._replace(
            ood_score=known.ood_score.cpu(),
            background_novelty=scores[~own],
            background_share=share[~own] / share[~own].sum(),
        )
        nearest = torch.zeros(int(own.sum()), dtype=torch.long)
        found = gate_coefficients(scores[own], scores[own], nearest, others, config.ood_alpha, config.ood_beta)
        to_expert[own] = found.gate_coefficient
    by_family = {name: 1 - float(to_expert[families == number].mean()) for number, name in enumerate(against.names)}
    return DeltaReport(block, layers, len(scores), float((to_expert * share).sum()), by_family)
