"""Fitting the router of a model: texts → features → router."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RoutingError
from ..progress import bar_progress, no_progress
from ..ranks import Ranks
from ..routing.augmentation import VARIATIONS, vary
from ..routing.background import BACKGROUND_PROMPTS
from ..routing.calibration import CalibrationReport, calibrate
from ..routing.calibration_data import Columns, LabelledTexts, labelled_texts
from ..routing.feature_cache import FeatureCache
from ..routing.hard_negatives import neighbours
from ..routing.routers import Router
from .chat_turns import padded, unwrapped, user_turns
from .config import MediatorConfig
from .layer import reading_weights
from .routing import ActiveAdapter, PromptRouter

_MOST_UNKNOWN = 0.2
_HASHED_AT_ONCE = 1 << 24


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
    background: Sequence[str] | None,
    variations: bool,
    neighbours: bool,
    show_progress: bool,
    ranks: Ranks,
) -> CalibrationReport:
    """See :meth:`MediatorModel.fit_router`."""
    config = prompts.active.config
    names = list(config.expert_names or ())
    data = read_texts(dataset, names, tokenizer, columns, max_samples, config.seed, split)
    prompts.learn_turns(tokenizer)
    ordinary = background_texts(config, tokenizer, data.texts, background)
    rows = token_rows(tokenizer, data.texts + ordinary, max_length)
    num_texts, num_prompts = len(data.texts), len(rows)
    rows += varied_rows(config, tokenizer, rows[:num_texts], max_length) if variations else []
    num_own = len(rows)
    old = prompts.active.router
    router = type(old)(old.num_experts, old.num_features, config.seed)
    router.is_trainable = old.is_trainable
    router.train(old.training)
    if neighbours and ordinary and router.uses_neighbours:
        rows += neighbour_rows(config, tokenizer, rows[:num_texts], data.labels, max_length)
    features = row_features(prompts, rows, batch_size, cache_folder, show_progress, ranks)
    report = calibrate(
        lambda: type(router)(router.num_experts, router.num_features, config.seed),
        router,
        features[:num_texts],
        torch.tensor(data.labels),
        data.groups or data.texts,
        names,
        config.seed,
        config.ood_alpha,
        features[num_texts:num_prompts] if ordinary else None,
        _by_way(features[num_prompts:num_own], num_texts),
        _by_way(features[num_own:], num_texts),
    )
    settle(router, prompts.active)
    if list(config.expert_names or ()) != names:
        raise RoutingError(f"experts were added or removed while the router of {names} was fitted. Fit it again.")
    # Whoever routes meanwhile has the old router or the new one, whole.
    prompts.active.router = router
    return report


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
    """Calibration texts of a model's experts; chats are rendered with the tokenizer's template."""
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


def background_texts(
    config: MediatorConfig, tokenizer: Any, texts: list[str], background: Sequence[str] | None
) -> list[str]:
    """Ordinary prompts in the form of the calibration texts: as chats if those are chats."""
    prompts = our_background(tokenizer) if background is None else list(background)
    return in_the_form_of(config, tokenizer, tokenizer(texts[:1])["input_ids"][0], prompts) if prompts else prompts


def in_the_form_of(config: MediatorConfig, tokenizer: Any, row: list[int], prompts: list[str]) -> list[str]:
    """Prompts as chats, if the tokens of a calibration text are a chat's."""
    markers = config.turn_markers
    if markers is None or not user_turns(row, markers):
        return prompts
    template = unwrapped(tokenizer).apply_chat_template
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def our_background(tokenizer: Any) -> list[str]:
    """The ordinary prompts of the library; none where the tokenizer does not know their words."""
    prompts = list(BACKGROUND_PROMPTS)
    return [] if _are_unknown(tokenizer, tokenizer(prompts)["input_ids"]) else prompts


