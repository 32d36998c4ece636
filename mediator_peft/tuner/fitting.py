"""Fitting the router of a model: rows of token ids → features → router."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy as shallow_copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RoutingError
from ..progress import bar_progress, no_progress
from ..ranks import Ranks
from ..routing.calibration import CalibrationReport, calibrate
from ..routing.calibration_data import Columns, LabelledTexts, labelled_texts
from ..routing.decision_rule import Negatives
from ..routing.depth import choose_depth
from ..routing.feature_cache import FeatureCache
from ..routing.routers import Router
from ..routing.wording import choose_depth_by_wordings, wording_basis
from .active_adapter import ActiveAdapter
from .chat_turns import padded, unwrapped
from .fitting_rows import augmented_rows, negative_rows, reference_rows, token_rows
from .layer import reading_weights
from .prompt_form import PromptForm
from .routing import PromptRouter, Reading
from .sharded import check_not_sharded

_HASHED_AT_ONCE = 1 << 24
_FEWEST_TOKENS = 512

DEPTH_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the blocks after which the hidden state may be read, with ``router_layer="auto"`` (``docs/routing.md``)."""


def fit_router(
    prompts: PromptRouter,
    dataset: Any,
    tokenizer: Any,
    columns: Columns,
    *,
    batch_size: int,
    max_length: int,
    max_samples: int | None,
    split: str,
    cache_folder: str | os.PathLike[str] | None,
    background: Any,
    augmented: bool,
    hard_negatives: bool,
    show_progress: bool,
    ranks: Ranks,
) -> CalibrationReport:
    """See :meth:`MediatorModel.fit_router`."""
    check_not_sharded(prompts.active.model, "fit_router")
    live = prompts.active.config
    names = list(live.expert_names or ())
    config = shallow_copy(live)
    data = read_texts(dataset, names, tokenizer, columns, max_samples, config.seed, split)
    # Whoever routes meanwhile goes on by the last fit's settings.
    quantization = prompts.active.uncorrected_quantization()
    settings = prompts.learned(tokenizer)._replace(fitted_router=None, fitted_quantization=quantization)
    settings.write_to(config)
    reading = prompts.reading(settings)
    reading = reading._replace(router=prompts.of_kind(reading.router, live, settings))
    max_length = prompts.within_positions(max_length)
    rows = token_rows(tokenizer, data.texts, max_length)
    num_texts = len(rows)
    copies = augmented_rows(config, tokenizer, rows, max_length, data.labels) if augmented else []
    against = negative_rows(config, tokenizer, data, rows, background, hard_negatives, max_length)
    layers = depths(prompts)

    def read(some: list[list[int]]) -> Tensor:
        return row_features(prompts, some, batch_size, cache_folder, show_progress, ranks, layers, reading)

    basis = None
    reference = reference_rows(tokenizer, config.seed, max_length) if against.can_make_a_rule else None
    if reference is not None:
        states = read(reference.rows)
        chosen = choose_depth_by_wordings(list(states.unbind(1)), *reference[1:]) if len(layers) > 1 else 0
        basis, layers = wording_basis(states[:, chosen], reference.tasks), [layers[chosen]]
    features = read([*rows, *copies, *against.rows])
    num_own = num_texts + len(copies)
    old = reading.router
    router = type(old)(old.num_experts, old.num_features, config.seed)
    router.is_trainable = old.is_trainable
    router.train(old.training)
    labels = torch.tensor(data.labels)
    keys = data.groups or data.texts
    new_router = partial(type(router), router.num_experts, router.num_features, config.seed)

    def parts(place: int) -> tuple[Tensor, Tensor | None, Negatives | None]:
        return (
            features[:num_texts, place],
            _by_way(features[num_texts:num_own, place], num_texts),
            against.with_features(features[num_own:, place], basis),
        )

    candidates = [parts(place) for place in range(len(layers))]
    place = 0 if len(layers) == 1 else choose_depth(candidates, new_router, labels, keys)
    own, altered, negatives = candidates[place]
    report = calibrate(
        new_router,
        router,
        own,
        labels,
        keys,
        names,
        config.seed,
        config.ood_alpha,
        augmented=altered,
        negatives=negatives,
        family_names=against.names,
        ood_beta=config.ood_beta,
    )
    settle(router, prompts.active)
    prompts.active.put_fit(router, names, settings._replace(fitted_router_layer=layers[place]))
    prompts.background = background
    return report._replace(router_layer=layers[place])


def depths(prompts: PromptRouter) -> list[int]:
    """After how many blocks features are read: the one that is set, or those among which the fit chooses."""
    if prompts.active.config.router_layer != "auto":
        return [prompts.router_layer]
    num_blocks = prompts.active.config.num_blocks or len(prompts.blocks)
    return sorted({max(1, round(share * num_blocks)) for share in DEPTH_SHARES})


def _by_way(features: Tensor, num_texts: int) -> Tensor | None:
    """(W * N, H) → (W, N, H); None for none."""
    return features.unflatten(0, (-1, num_texts)) if len(features) else None


def read_texts(
    dataset: Any,
    names: list[str],
    tokenizer: Any,
    columns: Columns,
    max_samples: int | None,
    seed: int,
    split: str,
) -> LabelledTexts:
    """Calibration texts of a model's experts; chats are rendered with the tokenizer's template.

    Raises:
        RoutingError: these are no texts, or this is no tokenizer.
    """
    if not callable(tokenizer):
        raise RoutingError(f"give the backbone's tokenizer, got {type(tokenizer).__name__}.")
    template: Any = getattr(unwrapped(tokenizer), "apply_chat_template", None)

    def render(chat: list[dict[str, str]]) -> str:
        text: str = template(chat, tokenize=False, add_generation_prompt=True)
        return text

    return labelled_texts(
        dataset,
        names,
        columns,
        max_samples=max_samples,
        seed=seed,
        split=split,
        render=render if template is not None else None,
    )


