"""Routers of tiny models, fitted once in a process for all tests that fit the same."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from typing import Any

import torch

from mediator_peft.tuner.config import FitSettings

_fits: dict[str, tuple[Any, Any]] = {}


def fit_once(model: Any, texts: Any, tokenizer: Any, **options: Any) -> None:
    """``model.fit_router``; where the same was fitted before, the model gets copies of what that made.

    Use it where the fit is the ground of a test and not its subject. A fit depends on nothing but the tensors of the
    model, its settings, and what is given here.
    """
    active, prompts = model.base_model.active, model.base_model.prompt_router
    settings = {key: value for key, value in active.config.to_dict().items() if key not in _PATHS}
    digest = hashlib.sha256(repr((settings, texts, tokenizer.chat_template, len(tokenizer), options)).encode())
    digest.update(str((model.training, prompts.active.router.is_trainable, tokenizer.padding_side)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key = digest.hexdigest()
    if key not in _fits:
        model.fit_router(texts, tokenizer, **options)
        _fits[key] = deepcopy((active.router, FitSettings.of(active.config)))
    else:
        router, settings = deepcopy(_fits[key])
        active.put_fit(router, list(active.config.expert_names), settings)
        prompts.background = options.get("background")


_PATHS = ("experts", "base_model_name_or_path", "expert_folder")
