"""A stored lm_head of its own where the configuration ties it: read as transformers reads it, and kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mediator_peft import build_mediator, get_mediator_model, load_mediator, plan_mediator, verify_mediator
from mediator_peft.checkpoints.opening import open_checkpoint
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointMismatchError, MediatorError
from mediator_peft.tuner.config import MediatorConfig
from tests.tiny import VOCAB_SIZE, random_prompts, write_tiny_checkpoints

WEIGHTS, HEADS = "model.safetensors", {"llama_tied": "lm_head.weight", "gpt2": "lm_head.weight"}
EMBEDDINGS = {"llama_tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
EXACT = dict(density=1.0, encoding="float", routed_layers="all")
TARGETS = {"llama_tied": ["all-linear", "embed_tokens", "lm_head"], "gpt2": ["all-linear", "wte", "lm_head"]}


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def own_head(folder, arch):
    head = torch.randn(VOCAB_SIZE, 32, generator=torch.Generator().manual_seed(len(str(folder)))) * 0.1
    edit(folder, lambda tensors: tensors.update({HEADS[arch]: head}))


def repeated_head(folder, arch):
    edit(folder, lambda tensors: tensors.update({HEADS[arch]: tensors[EMBEDDINGS[arch]]}))


def head_alone(folder, arch):
    edit(folder, lambda tensors: tensors.update({HEADS[arch]: tensors.pop(EMBEDDINGS[arch])}))


CHANGES = {
    "one expert's": {"code": own_head},
    "the base's": {"base": own_head},
    "all": {"base": own_head, "math": own_head, "code": own_head},
    "one repeated": {"code": repeated_head},
    "one repeated, one its own": {"code": repeated_head, "math": own_head},
    "one without an embedding": {"code": head_alone},
    "one without an embedding, one its own": {"code": head_alone, "math": own_head},
}
ALSO_OF_GPT2 = ("one repeated, one its own",)
"""The others by slow tests."""


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        *((kind, "llama_tied") for kind in CHANGES),
        *((kind, "gpt2") for kind in ALSO_OF_GPT2),
        *(pytest.param(kind, "gpt2", marks=pytest.mark.slow) for kind in CHANGES if kind not in ALSO_OF_GPT2),
    ],
)
def test_every_expert_comes_back_as_transformers_reads_it(kind, arch, tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", arch=arch, only=["mlp.", "attn.", "wte", "embed"])
    for name, change in CHANGES[kind].items():
        change(paths[name], arch)
    prompts = random_prompts()
    expected = {name: AutoModelForCausalLM.from_pretrained(path)(prompts).logits for name, path in paths.items()}
    experts = {name: path for name, path in paths.items() if name != "base"}
    settings = MediatorSettings(**EXACT, target_modules=TARGETS[arch])
    is_untied = any(change is own_head for change in CHANGES[kind].values())
    planned = plan_mediator(paths["base"], experts, config=settings)
    assert not planned.problems
    assert any("of its own" in text for text in planned.warnings) == is_untied
    report = build_mediator(paths["base"], experts, tmp_path / "out", settings)
    assert any("of its own" in text for text in report.notes) == is_untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (not is_untied)
    model, _ = load_mediator(tmp_path / "out")
    for name, logits in expected.items():
        torch.testing.assert_close(model(prompts, expert_weights=name).logits, logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again, _ = load_mediator(tmp_path / "again")
    for name, logits in expected.items():
        torch.testing.assert_close(again(prompts, expert_weights=name).logits, logits, rtol=1e-4, atol=1e-4)
    compared = verify_mediator(tmp_path / "out", against=experts)
    assert compared.is_ok, compared.problems
    assert max(found["max_difference"] for found in compared.differences.values()) < 1e-5


def assert_named_experts_are_the_experts(model, experts):
    for name, path in experts.items():
        expected = AutoModelForCausalLM.from_pretrained(path)(random_prompts()).logits
        ours = model(random_prompts(), expert_weights=name).logits
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_pickle_with_a_head_of_its_own(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", arch="llama_tied", only=["mlp.", "attn.", "embed"])
    own_head(paths["code"], "llama_tied")
    for name in ("math", "code"):
        torch.save(load_file(paths[name] / WEIGHTS), paths[name] / "pytorch_model.bin")
        (paths[name] / WEIGHTS).unlink()
    settings = MediatorSettings(**EXACT, target_modules=TARGETS["llama_tied"])
    experts = {name: paths[name] for name in ("math", "code")}
    build_mediator(paths["base"], experts, tmp_path / "out", settings, allow_pickle=True)
    model, _ = load_mediator(tmp_path / "out")
    assert_named_experts_are_the_experts(model, experts)


def test_without_a_base_the_mean_is_untied_as_well(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", arch="llama_tied", only=["mlp.", "attn.", "embed"])
    own_head(paths["code"], "llama_tied")
    experts = {name: paths[name] for name in ("math", "code")}
    settings = MediatorSettings(**EXACT, target_modules=TARGETS["llama_tied"], fallback="backbone")
    build_mediator(None, experts, tmp_path / "out", settings)
    model, _ = load_mediator(tmp_path / "out")
    assert_named_experts_are_the_experts(model, experts)


def test_a_model_in_memory_stays_tied_and_refuses_by_name(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", arch="llama_tied", only=["mlp.", "attn.", "embed"])
    own_head(paths["code"], "llama_tied")
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    with pytest.raises(MediatorError, match="lm_head"):
        get_mediator_model(base, MediatorConfig(experts={"code": str(paths["code"])}))


def test_an_expert_that_is_untied_by_its_configuration_and_lacks_the_head_is_refused(tmp_path):
    """transformers draws such a head at random."""
    paths = write_tiny_checkpoints(tmp_path / "in", arch="llama_tied", only=["mlp.", "attn.", "embed"])
    own_head(paths["math"], "llama_tied")
    settings = json.loads((paths["code"] / "config.json").read_text())
    (paths["code"] / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointMismatchError, match="expert 'code' lacks tensors of base: lm_head"):
        build_mediator(paths["base"], {"math": paths["math"], "code": paths["code"]}, tmp_path / "out")


def test_what_is_tied_is_known(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "in", ("base",), arch="llama_tied")
    assert open_checkpoint(str(paths["base"]), "base").is_tied
