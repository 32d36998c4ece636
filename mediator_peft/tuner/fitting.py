"""Fitting the router of a model: texts → features → router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..progress import bar_progress, no_progress
from ..routing.calibration import CalibrationReport, calibrate, labelled_texts

if TYPE_CHECKING:
    from .model import MediatorModel


def fit_router(
    model: MediatorModel,
    dataset: Any,
    tokenizer: Any,
    text_column: str,
    label_column: str,
    batch_size: int,
    max_length: int,
    show_progress: bool,
) -> CalibrationReport:
    """See :meth:`MediatorModel.fit_router`."""
    config = model._config
    experts = list(config.expert_names or ())
    texts, numbers = labelled_texts(dataset, experts, text_column, label_column)
    features = text_features(model, tokenizer, texts, batch_size, max_length, show_progress)
    router = model.router
    report = calibrate(
        lambda: type(router)(router.num_experts, router.num_features),
        router,
        features,
        torch.tensor(numbers),
        texts,
        config.seed,
    )
    for parameter in router.parameters():
        parameter.requires_grad_(not config.inference_mode)
    router.to(features.device)
    named = {experts[int(number)]: count for number, count in report.num_texts.items()}
    return report._replace(num_texts=named)


def text_features(
    model: MediatorModel, tokenizer: Any, texts: list[str], batch_size: int, max_length: int, show_progress: bool
) -> Tensor:
    """Pooled features of many texts, in their order: (N, H) float32 on the CPU."""
    # Texts of like length share a batch, so that little is padded.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = next(model.model.parameters()).device
    features = torch.zeros(len(texts), model.router.num_features)
    progress = bar_progress if show_progress else no_progress
    starts = range(0, len(order), batch_size)
    with progress("reading prompts", len(starts)) as advance:
        for start in starts:
            rows = order[start : start + batch_size]
            encoded = _encode(tokenizer, [texts[row] for row in rows], max_length)
            features[rows] = model.prompt_features(*(tensor.to(device) for tensor in encoded)).cpu()
            advance()
    return features


def _encode(tokenizer: Any, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each; padded by hand, for a tokenizer may have no padding token."""
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    width = max(1, max(len(row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids, mask
