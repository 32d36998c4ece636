"""Adding an expert to a built model and taking one out; the backbone and the other experts are not touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..bank.column_map import Rows, families, without_input
from ..bank.sparse_delta import SparseDelta
from ..checkpoints.opening import Checkpoint, ModelCheckpoint, open_checkpoints
from ..errors import ConfigError, RoutingError, UnsupportedError
from ..merge.compatibility import check_job, coarsest, split_job
from ..merge.delta_packing import own_factors, pack_delta
from ..merge.families import least_cosine
from ..merge.family_packing import RESIDUAL_DENSITY, residual
from ..merge.locks import check_locks
from ..merge.tiles import refuse_not_finite
from ..methods.encoding import ENCODINGS
from ..methods.encoding.bitmaps import count_bits
from ..routing.calibration_data import Columns, hash_folds
from ..routing.decision_rule import Negatives
from ..routing.routers import Router, SpectralRouter
from ..routing.wording import wording_basis
from ..storage import FloatType, to_tensor
from .active_adapter import ActiveAdapter
from .condensing import find_equal, nearest_family
from .config import FALLBACK_EXPERT, MediatorConfig, expert_name_faults
from .fitting import read_texts, row_features, settle
from .fitting_from_deltas import expert_differences, router_from_deltas
from .fitting_rows import augmented_rows, hard_negative_rows, negative_rows, reference_rows, token_rows
from .layer import MediatorLayer, reading_weights
from .merged_weight import is_plain, plain_weight
from .routing import PromptRouter, Reading
from .saving import backbone_state, storage_type
from .sharded import check_not_sharded


def add_expert(
    prompts: PromptRouter,
    name: str,
    checkpoint: str,
    texts: Any = None,
    tokenizer: Any = None,
    *,
    text_column: str = "prompt",
    batch_size: int = 16,
    max_length: int = 2048,
    reset_router: bool = False,
    background: Any = None,
) -> None:
    """Add one expert to a built model.

    Its deltas are taken against the backbone as it stands, which stays as it is: an averaged backbone does not take the
    new expert in, and what the expert changed outside the routed layers is not used. A fitted router is extended in
    closed form; the other experts' scores and held-out statistics stay the same, bit for bit. A router that was made
    from deltas is made again, with the new expert's delta, and takes the tokenizer alone, no texts.

    Args:
        prompts: of a model whose backbone is not quantised; its active adapter gets the expert.
        name: of the expert.
        checkpoint: folder or hub id of a fine-tune of the same base.
        texts: the expert's calibration prompts, in any form that ``fit_router`` takes for one expert. Needed where the
            router is fitted.
        tokenizer: the backbone's; needed with ``texts``.
        text_column: column with the prompt, where ``texts`` has columns.
        batch_size: texts per forward pass.
        max_length: longer texts are cut after this many tokens.
        reset_router: leave the router unfitted, to be fitted again with texts of all experts.
        background: background prompts of yours, as for ``fit_router``; None takes those of the last fit.

    Raises:
        ConfigError: the name cannot be used.
        CheckpointError, CheckpointMismatchError: the checkpoint cannot be used. Nothing has been changed then.
        RoutingError: texts are missing or cannot be used. Nothing has been changed then.
        UnsupportedError: the backbone is quantised, or the router cannot be extended.
    """
    active = prompts.active
    config = active.config
    _check_name(name, config)
    reading, rows_before = prompts.reading(), config.column_map
    with reading_weights(active.model):
        deltas, rows = _deltas(active, name, checkpoint)
    background = prompts.background if background is None else background
    if isinstance(reading.router, SpectralRouter) and reading.router.is_fitted and not reset_router:
        if texts is not None:
            raise RoutingError(
                "the router was made from deltas and takes no texts: leave them out, or use reset_router=True and fit "
                "the router on texts of all experts."
            )
        router: Router = _made_again(prompts, name, deltas, rows, tokenizer, batch_size, max_length, background)
    else:
        router = _extended(
            prompts,
            reading,
            name,
            texts,
            tokenizer,
            text_column,
            batch_size,
            prompts.within_positions(max_length),
            reset_router,
            background,
        )
    layers = active.layers
    with active.changes_wait():
        if active.router is not reading.router:
            raise RoutingError(f"the router was fitted or edited while {name!r} was being added. Add it again.")
        if config.column_map is not rows_before:
            raise RoutingError(f"the experts were condensed while {name!r} was being added. Add it again.")
        for layer, delta in deltas.items():
            layers[layer].put_delta(active.name, name, delta)
        if config.provenance is not None:
            known = dict(config.provenance.get("experts", {}))
            config.provenance = {**config.provenance, "experts": {**known, name: str(checkpoint)}}
        experts = {**config.experts, name: str(checkpoint)}
        active.put_router(router, [*(config.expert_names or ()), name], experts, rows)


def remove_expert(active: ActiveAdapter, name: str) -> None:
    """Take one expert out of a built model: its deltas, its column, and its place in the router.

    Raises:
        ConfigError: there is no such expert, or it is the last one.
        UnsupportedError: the router cannot forget one expert alone; it is fitted again instead.
    """
    with active.changes_wait():
        _remove(active, name)


def _remove(active: ActiveAdapter, name: str) -> None:
    config = active.config
    names = list(config.expert_names or ())
    if name not in names or len(names) == 1:
        what = "the only expert" if name in names else "no expert of this model"
        raise ConfigError(f"{name!r} is {what}, so it cannot be removed; the model has {names}.")
    router = active.router
    if router.is_fitted:
        number = names.index(name)
        smaller = copy.deepcopy(router)
        smaller.remove_class(number)
        if router.rule is not None:
            smaller.set_rule(router.rule.without_expert(number))
        known = router.known
        if known.has_texts:
            stay = known.labels != number
            labels = known.labels[stay]
            fewer = known._replace(
                ood_score=known.ood_score[stay], labels=labels - (labels > number).long(), distance=known.distance[stay]
            )
            smaller.set_known(fewer, float(router.temperature))
    else:
        smaller = type(router)(router.num_experts - 1, router.num_features, router.seed)
    paths = {other: path for other, path in config.experts.items() if other != name}
    # First nobody asks for it any more: a pass that finds its deltas gone then sees that it was removed.
    before = config.column_map
    rows = None if before is None else without_input(before, name)
    active.put_router(smaller, [other for other in names if other != name], paths, rows)
    for stored in [name] if before is None or rows is None else set(before) - set(rows):
        for layer in active.layers.values():
            layer.remove_delta(active.name, stored)
    if config.provenance is not None:
        experts = {other: path for other, path in config.provenance.get("experts", {}).items() if other != name}
        config.provenance = {**config.provenance, "experts": experts}


def _check_name(name: str, config: MediatorConfig) -> None:
    faults = list(expert_name_faults({name: ""}))
    if name in (config.expert_names or ()):
        faults.append(f"the model has an expert {name!r} already. Remove it first, or choose another name.")
    if faults:
        raise ConfigError("\n".join(faults))


def _deltas(
    active: ActiveAdapter, name: str, path: str
) -> tuple[dict[str, SparseDelta], dict[str, dict[str, float]] | None]:
    """The new expert's delta of every routed layer, and the column map with the expert.

    Where the bank has families, the expert joins the nearest one, if it is near enough: what is stored of it is what it
    has beside the shared delta. Where it equals an expert of a bank with a column map, nothing more is stored.
    """
    config = active.config
    label = f"expert {name!r}"
    checkpoint = open_checkpoints({label: str(path)})[label]
    layers = active.layers
    check_not_sharded(active.model, "add_expert")
    for layer in layers.values():
        if not is_plain(layer.base_layer):
            raise UnsupportedError("deltas against a quantised backbone are not exact. Load it unquantised to add one.")
    state = backbone_state(active.model)
    backbone = SimpleNamespace(config=active.model.config, state_dict=lambda: state, name_or_path="the backbone")
    job = check_job(ModelCheckpoint(backbone, "the backbone"), {name: checkpoint})  # type: ignore[arg-type]
    check_locks(job)
    job = split_job(job)
    dtype = coarsest([storage_type(config), job.dtype])
    checkpoint = job.experts[name]  # with the model's names
    nearest = nearest_family(
        active, lambda layer: _difference(layers[layer], layer, checkpoint, dtype), least_cosine(config)
    )
    family = None if nearest is None else nearest[0]
    deltas = {layer: _delta(module, layer, checkpoint, name, active, dtype, family) for layer, module in layers.items()}
    if config.column_map is None:
        return deltas, None
    rows: dict[str, dict[str, float]] = {stored: dict(row) for stored, row in config.column_map.items()}
    joined = set() if family is None else set(rows[family])
    alike = [
        stored for stored in rows if set(rows[stored]) & joined or (family is None and not _is_shared(stored, rows))
    ]
    twin = find_equal(active, deltas, [stored for stored in alike if not stored.startswith("_")])
    if family is not None:
        rows[family][name] = 1.0
    if twin is None:
        rows[name] = {name: 1.0}
    else:
        rows[twin][name] = 1.0
    return ({} if twin is not None else deltas), rows


def _is_shared(stored: str, rows: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the experts of a stored column have parts of their deltas elsewhere, or it is the fallback's."""
    names = set(rows[stored])
    return stored == FALLBACK_EXPERT or any(names & set(row) for other, row in rows.items() if other != stored)


