"""Changes of dtype after loading, autocast and offloading: scores and deltas stay in float32, where they are used."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_prompts

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@torch.no_grad()
def test_a_cast_model_routes_as_before(model, cast):
    prompts = random_prompts(4, 9)
    expected = model.route(prompts).expert_weights
    changed = CASTS[cast](copy.deepcopy(model))
    assert {tensor.dtype for tensor in changed.router.parameters()} == {torch.float32}
    torch.testing.assert_close(changed.route(prompts).expert_weights, expected, atol=0.05, rtol=0)
    assert changed.generate(prompts, max_new_tokens=2, min_new_tokens=2).shape == (4, 11)
    for execution in (None, "merged", "sparse", "dense"):
        changed.set_execution(execution)
        named = changed(prompts, expert_weights=["math", "code", None, "math"]).logits.float()
        with changed.use_experts("math"):
            torch.testing.assert_close(changed(prompts).logits[0].float(), named[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("execution", [None, "sparse", "dense"])
@pytest.mark.parametrize("length", [3, 40])
def test_autocast_over_a_mixed_batch(model, execution, length):
    prompts = random_prompts(4, length)
    mixes = ["math", "code", "math", None]
    model.set_execution(execution)
    with torch.no_grad():
        expected = model(prompts, expert_weights=mixes).logits
        exact = model.route(prompts).expert_weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(prompts, expert_weights=mixes).logits
            weights = model.route(prompts).expert_weights
            model.generate(prompts, max_new_tokens=2, expert_weights=mixes)
    assert (found - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(weights, exact, atol=0.05, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(prompts, labels=prompts).loss
    assert torch.isfinite(loss)


def adapter_tensors(model, folder):
    model.save_pretrained(folder / "plain")
    return load_file(folder / "plain" / "adapter_model.safetensors")


@torch.no_grad()
def test_offloading_after_loading(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    prompts = random_prompts(4, 9)
    expected = model(prompts, expert_weights="code").logits
    tokens = model.generate(prompts, max_new_tokens=3, min_new_tokens=3)
    for offload in (
        lambda copied: accelerate.cpu_offload(copied, execution_device=torch.device("cpu")),
        lambda copied: accelerate.disk_offload(copied, str(tmp_path / "disk"), execution_device=torch.device("cpu")),
    ):
        copied = copy.deepcopy(model)
        offload(copied)
        torch.testing.assert_close(copied(prompts, expert_weights="code").logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(copied.generate(prompts, max_new_tokens=3, min_new_tokens=3), tokens)
        copied.save_pretrained(tmp_path / "saved")
        saved, kept = load_file(tmp_path / "saved" / "adapter_model.safetensors"), adapter_tensors(model, tmp_path)
        assert saved.keys() == kept.keys()
        assert all(torch.equal(saved[key], kept[key]) for key in kept)


@torch.no_grad()
def test_offloaded_deltas_are_refused(model):
    accelerate = pytest.importorskip("accelerate")
    from mediator_peft.errors import UnsupportedError

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(UnsupportedError, match="offload_buffers=False"):
        model(random_prompts(2, 5), expert_weights="code")
