"""Buffers that old files hold are passed over, as transformers does; other tensors too many are a fault."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mediator_peft import build_mediator, load_mediator
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointMismatchError
from tests.tiny import fine_tuned, random_prompts, tiny_model

WEIGHTS = "model.safetensors"
EXACT = MediatorSettings(density=1.0, encoding="float", routed_layers="all")
STRAYS = {
    "llama": {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.rotary_emb.inv_freq": torch.rand(4),
    },
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
}  # fmt: skip


def models(arch):
    base = tiny_model(arch)
    only = ["mlp.", "attn."]
    return {"base": base, "math": fine_tuned(base, 1, 0.02, only), "code": fine_tuned(base, 2, 0.02, only)}


@pytest.mark.parametrize("where", [("base",), ("code",), ("base", "math", "code")], ids="+".join)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_buffers_of_old_files_change_nothing(arch, where, tmp_path):
    made = models(arch)
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        if name in where:
            strays = {**load_file(tmp_path / name / WEIGHTS), **STRAYS[arch]}
            save_file(strays, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
    build_mediator(tmp_path / "base", {name: tmp_path / name for name in ("math", "code")}, tmp_path / "out", EXACT)
    assert not STRAYS[arch].keys() & load_file(tmp_path / "out" / WEIGHTS).keys()
    loaded, _ = load_mediator(tmp_path / "out")
    for name in ("math", "code"):
        expected = made[name](random_prompts()).logits
        torch.testing.assert_close(loaded(random_prompts(), expert_weights=name).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_weight_that_the_base_has_not_is_no_stray(tmp_path):
    for name, model in models("llama").items():
        model.save_pretrained(tmp_path / name)
    extra = {**load_file(tmp_path / "code" / WEIGHTS), "model.layers.0.adapter.weight": torch.rand(4, 4)}
    save_file(extra, tmp_path / "code" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"adapter\.weight"):
        build_mediator(tmp_path / "base", {"code": tmp_path / "code"}, tmp_path / "out", EXACT)