def _difference(layer: MediatorLayer, layer_name: str, checkpoint: Checkpoint, dtype: FloatType) -> Tensor:
    """An expert's weight minus the backbone's: (O, I) float32."""
    weight = _read(checkpoint, f"{layer_name}.weight", dtype)
    if layer.is_transposed:
        weight = weight.T
    return (weight - plain_weight(layer.base_layer).float().cpu()).contiguous()


def _delta(
    layer: MediatorLayer,
    layer_name: str,
    checkpoint: Checkpoint,
    name: str,
    active: ActiveAdapter,
    dtype: FloatType,
    family: str | None,
) -> SparseDelta:
    base, config = layer.base_layer, active.config
    delta = _difference(layer, layer_name, checkpoint, dtype)
    bias = None
    if base.bias is not None:
        bias = _read(checkpoint, f"{layer_name}.bias", dtype) - base.bias.data.float().cpu()
    tensor = f"{layer_name}.weight"
    factors = own_factors(config, checkpoint, tensor, layer.is_transposed)
    density = _density(layer, active, family)
    shared = None if family is None else layer.bank(active.name).stored(family)
    if shared is not None:
        packed = residual(config, f"{tensor}/{name}", delta, bias, shared, density, dtype)
    elif factors is not None:
        packed = SparseDelta.from_factors(*factors, bias)
    else:
        packed = pack_delta(config, f"{tensor}/{name}", delta, density, dtype, bias)
    return packed.to(base.weight.device)


