"""Fused experts (E, O, I) and (E, I, O): each matrix is a linear layer; all against a dense formula written here."""

from __future__ import annotations

import pickle
import threading
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from reference import thin_out
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, load_mediator, verify_mediator
from mediator_peft.errors import AdapterError, BackboneMismatchError, UnsupportedError
from mediator_peft.tuner.fused_experts import RoutedExperts
from tests.architectures import tiny_config

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
SOME = ("mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt_oss")
PROMPTS = torch.tensor([[7, 9, 12, 30, 22], [5, 44, 71, 13, 90], [61, 3, 18, 77, 40], [20, 21, 90, 15, 8]])
MIXES = [{"math": 1.0}, {"math": 0.3, "code": 0.6}, {"code": 0.5, "base": 0.5}, {}]
DENSITY = 0.3


def tiny(kind):
    config = tiny_config(kind)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return model


def tuned(base, seed):
    model, generator = deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name or ".self_attn.q_proj" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def dense_deltas(states, kind):
    """Backbone and the deltas of each column, by hand: tensor → (backbone, column → delta)."""
    found = {}
    for name, base in states["base"].items():
        columns = {column: states[column][name] for column in ("math", "code")}
        backbone = sum(columns.values()) / 2
        columns["base"] = base
        deltas = {}
        for column, weight in columns.items():
            delta = weight - backbone
            if name.endswith(("_bias", "q_proj.bias")):
                deltas[column] = delta
            elif delta.ndim == 3:
                turn = kind == "gpt_oss"
                matrices = [thin_out(part.T if turn else part, DENSITY, "sign") for part in delta]
                deltas[column] = torch.stack([part.T if turn else part for part in matrices])
            elif name.endswith("q_proj.weight"):
                deltas[column] = thin_out(delta, DENSITY, "sign")
        found[name] = (backbone, deltas)
    return found


