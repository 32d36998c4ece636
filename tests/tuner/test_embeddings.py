"""Embeddings and ``lm_head`` among the targets, tied or not."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, write_tiny_checkpoints

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.bank.delta_rows import DeltaRows
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.errors import ConfigError, UnsupportedError
from mediator_peft.tuner.tied_head import TiedHead
from tests.architectures import tiny_architecture

from .conftest import build_and_fit

TARGETS = ["all-linear", "embed_tokens", "lm_head"]
ARCHITECTURES = ["llama", "llama_tied"]
IDS = torch.tensor([[5, 9, 33, 9], [60, 5, 2, 71]])


def built(folder, arch, **settings):
    paths = write_tiny_checkpoints(folder / "checkpoints", arch=arch)
    experts = {name: path for name, path in paths.items() if name != "base"}
    settings = {"density": 0.3, "target_modules": TARGETS, "routed_layers": "all", **settings}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(**settings))
    return load_mediator(folder / "out", dtype=torch.float32)[0], paths


def by_the_formula(model, weights, arch):
    """A plain model whose matrices are backbone plus mix, the embedding's and the head's included."""
    plain = tiny_model(arch)
    state = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    for name, layer in model.base_model.routed_layers().items():
        total = layer.base_layer.weight.detach().clone()
        for column, weight in weights.items():
            total += weight * layer.bank("default").get(column).dense()
        state[f"{name}.base_layer.weight"] = total
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".mediator_bank." not in name}
    if arch.endswith("tied"):
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    plain.load_state_dict(own)
    return plain


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("encoding", "execution"),
    [
        *product(["sign"], [None, "sparse"]),
        *(pytest.param("sign", way, marks=pytest.mark.slow) for way in ("merged", "dense")),
        ("factors_sign", None),
        *(pytest.param("float", way, marks=pytest.mark.slow) for way in (None, "merged", "sparse", "dense")),
    ],
)
@torch.no_grad()
def test_equals_a_plain_model_with_the_mixed_matrices(tmp_path, arch, encoding, execution):
    model, _ = built(tmp_path, arch, encoding=encoding)
    model.base_model.set_execution(execution)
    mixes = [{"math": 1.0}, {"math": 0.3, "code": 0.5, "base": 0.2}]
    expected = [by_the_formula(model, mix, arch)(IDS).logits for mix in mixes]
    backbone = by_the_formula(model, {}, arch)(IDS).logits
    assert not torch.allclose(expected[0], backbone, atol=1e-3)
    for mix, logits in zip(mixes, expected, strict=True):
        with model.base_model.use_experts(mix):
            torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    with model.base_model.use_experts(mixes):
        both = model(IDS).logits
    torch.testing.assert_close(
        both, torch.stack([logits[row] for row, logits in enumerate(expected)]), rtol=1e-4, atol=1e-4
    )
    with model.base_model.use_experts([None, "math"]):
        torch.testing.assert_close(model(IDS).logits[:1], backbone[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tied_matrices_are_stored_once(tmp_path, arch):
    model, _ = built(tmp_path, arch)
    outer = {name for name in model.base_model.active.config.routed_modules if ".layers." not in name}
    assert outer == ({"model.embed_tokens"} if arch.endswith("tied") else {"model.embed_tokens", "lm_head"})
    keys = load_file(tmp_path / "out" / "mediator" / "adapter_model.safetensors")
    assert any(".embed_tokens." in key for key in keys)
    assert any(key.split("model.")[-1].startswith("lm_head.") for key in keys) is not arch.endswith("tied")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_an_expert_comes_back_at_density_one(tmp_path, arch):
    only = ["proj", "embed_tokens", "lm_head"]
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", arch=arch, only=only)
    experts = {name: path for name, path in paths.items() if name != "base"}
    config = MediatorConfig(density=1.0, encoding="float", routed_layers="all", target_modules=TARGETS)
    build_mediator(paths["base"], experts, tmp_path / "out", config)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    expert = type(tiny_model(arch)).from_pretrained(paths["math"], dtype=torch.float32)
    with model.base_model.use_experts("math"):
        torch.testing.assert_close(model(IDS).logits, expert(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_built_in_memory_is_built_offline(tmp_path, arch):
    offline, paths = built(tmp_path, arch)
    base = type(tiny_model(arch)).from_pretrained(paths["base"], dtype=torch.float32)
    experts = {name: path for name, path in paths.items() if name != "base"}
    config = MediatorConfig(density=0.3, target_modules=TARGETS, routed_layers="all", experts=experts)
    memory = get_mediator_model(base, config).eval()
    for model in (offline, memory):
        model.base_model.set_execution("dense")
    with offline.base_model.use_experts("code"), memory.base_model.use_experts("code"):
        torch.testing.assert_close(memory(IDS).logits, offline(IDS).logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_copies_saves_merges_and_unloads(tmp_path, arch):
    model, _ = built(tmp_path, arch)
    with model.base_model.use_experts("math"):
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    for other in (copy.deepcopy(model), load_mediator(tmp_path / "saved", dtype=torch.float32)[0]):
        with other.base_model.use_experts("math"):
            torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with model.base_model.use_experts("math"):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    merged = model.merge_and_unload(expert_weights="math")
    assert not any(isinstance(module, TiedHead) for module in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_goes_on_with_the_folded_matrix_and_restores_it(tmp_path):
    model, _ = built(tmp_path, "llama_tied")
    weight = model.get_base_model().get_input_embeddings().base_layer.weight
    before = weight.clone()
    answer = model.generate(input_ids=IDS[:1], expert_weights="math", max_new_tokens=6, do_sample=False)
    plain = by_the_formula(model, {"math": 1.0}, "llama_tied")
    torch.testing.assert_close(answer, plain.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False))
    assert torch.equal(weight, before)


def test_the_router_learns_through_the_embedding(tmp_path):
    model, _ = built(tmp_path, "llama_tied")
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]], requires_grad=True)
    with model.base_model.use_experts(weights):
        model(IDS).logits.square().sum().backward()
    with_embedding = weights.grad.clone()
    step = 1e-2
    for index in ((0, 0), (1, 2)):
        sums = []
        for sign in (1, -1):
            moved = weights.detach().clone()
            moved[index] += sign * step
            with torch.no_grad(), model.base_model.use_experts(moved):
                sums.append(float(model(IDS).logits.double().square().sum()))
        assert float(with_embedding[index]) == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("coding", ["sign", "float", "factors", "factors_sign"])
def test_rows_of_a_delta_are_those_of_the_whole(coding):
    delta = torch.randn(37, 21)
    packed = SparseDelta.from_dense(delta, torch.rand(37, 21) < 0.3, coding)
    rows = torch.tensor([36, 0, 5, 5, 17])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if coding.startswith("factors") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(DeltaRows(packed).dense(rows), packed.dense()[rows], **tolerance)


def test_what_reads_rows_is_made_once_while_the_delta_stays(tmp_path):
    model, _ = built(tmp_path, "llama", encoding="factors_sign")
    layer = model.base_model.routed_layers()["model.embed_tokens"]
    readers = []
    for _ in range(2):
        with torch.no_grad():
            model(IDS, expert_weights="math")
        readers.append(layer._rows["math"])
    assert readers[0] is readers[1]
    layer.put_delta("default", "math", layer.bank("default").get("code"))
    with torch.no_grad():
        model(IDS, expert_weights="math")
    assert layer._rows["math"] is not readers[0]


def test_nothing_outside_of_the_blocks_gets_deltas_unless_it_is_named(tmp_path):
    model, _ = built(tmp_path, "llama", target_modules=None)
    assert all(".layers." in name for name in model.base_model.active.config.routed_modules)


def test_a_matrix_without_conflict_stays_with_the_backbone(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", only=["proj"])
    experts = {name: path for name, path in paths.items() if name != "base"}
    settings = dict(density=0.3, target_modules=["all-linear", "embed_tokens"])
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(**settings))
    config = json.loads((tmp_path / "out" / "mediator" / "adapter_config.json").read_text())
    assert config["routed_modules"]
    assert all(".layers." in name for name in config["routed_modules"])


def test_a_name_that_matches_nothing_is_answered_with_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match=r"embed_tokens.*lm_head"):
        built(tmp_path, "llama", target_modules=["embed"])


def test_an_embedding_that_scales_is_refused(tmp_path, monkeypatch):
    model, paths = built(tmp_path, "llama_tied")

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    backbone = model.unload()
    scaled = Scaled(96, 32)
    scaled.weight = backbone.get_input_embeddings().weight
    backbone.set_input_embeddings(scaled)
    config = MediatorConfig(target_modules=TARGETS, routed_layers="all", experts={"math": paths["math"]})
    with pytest.raises(UnsupportedError, match="Scaled does more than look rows up"):
        get_mediator_model(backbone, config)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_build_with_an_embedding_that_scales_is_refused_before_it_starts(tmp_path, target):
    """Gemma 3 multiplies its rows: such a build could not be loaded. ``lm_head`` is tied to it."""
    model = tiny_architecture("gemma3_text")
    for name in ("base", "math"):
        model.save_pretrained(tmp_path / name)
    config = MediatorConfig(target_modules=["all-linear", target])
    with pytest.raises(UnsupportedError, match="Gemma3TextScaledWordEmbedding does more than look rows up"):
        build_mediator(tmp_path / "base", {"math": tmp_path / "math"}, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_fitted_router_routes_embeddings_too(tmp_path, topics, tokenizer):
    model = build_and_fit(tmp_path, topics, tokenizer, arch="llama_tied", target_modules=TARGETS, routed_layers="all")
    texts = [topics["math"][0], topics["code"][0]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    routed = model(**batch).logits
    model.base_model.set_execution("dense")
    torch.testing.assert_close(model(**batch).logits, routed, rtol=1e-4, atol=1e-4)