def _density(layer: MediatorLayer, active: ActiveAdapter, family: str | None) -> float:
    """The density of the layer's other experts, or of a family's other residuals: a plan may give each block its own.

    Where entries are drawn or singular values are kept, it cannot be counted, and the configuration's is taken.
    """
    config = active.config
    usual = config.density if family is None or config.density == 1.0 else RESIDUAL_DENSITY
    if config.sparsifier != "magnitude" or not ENCODINGS[config.encoding].has_positions:
        return usual
    rows = config.column_map or {}
    bank = layer.bank(active.name)
    for other in bank.names:
        is_residual = other in rows and _is_shared(other, rows) and not other.startswith("_")
        if family is None:
            is_alike = other in families(rows) if other.startswith("_") else not is_residual
        else:
            is_alike = is_residual and bool(set(rows[other]) & set(rows[family]))
        delta = bank.stored(other) if is_alike and other != FALLBACK_EXPERT else None
        if delta is not None:
            return count_bits(delta.mask) / (layer.shape[0] * layer.shape[1])
    return usual


def _read(checkpoint: Checkpoint, tensor: str, dtype: FloatType) -> Tensor:
    rows = checkpoint.tensors[tensor].shape[0]
    # Rounded to the storage dtype first, like every checkpoint of the build.
    weight = to_tensor(checkpoint.read_rows(tensor, 0, rows)).to(dtype.torch).float()
    refuse_not_finite(checkpoint, tensor, int((~weight.isfinite()).sum()), 0, rows)
    return weight


def _made_again(
    prompts: PromptRouter,
    name: str,
    deltas: Mapping[str, SparseDelta],
    rows: Rows | None,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    background: Any,
) -> Router:
    """A router from the deltas of the experts and of a new one that is not in the bank yet."""
    if tokenizer is None:
        raise RoutingError("the router was made from deltas: give the tokenizer, by which it is made again.")
    active = prompts.active
    names = [*(active.config.expert_names or ()), name]
    by_layer = {id(layer): deltas.get(path) for path, layer in active.layers.items()}

    def new(stored: str, layer: MediatorLayer) -> SparseDelta | None:
        return by_layer[id(layer)] if stored == name else None

    differences = expert_differences(names, active.name, rows, new)
    return router_from_deltas(prompts, names, differences, tokenizer, batch_size, max_length, background).router


