"""LoRA adapters as experts, against PEFT's own merge."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mediator_peft import (
    MediatorConfig,
    build_mediator,
    get_mediator_model,
    load_mediator,
    plan_mediator,
    verify_mediator,
)
from mediator_peft.checkpoints.opening import open_checkpoint
from mediator_peft.errors import CheckpointError, MediatorError
from tests.tiny import write_tiny_checkpoints


def write_lora(base, folder, seed=0, **settings):
    """A LoRA with factors that do something."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged(base, adapter):
    """What PEFT makes of it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


KINDS = {
    "plain": {},
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3, "q_proj": 9}},
    "regex": {"rank_pattern": {r"layers\.[02]\.mlp\.down_proj": 3}},
    "all": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_are_those_of_peft(kind, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora", **KINDS[kind])
    expected = merged(base, adapter)
    build_mediator(base, {"one": adapter}, tmp_path / "out", MediatorConfig())
    found = load_file(tmp_path / "out" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [name for name in expected if not torch.equal(expected[name], plain[name])]
    assert changed
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_transposed_layers_and_biases(arch, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch=arch)["base"]
    targets = ["c_attn", "c_proj"] if arch == "gpt2" else ["q_proj", "gate_proj"]
    adapter = write_lora(
        base, tmp_path / "lora", target_modules=targets, bias="lora_only", fan_in_fan_out=arch == "gpt2"
    )
    expected = merged(base, adapter)
    build_mediator(base, {"one": adapter}, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        key = name if name in expected else f"transformer.{name}"
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


def test_full_and_lora_experts_mix(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, ("base", "full"))
    adapter = write_lora(paths["base"], tmp_path / "lora")
    settings = {"density": 1.0, "encoding": "float", "routed_layers": "all"}
    experts = {"full": str(paths["full"]), "lora": str(adapter)}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(**settings))
    found = load_file(tmp_path / "out" / "model.safetensors")
    full, lora = load_file(paths["full"] / "model.safetensors"), merged(paths["base"], adapter)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (full[name] + lora[name]) / 2, rtol=1e-5, atol=1e-6)
    report = verify_mediator(tmp_path / "out", against={"lora": adapter}, base=paths["base"])
    assert report.is_ok
    model = get_mediator_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]), MediatorConfig(experts=experts, **settings)
    )
    offline, _ = load_mediator(tmp_path / "out")
    ids = torch.arange(5, 25).reshape(2, 10)
    torch.testing.assert_close(model(ids, expert_weights="lora").logits, offline(ids, expert_weights="lora").logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_low_rank_expert_keeps_its_own_factors(arch, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch=arch)["base"]
    target = ["c_attn"] if arch == "gpt2" else ["q_proj", "down_proj"]
    # A scale that is no power of two, and another rank than the density's.
    kind = {"target_modules": target, "r": 3, "lora_alpha": 5}
    experts = {"lora": str(write_lora(base, tmp_path / "lora", **kind))}
    config = MediatorConfig(sparsifier="svd", merge_method="base", routed_layers="all")
    plan = plan_mediator(base, experts, config=config)
    build_mediator(base, experts, tmp_path / "out", config)
    weights = (tmp_path / "out" / "mediator" / "adapter_model.safetensors").stat().st_size
    assert plan.bytes["adapter"] == pytest.approx(weights, rel=0.05)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    expected = merged(base, tmp_path / "lora")
    for name, layer in model.base_model.routed_layers().items():
        delta = layer.mediator_bank["default"].get("lora")
        change = expected[f"{name}.weight"] - load_file(base / "model.safetensors")[f"{name}.weight"]
        torch.testing.assert_close(delta.dense().T if arch == "gpt2" else delta.dense(), change, rtol=1e-4, atol=1e-6)
        is_targeted = any(name.endswith(part) for part in target)
        assert len(delta.parts["left"]) == (3 if is_targeted else 1) * delta.shape[0]
    ids = torch.arange(5, 25).reshape(2, 10)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(expected)
    torch.testing.assert_close(model(ids, expert_weights="lora").logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.base_model.add_expert("again", experts["lora"])
    for layer in model.base_model.routed_layers().values():
        bank = layer.mediator_bank["default"]
        for part in ("left", "right"):
            assert len(bank.get("again").parts[part]) == len(bank.get("lora").parts[part])
        torch.testing.assert_close(bank.get("again").dense(), bank.get("lora").dense(), rtol=1e-5, atol=1e-7)


REFUSED = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "layers replicated": ({"layer_replication": [[0, 2]]}, "replicated"),
    "another method": ({"peft_type": "IA3"}, "IA3"),
    "single tokens": ({"trainable_token_indices": [1]}, "tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(kind, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora")
    changes, message = REFUSED[kind]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(CheckpointError, match=message):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_a_lora_of_another_base_is_refused(tmp_path):
    base = write_tiny_checkpoints(tmp_path / "a", ("base",))["base"]
    other = write_tiny_checkpoints(tmp_path / "b", ("base",), arch="gpt2")["base"]
    adapter = write_lora(other, tmp_path / "lora", target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match="no such layer"):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_tied_embeddings_are_not_changed_on_one_side(tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch="llama_tied")["base"]
    adapter = write_lora(base, tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(MediatorError, match="ties together"):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_a_damaged_adapter_file_is_named(tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora")
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing or damaged"):
        open_checkpoint(str(adapter), "expert")


def test_rows_in_parts_are_the_rows_of_the_whole(tmp_path):
    from mediator_peft.merge.compatibility import check_job

    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = open_checkpoint(str(write_lora(base, tmp_path / "lora")), "expert")
    check_job(open_checkpoint(str(base), "base"), {"one": adapter})
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = adapter.read(name).clone()
    for start in range(0, 32, 5):
        stop = min(32, start + 5)
        torch.testing.assert_close(adapter.read_rows(name, start, stop), whole[start:stop], rtol=1e-6, atol=1e-7)
