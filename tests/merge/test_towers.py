"""Multimodal models: the language model is merged and routed, everything else is carried over or refused by name."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.errors import UnsupportedError
from tests.architectures import tiny_config

EXACT = MediatorConfig(density=1.0, encoding="float", routed_layers="all")


def changed(model, seed, part):
    """A copy with other matrices in one part of the model."""
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if part in name and parameter.ndim == 2 and "embed" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(tiny_config("gemma3")).float().eval()


def folders(tmp_path, models):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", {name: tmp_path / name for name in models if name != "base"}


def test_an_image_is_read_and_the_language_model_routed(base, tmp_path):
    models = {"base": base, "math": changed(base, 1, "language_model"), "code": changed(base, 2, "language_model")}
    origin, experts = folders(tmp_path, models)
    report = build_mediator(origin, experts, tmp_path / "out", EXACT)
    assert "outside of the language model" in " ".join(report.notes)
    model, _ = load_mediator(tmp_path / "out")
    config = base.config
    image = torch.full((1, config.mm_tokens_per_image), config.image_token_id)
    prompt = torch.cat([torch.tensor([[7, 9, 12]]), image, torch.tensor([[30, 22, 8]])], dim=1)
    size = config.vision_config.image_size
    inputs = {
        "input_ids": prompt,
        "pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),
        "token_type_ids": (prompt == config.image_token_id).long(),
    }
    with torch.no_grad():
        for name, expected in models.items():
            found = model(**inputs, expert_weights=name).logits
            torch.testing.assert_close(found, expected(**inputs).logits, atol=1e-3, rtol=0)
        assert not torch.allclose(models["math"](**inputs).logits, models["code"](**inputs).logits, atol=1e-2)
    state = base.state_dict()
    for name, tensor in model.get_base_model().state_dict().items():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_tower_that_differs_is_refused_by_name(base, tmp_path, part):
    models = {"base": base, "math": changed(base, 1, "language_model"), "code": changed(base, 2, part)}
    origin, experts = folders(tmp_path, models)
    with pytest.raises(UnsupportedError, match=rf"expert 'code' .*model\.{part}"):
        build_mediator(origin, experts, tmp_path / "out", EXACT)
    assert not (tmp_path / "out").exists()