def _are_unknown(tokenizer: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether too many tokens of some texts are unknown ones."""
    unknown = getattr(unwrapped(tokenizer), "unk_token_id", None)
    ids = [token for row in rows for token in row]
    return unknown is not None and ids.count(unknown) > _MOST_UNKNOWN * len(ids)


def settle(router: Router, active: ActiveAdapter) -> None:
    """Put a fitted router where its model lies, trainable if the model is."""
    for parameter in router.parameters():
        parameter.requires_grad_(not active.config.inference_mode)
    router.to(active.device)


def token_rows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text."""
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return rows


def varied_rows(config: MediatorConfig, tokenizer: Any, rows: list[list[int]], max_length: int) -> list[list[int]]:
    """Altered copies of prompts, each way of altering them as long as ``rows``; what users wrote is altered alone.

    A way is left out where the tokenizer does not know the words that come of it: they would all look alike.
    """
    plain, seed, markers = unwrapped(tokenizer), config.seed, config.turn_markers
    if not hasattr(plain, "decode"):
        return []
    copies: list[list[list[int]]] = [[list(row) for row in rows] for _ in VARIATIONS]
    for number, row in enumerate(rows):
        turns, opening, close = _user_places(row, markers)
        # From the last turn on, so that the places of the others stay as they are.
        for start, stop in reversed(turns):
            place = slice(start + opening, stop - close)
            texts = vary(plain.decode(row[place], skip_special_tokens=True), seed)
            ids = plain(texts, add_special_tokens=opening == 0)["input_ids"]
            for way, new in zip(copies, ids, strict=True):
                way[number][place] = new
    return [row[:max_length] for way in copies if not _are_unknown(plain, way) for row in way]


def neighbour_rows(
    config: MediatorConfig, tokenizer: Any, rows: list[list[int]], labels: Sequence[int], max_length: int
) -> list[list[int]]:
    """Other requests about what each text is about, each way of putting them as long as ``rows``.

    Nothing comes of it where the tokenizer does not know the words of these requests.
    """
    plain, markers = unwrapped(tokenizer), config.turn_markers
    if not hasattr(plain, "decode"):
        return []
    texts = [_user_text(plain, row, markers) for row in rows]
    asked = [request for way in neighbours(texts, labels, config.seed) for request in way]
    if _are_unknown(plain, plain(asked)["input_ids"]):
        return []
    return token_rows(tokenizer, in_the_form_of(config, tokenizer, rows[0], asked), max_length)


def _user_text(tokenizer: Any, row: list[int], markers: Any) -> str:
    """What the user wrote in a prompt, all turns."""
    turns, opening, close = _user_places(row, markers)
    parts = [tokenizer.decode(row[start + opening : stop - close], skip_special_tokens=True) for start, stop in turns]
    return "\n".join(parts)


def _user_places(row: list[int], markers: Any) -> tuple[list[tuple[int, int]], int, int]:
    """Places of the user's turns in a prompt, and how many tokens at either end are the template's; else all of it."""
    turns = user_turns(row, markers) if markers is not None else []
    if not turns:
        return [(0, len(row))], 0, 0
    opening, close = markers
    return turns, len(opening), len(close)


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
) -> Tensor:
    """Pooled features of tokenised texts, in their order: (N, H) float32 on the CPU. Each different one is read once.

    Ranks share whole batches, so that no number depends on how many there are.
    """
    cache = _cache(prompts, cache_folder)
    keys = [cache.key(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if cache.get(key) is None}
    # Texts of like length share a batch, so that little is padded.
    order = sorted(new, key=lambda key: len(new[key]))
    device = prompts.active.device
    progress = bar_progress if show_progress else no_progress
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    ranks = ranks or Ranks.alone()

    def read(some: Sequence[list[str]]) -> Iterator[Tensor]:
        with progress("reading prompts", len(some)) as advance:
            for batch in some:
                ids, mask = padded([new[key] for key in batch])
                yield prompts.features(ids.to(device), mask.to(device)).cpu()
                advance()

    found = ranks.share(batches, read)
    computed: dict[str, Tensor] = {}
    for batch, features in zip(batches, found, strict=True):
        computed.update(zip(batch, features, strict=True))
    cache.put(computed)
    return torch.stack([cache.get(key) for key in keys])  # type: ignore[misc]


def _read_weights(prompts: PromptRouter) -> str:
    """Digest of the backbone's weights that prompts are read with, so that a changed backbone shares no features.

    All bytes of what lies below the router's layer: little beside reading the texts themselves.
    """
    model, digest = prompts.active.model, hashlib.sha256()
    above = {id(part) for block in list(prompts.blocks)[prompts.router_layer :] for part in block.parameters()}
    with reading_weights(model):
        for name, weight in model.named_parameters():
            values = weight.detach()
            if id(weight) not in above and type(values) is Tensor and values.device.type != "meta":
                digest.update(name.encode())
                for part in values.reshape(-1).split(_HASHED_AT_ONCE):
                    digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _cache(prompts: PromptRouter, folder: str | os.PathLike[str] | None) -> FeatureCache:
    """The model's cache for its backbone, layer and way of routing; a folder's entries are read in."""
    config = prompts.active.config
    model = prompts.active.model
    weight = next(model.parameters())
    place_in_chat = [config.routing_turn, prompts.single_pass_routing]
    settings = [config.backbone_fingerprint, prompts.router_layer, place_in_chat, str(weight.dtype), str(weight.device)]
    settings.append(_read_weights(prompts))
    origin = json.dumps(settings, sort_keys=True)
    caches = prompts.feature_caches
    place = (origin, str(folder))
    if place not in caches:
        caches[place] = FeatureCache(origin, None if folder is None else Path(folder).expanduser())
    return caches[place]