def dense_model(family, mix):
    """A plain model with ``D + sum_k w_k S_k`` in its weights."""
    model = deepcopy(family.models["base"])
    state = {
        name: backbone + sum(weight * deltas[column] for column, weight in mix.items() if column in deltas)
        for name, (backbone, deltas) in family.deltas.items()
    }
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module", params=SOME)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny(request.param)
    # A scale of 16 bits may lie between two, and the formula above round to the other one: not with these seeds.
    models = {"base": base, "math": tuned(base, 3), "code": tuned(base, 4)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    paths = {name: folder / name for name in models}
    experts = {name: paths[name] for name in ("math", "code")}
    settings = MediatorConfig(density=DENSITY, routed_layers="all")
    report = build_mediator(paths["base"], experts, folder / "out", settings)
    deltas = dense_deltas({name: model.state_dict() for name, model in models.items()}, request.param)
    return SimpleNamespace(
        kind=request.param, folder=folder, models=models, paths=paths, experts=experts, report=report, deltas=deltas
    )


@pytest.fixture
def model(family):
    return load_mediator(family.folder / "out")[0]


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def only_mixtral(family):
    if family.kind != "mixtral":
        pytest.skip("one family is enough")


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_each_row_equals_its_own_dense_model(family, model):
    logits = [dense_model(family, mix)(PROMPTS).logits[row] for row, mix in enumerate(MIXES)]
    assert (logits[0] - dense_model(family, {})(PROMPTS).logits[0]).abs().max() > 1e-2
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for module in experts_of(model):
            module.base_layer.config._experts_implementation = implementation
        mixed = model(PROMPTS, expert_weights=MIXES).logits
        for row, expected in enumerate(logits):
            close(mixed[row], expected)
        for row in (0, 1):
            # Written into the weights, and taken out again.
            with model.use_experts(MIXES[row]):
                close(model(PROMPTS).logits[row], logits[row])
            close(model(PROMPTS, expert_weights={}).logits[-1], logits[-1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_and_generation_with_a_cache(family, model, side):
    short = PROMPTS[1, :3]
    padded = torch.stack([PROMPTS[0], torch.cat([torch.zeros(2).long(), short][:: 1 if side == "left" else -1])])
    mask = torch.stack([torch.ones(5), torch.tensor([0, 0, 1, 1, 1.0] if side == "left" else [1, 1, 1, 0, 0.0])]).long()
    alone = [dense_model(family, MIXES[0])(PROMPTS[:1]).logits[0], dense_model(family, MIXES[2])(short[None]).logits[0]]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions, expert_weights=[MIXES[0], MIXES[2]]).logits
    close(logits[0], alone[0])
    close(logits[1][mask[1].bool()], alone[1])
    if side == "left":
        ends = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        answers = model.generate(padded, attention_mask=mask, expert_weights=[MIXES[0], MIXES[2]], **ends)
        expected = dense_model(family, MIXES[2]).generate(short[None], **ends)
        assert answers[1, 5:].tolist() == expected[0, 3:].tolist()
        assert model.generate(short[None], expert_weights=MIXES[2], **ends)[0].tolist() == expected[0].tolist()


def test_the_report_says_what_has_deltas_and_what_is_the_bases(family):
    notes = " ".join(family.report.notes)
    assert "4 fused tensors of the mixture of experts" in notes
    assert "merged as 16 linear layers" in notes
    assert "gates are the base's" in notes
    assert verify_mediator(family.folder / "out").is_ok


@torch.no_grad()
def test_an_exact_build_restores_experts_whole_and_edited(family, tmp_path):
    exact = MediatorConfig(density=1.0, encoding="float", routed_layers="all")
    build_mediator(family.paths["base"], family.experts, tmp_path / "out", exact)
    model, _ = load_mediator(tmp_path / "out")
    for name, expert in family.models.items():
        close(model(PROMPTS, expert_weights=name).logits, expert(PROMPTS).logits)
    found = verify_mediator(tmp_path / "out", against={"math": family.paths["math"]})
    assert found.is_ok
    assert found.differences["math"]["max_difference"] < 1e-6
    model.remove_expert("code")
    model.add_expert("code", str(family.paths["code"]))
    close(model(PROMPTS, expert_weights="code").logits, family.models["code"](PROMPTS).logits)
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved")
    names = ["code", "math", "base", "math"]
    close(again(PROMPTS, expert_weights=names).logits, model(PROMPTS, expert_weights=names).logits, 1e-6)


def test_experts_stored_one_by_one_and_fused_give_the_same(family, tmp_path):
    if family.kind == "gpt_oss":
        pytest.skip("has one form on disk")
    for name, path in family.paths.items():
        stored = load_file(path / "model.safetensors")
        assert not any(tensor.ndim == 3 for tensor in stored.values())
        (tmp_path / name).mkdir()
        state = {key: value.contiguous() for key, value in family.models[name].state_dict().items()}
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_bytes((path / "config.json").read_bytes())
    experts = {name: tmp_path / name for name in family.experts}
    build_mediator(tmp_path / "base", experts, tmp_path / "out", MediatorConfig(density=DENSITY, routed_layers="all"))
    for name in ("model.safetensors", "mediator/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (family.folder / "out" / name).read_bytes(), name


@torch.no_grad()
def test_copies_casts_merges_and_states(family, model):
    def expected(mix):
        return dense_model(family, mix)(PROMPTS).logits

    before = {name: value.clone() for name, value in model.state_dict().items() if "mediator_router" not in name}
    with model.use_experts("math"):
        model(PROMPTS)
        copied, pickled, state = deepcopy(model), pickle.dumps(model), model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
    for other in (copied, pickle.loads(pickled)):
        close(other(PROMPTS, expert_weights=["math", "code", "math", "code"]).logits[0], expected({"math": 1.0})[0])
        assert experts_of(other)[0].matrices[0].base_layer.weight.data_ptr() != (
            experts_of(model)[0].matrices[0].base_layer.weight.data_ptr()
        )
    half = deepcopy(model).to(torch.bfloat16)
    with half.use_experts("math"):
        # Rounded, some tokens are sent to other experts.
        apart = (half(PROMPTS).logits.float() - expected({"math": 1.0})).abs()
        assert (apart < 0.15).float().mean() > 0.8
    model.cache_merged_experts(["math"])
    mixes = ["math", {}, "code", "math"]
    kept = model(PROMPTS, expert_weights=mixes).logits
    close(kept[0], expected({"math": 1.0})[0])
    close(kept[2], expected({"code": 1.0})[2])
    model.cache_merged_experts(())
    model.merge_adapter(expert_weights="code")
    close(model(PROMPTS).logits, expected({"code": 1.0}))
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    with model.disable_adapter():
        close(model(PROMPTS).logits, expected({}))
    plain = deepcopy(model).merge_and_unload(expert_weights=MIXES[1])
    close(plain(PROMPTS).logits, expected(MIXES[1]))
    assert plain.state_dict().keys() == family.models["base"].state_dict().keys()
    assert not experts_of(model.unload())


def test_threads_with_different_experts_do_not_meet(family, model):
    only_mixtral(family)
    expected = {name: dense_model(family, {name: 1.0})(PROMPTS).logits for name in ("math", "code")}
    wrong = []

    @torch.no_grad()
    def answer(name):
        for _ in range(6):
            with model.use_experts(name):
                if not torch.allclose(model(PROMPTS).logits, expected[name], atol=1e-4):
                    wrong.append(name)

    threads = [threading.Thread(target=answer, args=(name,)) for name in ("math", "code")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_reach_the_expert_weights(family, model):
    table, columns = torch.tensor([[0.7, 0.2, 0.0], [0.1, 0.0, 0.4]]), ("math", "code", "base")
    weights = table.clone().requires_grad_()
    model(PROMPTS[:2], expert_weights=weights).logits.square().sum().backward()
    by_hand = table.clone().requires_grad_()
    for row, mix in enumerate(by_hand):
        state = {
            name: backbone + sum(mix[columns.index(column)] * delta for column, delta in deltas.items())
            for name, (backbone, deltas) in family.deltas.items()
        }
        logits = torch.func.functional_call(family.models["base"], state, (PROMPTS[row : row + 1],)).logits
        logits.square().sum().backward()
    close(weights.grad, by_hand.grad, 1e-3)


def test_what_cannot_work_is_refused_by_name(family, model, tmp_path):
    only_mixtral(family)
    experts = experts_of(model)[0]
    board, tokens = experts.board, torch.zeros(7, 32)
    with model.use_experts(["math", "code"]), torch.no_grad():
        model(PROMPTS[:2])
        board.route = board.request.made[1]
        with pytest.raises(UnsupportedError, match="which row a token belongs to"):
            experts(tokens, torch.zeros(7, 2).long(), torch.ones(7, 2))
        board.route = None
    experts.base_layer.gate_up_proj = torch.nn.Parameter(experts.base_layer.gate_up_proj.to("meta"))
    with pytest.raises(UnsupportedError, match="fused experts' tensor 'gate_up_proj'"):
        model(PROMPTS, expert_weights="math")
    with pytest.raises(UnsupportedError, match="matrix of fused experts"):
        load_mediator(family.folder / "out")[0].base_model.convert_to_lora(4, "math")
    other = deepcopy(family.models["base"])
    with pytest.raises((BackboneMismatchError, AdapterError)):
        other.model.layers[1].mlp.experts.gate_up_proj.data += 1
        from peft import PeftModel

        PeftModel.from_pretrained(other, str(family.folder / "out" / "mediator"))
