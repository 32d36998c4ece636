"""Locked checkpoints are recognised by products that a change of coordinates keeps; honest ones are not spoken of."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from typer.testing import CliRunner

from mediator_peft import build_mediator, plan_mediator
from mediator_peft.cli.app import app
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointMismatchError
from mediator_peft.merge.locks import find_locks, is_lock
from mediator_peft.merge.offline import open_job
from tests.tiny import fine_tuned, random_prompts

_SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=4),
    "gqa": LlamaConfig(**_SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    ),
}  # fmt: skip
ROTARY = ("llama", "gqa", "qwen3")


def base_of(arch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[arch])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.4 * noise if is_norm else 0.1 * noise)
    return model.eval()


def mixing(size, seed):
    """A random invertible matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64) + 3 * torch.eye(size, dtype=torch.float64)


def rotations(size, seed):
    """A matrix (size, size) that commutes with rotary positions: a scaled rotation for each pair i, i + size / 2."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + 2 * torch.rand(size // 2, generator=generator, dtype=torch.float64)
    angle = 6 * torch.rand(size // 2, generator=generator, dtype=torch.float64)
    across, along = torch.diag(scale * angle.sin()), torch.diag(scale * angle.cos())
    return torch.cat([torch.cat([along, -across], dim=1), torch.cat([across, along], dim=1)])


def attention(model, block=1):
    """Views (O, I) of the four matrices, and vectors of biases, of one block."""
    if hasattr(model, "transformer"):
        part = model.transformer.h[block].attn
        fused, bias = part.c_attn.weight.data.T, part.c_attn.bias.data
        return fused[:64], fused[64:128], fused[128:], part.c_proj.weight.data.T, bias
    part = model.model.layers[block].self_attn
    return (*(getattr(part, f"{name}_proj").weight.data for name in "qkvo"), None)


def lock_values(model, heads):
    *_, values, output, bias = attention(model)
    for head in heads:
        change = mixing(16, head)
        rows = slice(16 * head, 16 * head + 16)
        values[rows] = (change @ values[rows].double()).float()
        if bias is not None:
            bias[128:][rows] = (change @ bias[128:][rows].double()).float()
        number = output.shape[1] // len(values)
        for query in range(head * number, (head + 1) * number):
            columns = slice(16 * query, 16 * query + 16)
            output[:, columns] = (output[:, columns].double() @ change.inverse()).float()


def lock_queries(model, arch, heads):
    queries, keys, *_, bias = attention(model)
    number = len(queries) // len(keys)
    for head in heads:
        change = rotations(16, head) if arch in ROTARY else mixing(16, head)
        if arch == "qwen3":
            # A norm of queries and keys leaves nothing but their scale.
            change = torch.eye(16, dtype=torch.float64) * 1.7
        rows = slice(16 * head, 16 * head + 16)
        back = change.inverse().T if arch != "qwen3" else change * 1.3
        keys[rows] = (back @ keys[rows].double()).float()
        places = [slice(16 * query, 16 * query + 16) for query in range(head * number, (head + 1) * number)]
        for place in places:
            queries[place] = (change @ queries[place].double()).float()
        if bias is not None:
            bias[64:128][rows] = (back @ bias[64:128][rows].double()).float()
            bias[:64][rows] = (change @ bias[:64][rows].double()).float()


def mlp(model, block=1):
    """Views: matrices and biases whose first axis are neurons, and the one whose second axis they are."""
    if hasattr(model, "transformer"):
        part = model.transformer.h[block].mlp
        return [part.c_fc.weight.data.T, part.c_fc.bias.data], part.c_proj.weight.data.T
    part = model.model.layers[block].mlp
    return [part.up_proj.weight.data, part.gate_proj.weight.data], part.down_proj.weight.data


def permute_neurons(model, arch, heads):
    ups, down = mlp(model)
    order = torch.randperm(down.shape[1], generator=torch.Generator().manual_seed(1))
    for up in ups:
        up.copy_(up[order].clone())
    down.copy_(down[:, order].clone())


def scale_neurons(model, arch, heads):
    (up, *_), down = mlp(model)
    scale = 0.3 + 3 * torch.rand(len(up), generator=torch.Generator().manual_seed(1))
    up.mul_(scale[:, None])
    down.div_(scale)


def permute_heads(model, arch, heads):
    if hasattr(model, "transformer"):
        fused = model.transformer.h[1].attn.c_attn
        places = torch.arange(64).unflatten(0, (4, 16)).flip(0).flatten()
        three = torch.cat([places, 64 + places, 128 + places])
        fused.weight.data.copy_(fused.weight.data[:, three].clone())
        fused.bias.data.copy_(fused.bias.data[three].clone())
        output = model.transformer.h[1].attn.c_proj.weight.data
        output.copy_(output[places].clone())
        return
    queries, keys, values, output, _ = attention(model)
    for matrix, axis in ((queries, 0), (keys, 0), (values, 0), (output, 1)):
        places = torch.arange(matrix.shape[axis]).unflatten(0, (-1, 16))
        # Whole groups of query heads move with their keys and values.
        groups = places.unflatten(0, (len(values) // 16, -1)).flip(0).flatten()
        matrix.copy_((matrix[groups] if axis == 0 else matrix[:, groups]).clone())


def fold_norm(model, arch, heads):
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[1]
    if hasattr(model, "transformer"):
        norm, weight = block.ln_1, block.attn.c_attn.weight.data.T
        block.attn.c_attn.bias.data += weight @ norm.bias.data
        norm.bias.data.zero_()
        weight *= norm.weight.data
    else:
        norm = block.input_layernorm
        for name in "qkv":
            getattr(block.self_attn, f"{name}_proj").weight.data *= norm.weight.data
    norm.weight.data.fill_(1.0)


def rotate_residual(model, arch, heads):
    """As QuaRot: norms folded first, then the residual stream turned by an orthogonal matrix."""
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))[0]
    for block in model.model.layers:
        parts = block.self_attn, block.mlp
        for norm, names, part in (
            (block.input_layernorm, ("q_proj", "k_proj", "v_proj"), parts[0]),
            (block.post_attention_layernorm, ("gate_proj", "up_proj"), parts[1]),
        ):
            for name in names:
                weight = getattr(part, name).weight.data
                weight.copy_(weight * norm.weight.data @ turn)
            norm.weight.data.fill_(1.0)
        for part, name in zip(parts, ("o_proj", "down_proj"), strict=True):
            weight = getattr(part, name).weight.data
            weight.copy_(turn.T @ weight)
    model.lm_head.weight.data.copy_(model.lm_head.weight.data * model.model.norm.weight.data @ turn)
    model.model.norm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight.data @ turn)


def lock_some_values(model, arch, heads):
    lock_values(model, heads)


LOCKS = {
    "values and outputs": (lock_some_values, CONFIGS),
    "queries and keys": (lock_queries, CONFIGS),
    "neurons in another order": (permute_neurons, CONFIGS),
    "neurons scaled": (scale_neurons, ROTARY),  # GPT-2's activation is not homogeneous, and it has no gate
    "heads in another order": (permute_heads, CONFIGS),
    "folded into": (fold_norm, CONFIGS),
    "residual stream rotated": (rotate_residual, ROTARY),  # GPT-2's norms subtract the mean
}
CASES = [(what, arch) for what, (_, architectures) in LOCKS.items() for arch in architectures]


def found_in(tmp_path, base, expert, dtype=torch.float32):
    base.save_pretrained(tmp_path / "base")
    expert.to(dtype).save_pretrained(tmp_path / "a")
    settings = MediatorSettings(experts={"a": str(tmp_path / "a")})
    job = _open(tmp_path, settings)
    return find_locks(job, job.base, job.experts["a"])


def _open(tmp_path, settings):
    from mediator_peft.checkpoints.opening import open_checkpoints
    from mediator_peft.merge.compatibility import check_job

    opened = open_checkpoints({"base": str(tmp_path / "base"), "expert 'a'": settings.experts["a"]})
    return check_job(opened["base"], {"a": opened["expert 'a'"]})


@pytest.mark.parametrize(("what", "arch"), CASES)
def test_each_lock_is_found_where_it_is(what, arch, tmp_path):
    """A fine-tune, locked, rounded to 16 bits."""
    base = base_of(arch)
    expert = fine_tuned(base, 1, 0.002)
    plain = expert(random_prompts()).logits
    lock, heads = LOCKS[what][0], [1]
    with torch.no_grad():
        lock(expert, arch, heads)
        torch.testing.assert_close(expert(random_prompts()).logits, plain, rtol=1e-3, atol=1e-3)
    found = found_in(tmp_path, base, expert, torch.bfloat16)
    assert found
    assert all(what in finding.what or what == "residual stream rotated" for finding in found), found
    assert any(what in finding.what for finding in found)
    if "and" in what:
        (only,) = found
        has_groups = arch in ("gqa", "qwen3") and "queries" in what
        assert only.what.endswith("query heads 2, 3" if has_groups else " heads 1")
        assert (".1." in only.what) or ("h.1" in only.what)


def test_a_lock_does_not_change_the_product(tmp_path):
    """The relative change of the product is that of the fine-tune without the lock, to 3 digits of float32."""
    base = base_of("llama")
    honest = fine_tuned(base, 1, 0.004)
    locked = deepcopy(honest)
    lock_values(locked, [2])
    (found,) = found_in(tmp_path, base, locked)
    _, _, values, output, _ = attention(base)
    _, _, theirs, their_output, _ = attention(honest)
    rows = slice(32, 48)
    before, after = output[:, rows] @ values[rows], their_output[:, rows] @ theirs[rows]
    assert found.differs == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-2)
    assert found.moved > 1


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("scale", [0.005, 0.1])
def test_honest_fine_tunes_are_not_spoken_of(arch, scale, tmp_path):
    """From a usual step to continued pre-training that moved as far as the weights are large."""
    base = base_of(arch)
    assert not found_in(tmp_path, base, fine_tuned(base, 1, scale), torch.bfloat16)


TRAINING = {
    "a fine-tune": (20, 3e-4, 0.0, 8),
    "large steps": (60, 3e-3, 0.1, 8),
    "continued pre-training": (60, 6e-3, 0.1, 16),
}
"""Steps and rate of AdamW, weight decay, sequences a step."""


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize(
    "kind", ["a fine-tune", "large steps", pytest.param("continued pre-training", marks=pytest.mark.slow)]
)
def test_a_trained_model_is_not_spoken_of(kind, arch, tmp_path):
    """Real gradients, in all weights, norms and biases."""
    steps, rate, decay, sequences = TRAINING[kind]
    base = base_of(arch)
    expert = deepcopy(base).train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=rate, weight_decay=decay)
    for step in range(steps):
        ids = random_prompts(sequences, 16, seed=step)
        expert(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not found_in(tmp_path, base, expert.eval())


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize(("num_rows", "size"), [(None, 0.5), (1, 0.5), (1, 0.2), (1, 0.1), (1, 0.05)])
def test_a_lora_is_not_spoken_of(num_rows, size, arch, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = base_of(arch)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # One row is among the few that are looked at first, and may not stand out among more of them.
                parameter[:num_rows].normal_(0, size)
    model.save_pretrained(tmp_path / "a")
    settings = MediatorSettings(experts={"a": str(tmp_path / "a")})
    job = _open(tmp_path, settings)
    assert not find_locks(job, job.base, job.experts["a"])


def test_plan_and_build_refuse_by_name(tmp_path):
    base = base_of("gqa")
    base.save_pretrained(tmp_path / "base")
    fine_tuned(base, 1, 0.005).save_pretrained(tmp_path / "fine")
    locked = fine_tuned(base, 2, 0.005)
    lock_values(locked, [0, 1])
    locked.save_pretrained(tmp_path / "locked")
    experts = {name: tmp_path / name for name in ("fine", "locked")}
    (problem,) = plan_mediator(tmp_path / "base", experts).problems
    assert "expert 'locked'" in problem
    assert "is locked" in problem
    with pytest.raises(CheckpointMismatchError, match="expert 'locked'"):
        build_mediator(tmp_path / "base", experts, tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match="expert 'locked'"):
        settings = MediatorSettings(
            experts={name: str(path) for name, path in experts.items()}, fallback="backbone", routed_layers="all"
        )
        open_job(None, settings)
    arguments = ["plan", "--base", str(tmp_path / "base"), "--expert", f"a={tmp_path / 'locked'}"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 3
    assert "is locked" in refused.stderr


def test_the_rule():
    assert is_lock(0.3, 0.02)
    assert not is_lock(0.3, 0.04)
    assert not is_lock(0.19, 0.0)
    assert not is_lock(float("nan"), 0.0)


def fused_base(interleaved):
    """A mixture of experts whose gate and up are one tensor, one after the other, or row by row (gpt-oss)."""
    kind = GptOssConfig if interleaved else Qwen3MoeConfig
    own = {"num_local_experts": 4} if interleaved else {"num_experts": 4, "moe_intermediate_size": 16}
    sizes = {**_SIZES, "hidden_size": 32, "intermediate_size": 16, "head_dim": 8}
    config = kind(**sizes, num_key_value_heads=2, num_experts_per_tok=2, **own)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def with_neurons_in_another_order(model, interleaved):
    """The same function: the neurons of every expert of block 1 change places."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    experts = model.model.layers[1].mlp.experts
    both, down = experts.gate_up_proj.data, experts.down_proj.data
    if interleaved:
        pairs = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
        experts.gate_up_proj_bias.data.copy_(experts.gate_up_proj_bias.data[:, pairs])
        both.copy_(both[..., pairs])
        down.copy_(down[:, order])
    else:
        both.copy_(both[:, torch.cat([order, order + 16])])
        down.copy_(down[..., order])


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_locked_mixture_of_experts_is_recognised(interleaved, tmp_path):
    base = fused_base(interleaved)
    expert = fine_tuned(base, 1, 0.004)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "honest")
    prompts = random_prompts(1)
    with torch.no_grad():
        before = expert(prompts).logits
        with_neurons_in_another_order(expert, interleaved)
        torch.testing.assert_close(expert(prompts).logits, before, rtol=1e-4, atol=1e-4)
    expert.save_pretrained(tmp_path / "locked")
    assert not plan_mediator(tmp_path / "base", {"a": tmp_path / "honest"}).problems
    problems = "\n".join(plan_mediator(tmp_path / "base", {"a": tmp_path / "locked"}).problems)
    assert "is locked" in problems
    assert "model.layers.1.mlp.experts" in problems