def _extended(
    prompts: PromptRouter,
    reading: Reading,
    name: str,
    texts: Any,
    tokenizer: Any,
    text_column: str,
    batch_size: int,
    max_length: int,
    reset_router: bool,
    background: Any,
) -> Router:
    """A copy of the router that knows the new expert."""
    config, router = prompts.active.config, reading.router
    if reset_router or not router.is_fitted:
        return type(router)(router.num_experts + 1, router.num_features, router.seed)
    if texts is None or tokenizer is None:
        raise RoutingError(
            f"the router is fitted: give calibration texts of {name!r} and the tokenizer, or reset_router=True and fit "
            "it again afterwards."
        )
    if isinstance(texts, Mapping):
        raise RoutingError(f"give the texts of {name!r} alone, not a dict.")
    data = read_texts({name: texts}, [name], tokenizer, Columns(text_column), None, config.seed, "train")
    rows = token_rows(tokenizer, data.texts, max_length)
    size = len(rows)
    varied = augmented_rows(config, tokenizer, rows, max_length, data.labels)
    against = None
    if router.rule is not None:
        against = negative_rows(config, tokenizer, data, rows, background, True, max_length)
        others = against.rows
    else:
        # A router that was fitted without background prompts takes no hard negatives.
        takes_neighbours = router.uses_hard_negatives and len(router.background_novelty)
        others = hard_negative_rows(config, tokenizer, rows, data.labels, max_length) if takes_neighbours else []
    features = row_features(prompts, rows + varied + others, batch_size, None, False, reading=reading)
    features = features.to(router.known_novelty.device)
    num_own = size + len(varied)
    folds = torch.tensor(hash_folds(data.texts, data.labels, router.num_folds, config.seed))
    by_way = features[:num_own].unflatten(0, (-1, size))
    near = features[num_own:] if against is None else features[:0]
    basis = None
    reference = None if against is None else reference_rows(tokenizer, config.seed, max_length)
    if reference is not None:
        basis = wording_basis(row_features(prompts, reference.rows, batch_size, None, False), reference.tasks)
    negatives = None if against is None else against.with_features(features[num_own:], basis)
    larger = extend_router(router, by_way[0], folds, by_way[1:], near.unflatten(0, (-1, size)), negatives)
    settle(larger, prompts.active)
    return larger


def extend_router(
    router: Router,
    features: Tensor,
    folds: Tensor,
    augmented: Tensor,
    hard_negatives: Tensor,
    negatives: Negatives | None = None,
) -> Router:
    """A copy of a fitted router with one more expert, whose held-out statistics is taken fold by fold.

    Args:
        router: left as it is.
        features: (N, H) of the new expert's texts.
        folds: (N,) number of the fold that holds each text out.
        augmented: (V, N, H) of altered copies of the texts; V may be 0.
        hard_negatives: (W, N, H) of other requests about the texts' subjects; W may be 0.
        negatives: background prompts and hard negatives, for a router with a decision rule.

    Raises:
        RoutingError: the router has a decision rule, and there are no negatives to fit the new expert's part of it.
    """
    rule = router.rule
    if rule is not None and negatives is None:
        raise RoutingError(
            "the router has a decision rule, and the tokenizer can read none of the library's background prompts. Give "
            "yours: background=[...], or use reset_router=True and fit it again."
        )
    ood_score, distance = (torch.zeros(len(features), device=features.device) for _ in range(2))
    for fold in folds.unique().tolist():
        held_out = folds == fold
        trial = copy.deepcopy(router)
        rest = torch.cat([features[~held_out], augmented[:, ~held_out].flatten(0, 1)])
        trial.add_class(rest, hard_negatives[:, ~held_out] if rule is None else None)
        if rule is not None and negatives is not None:
            trial.set_rule(rule.with_expert(rest, negatives))
        with torch.no_grad():
            ood_score[held_out], distance[held_out] = (
                trial.ood_score(features[held_out]),
                trial.distance(features[held_out]),
            )
    larger = copy.deepcopy(router)
    rows = torch.cat([features, augmented.flatten(0, 1)])
    larger.add_class(rows, hard_negatives if rule is None else None)
    if rule is not None and negatives is not None:
        larger.set_rule(rule.with_expert(rows, negatives))
    known = router.known
    more = known._replace(
        ood_score=torch.cat([known.ood_score, ood_score.to(known.ood_score)]),
        labels=torch.cat([known.labels, torch.full_like(known.labels[:1], router.num_experts).expand(len(features))]),
        distance=torch.cat([known.distance, distance.to(known.distance)]),
    )
    larger.set_known(more, float(router.temperature))
    return larger