def settle(router: Router, active: ActiveAdapter) -> None:
    """Put a fitted router where its model lies, trainable if the model is."""
    for parameter in router.parameters():
        parameter.requires_grad_(not active.config.inference_mode)
    router.to(active.device)


def text_features(
    prompts: PromptRouter,
    tokenizer: Any,
    texts: list[str],
    batch_size: int,
    max_length: int,
    cache_folder: str | os.PathLike[str] | None,
    show_progress: bool,
    ranks: Ranks | None = None,
) -> Tensor:
    """Pooled features of many texts, in their order; see :func:`row_features`."""
    rows = token_rows(tokenizer, texts, max_length)
    return row_features(prompts, rows, batch_size, cache_folder, show_progress, ranks)


def row_features(
    prompts: PromptRouter,
    rows: list[list[int]],
    batch_size: int,
    cache_folder: str | os.PathLike[str] | None,
    show_progress: bool,
    ranks: Ranks | None = None,
    layers: Sequence[int] | None = None,
    reading: Reading | None = None,
) -> Tensor:
    """Pooled features of tokenised texts, in their order: (N, H) float32 on the CPU, or (N, D, H) with ``layers``.

    Each different text is read once. Ranks share whole batches, so that no number depends on how many there are.
    Without ``reading``, prompts are read as they are routed now.
    """
    reading = reading or prompts.reading()
    wanted = [reading.layer] if layers is None else list(layers)
    cache = _cache(prompts, cache_folder, wanted, reading)
    keys = [cache.key(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if cache.get(key) is None}
    # Texts of like length share a batch, so that little is padded.
    lengths = _lengths_read(new, reading)
    order = sorted(new, key=lengths.__getitem__)
    device = prompts.active.device
    progress = bar_progress if show_progress else no_progress
    batches = _batches(order, lengths, batch_size)
    ranks = ranks or Ranks.alone()

    def read(some: Sequence[list[str]]) -> Iterator[Tensor]:
        with progress("reading prompts", len(some)) as advance:
            for batch in some:
                ids, mask = padded([new[key] for key in batch])
                yield prompts.features_at(ids.to(device), mask.to(device), wanted, reading).flatten(1).cpu()
                advance()

    found = ranks.share(batches, read)
    computed: dict[str, Tensor] = {}
    for batch, features in zip(batches, found, strict=True):
        computed.update(zip(batch, features, strict=True))
    cache.put(computed)
    everything = torch.stack([cache.get(key) for key in keys]).unflatten(1, (len(wanted), -1))  # type: ignore[misc]
    return everything[:, 0] if layers is None else everything


def _lengths_read(rows: Mapping[str, list[int]], reading: Reading) -> dict[str, int]:
    """How many tokens of each prompt are read: a chat's template is not."""
    if reading.prompt_form is None:
        return {key: len(row) for key, row in rows.items()}
    form = PromptForm.from_config(reading.prompt_form)
    return {key: len(form.content(row, reading.turn_markers, reading.routing_turn)) for key, row in rows.items()}


def _batches(order: Sequence[str], lengths: Mapping[str, int], batch_size: int) -> list[list[str]]:
    """Batches of ``batch_size`` texts; of more where they are short, until they have ``_FEWEST_TOKENS`` tokens.

    Args:
        order: keys of texts, by their length.
        lengths: key → number of tokens.
        batch_size: texts a batch at least, but for the last one.
    """
    batches: list[list[str]] = []
    for key in order:
        if not batches or len(batches[-1]) >= max(batch_size, _FEWEST_TOKENS // max(1, lengths[key])):
            batches.append([])
        batches[-1].append(key)
    return batches


def _read_weights(prompts: PromptRouter, layer: int) -> str:
    """Digest of the backbone's weights that prompts are read with, so that a changed backbone shares no features.

    All bytes of what lies below the router's layer: little beside reading the texts themselves.
    """
    model, digest = prompts.active.model, hashlib.sha256()
    above = {id(part) for block in list(prompts.blocks)[layer:] for part in block.parameters()}
    with reading_weights(model):
        for name, weight in model.named_parameters():
            values = weight.detach()
            if id(weight) not in above and type(values) is Tensor and values.device.type != "meta":
                digest.update(name.encode())
                for part in values.reshape(-1).split(_HASHED_AT_ONCE):
                    digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _cache(
    prompts: PromptRouter, folder: str | os.PathLike[str] | None, layers: Sequence[int], reading: Reading
) -> FeatureCache:
    """The model's cache for its backbone, layers and form of prompts; a folder's entries are read in."""
    config = prompts.active.config
    weight = next(prompts.active.model.parameters())
    in_place = reading.prompt_form is None and prompts.reads_in_one_pass(reading.layer)
    form: list[Any] = [reading.routing_turn, in_place, reading.turn_markers, reading.prompt_form]
    form.append(prompts.active.has_corrected_layers())
    form += [hashlib.sha256(part.cpu().numpy().tobytes()).hexdigest() for part in reading.router.pools_by]
    settings = [config.backbone_fingerprint, list(layers), form, str(weight.dtype), str(weight.device)]
    settings.append(_read_weights(prompts, max(layers)))
    origin = json.dumps(settings, sort_keys=True)
    caches = prompts.feature_caches
    place = (origin, str(folder))
    if place not in caches:
        caches[place] = FeatureCache(origin, None if folder is None else Path(folder).expanduser())
    return caches[place]
