"""Deltas on backbones of bitsandbytes: the codes' own numbers plus the deltas, and never a code rewritten."""

from __future__ import annotations

import warnings
from functools import lru_cache

import pytest
import torch
from reference import load, thin_out, weights_of
from tiny import of_whole_blocks, random_prompts, write_tiny_checkpoints
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.errors import BackboneMismatchError, CheckpointError, UnsupportedError
from mediator_peft.merge import tiles
from mediator_peft.tuner.quantized import readable_weight

bitsandbytes = pytest.importorskip("bitsandbytes")

FOUR_BIT = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
KINDS = {
    "nf4": dict(**FOUR_BIT, bnb_4bit_quant_type="nf4"),
    "nf4, its scales in 8 bits": dict(**FOUR_BIT, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(**FOUR_BIT, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
DENSITY = 0.3
MIXES = [{"math": 1.0}, {"math": 0.3, "code": 0.6}, {"code": 0.5, "base": 0.5}, {}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as monkeypatch:
        of_whole_blocks(monkeypatch)
        paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(density=DENSITY))
    return {**paths, "out": tmp_path / "out"}


def quantized(folder, kind, device="cpu", in_bfloat16=False):
    """``in_bfloat16``: let bitsandbytes use the kernels that some CPUs have, whose sums are rounded to bfloat16."""
    settings = BitsAndBytesConfig(**KINDS[kind])
    model, _ = load_mediator(folder, quantization_config=settings, dtype=torch.float32, device_map=device)
    return model if in_bfloat16 else in_float32(model)


def in_float32(model):
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def numbers_of(weight, kind):
    """What the codes of a weight stand for, computed with nothing but bitsandbytes' functions."""
    functional = bitsandbytes.functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return codes.float() * scales[:, None] / 127
    nested = KINDS[kind].get("bnb_4bit_use_double_quant", False)
    codes, state = functional.quantize_4bit(
        weight, quant_type=KINDS[kind]["bnb_4bit_quant_type"], compress_statistics=nested
    )
    return functional.dequantize_4bit(codes, state).float()


@pytest.fixture(scope="module")
def expected_logits(folders):
    """kind → logits of each row by a model of its own."""

    @lru_cache
    @torch.no_grad()
    def of_kind(kind):
        prompts = random_prompts(len(MIXES))
        return [
            dense_model(folders, kind, mix)(input_ids=prompts[row : row + 1]).logits[0] for row, mix in enumerate(MIXES)
        ]

    return of_kind


def dense_model(folders, kind, mix):
    """A plain model with ``Q(D) + sum_k w_k S_k`` in its weights."""
    model = load(folders["out"])
    state = model.state_dict()
    experts = {name: weights_of(folders[name]) for name in mix}
    for name, backbone in weights_of(folders["out"]).items():
        if name.endswith("proj.weight"):
            total = numbers_of(backbone, kind)
            for expert, weight in mix.items():
                total = total + weight * thin_out(experts[expert][name] - backbone, DENSITY, "sign")
            state[name].copy_(total)
    return model


@pytest.mark.parametrize("in_bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", [None, "sparse", "dense"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_is_the_codes_numbers_plus_its_deltas(folders, expected_logits, kind, execution, device, in_bfloat16):
    model = quantized(folders["out"], kind, device, in_bfloat16)
    model.set_execution(execution)
    prompts = random_prompts(len(MIXES)).to(device)
    logits = model(input_ids=prompts, expert_weights=MIXES).logits
    with model.disable_adapter():
        backbone = model(input_ids=prompts).logits
    assert (logits[:-1] - backbone[:-1]).abs().amax(dim=(1, 2)).min() > 1e-2, "the adapter changes nothing"
    for row, mix in enumerate(MIXES):
        expected = expected_logits(kind)[row]
        # 8-bit layers round their inputs, too; on a GPU, in half precision.
        tolerance = 0.15 if kind == "int8" or in_bfloat16 else 2e-3
        if kind == "int8" and device == "cuda":
            change = (expected - backbone[row].cpu()).norm() if mix else expected.norm()
            assert (logits[row].cpu() - expected).norm() < tolerance * change
        else:
            torch.testing.assert_close(logits[row].cpu(), expected, rtol=tolerance, atol=tolerance)
    plain = AutoModelForCausalLM.from_pretrained(
        folders["out"], quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32, device_map=device
    )
    plain = plain if in_bfloat16 else in_float32(plain)
    assert torch.equal(plain(input_ids=prompts).logits, backbone)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
@torch.no_grad()
def test_codes_laid_out_anew_for_the_cpu_are_read_back(folders, kind):
    model = quantized(folders["out"], kind, in_bfloat16=True)
    with model.disable_adapter():
        model(input_ids=random_prompts(1))
    backbone = weights_of(folders["out"])
    layers = model.base_model.routed_layers()
    states = [layer.base_layer.weight.quant_state for layer in layers.values()]
    if not all(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes has no kernels of its own for this CPU")
    for name, layer in layers.items():
        expected = numbers_of(backbone[f"{name}.weight"], kind)
        # The scales were rounded to bfloat16.
        torch.testing.assert_close(readable_weight(layer.base_layer), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_and_few_agree(folders, kind):
    model = quantized(folders["out"], kind)
    prompts = random_prompts(2, 40)
    with torch.no_grad():
        chosen = model(input_ids=prompts, expert_weights=["math", "code"]).logits
        model.set_execution("sparse")
        sparse = model(input_ids=prompts, expert_weights=["math", "code"]).logits
    torch.testing.assert_close(chosen, sparse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_save_load_route_and_generate(folders, tmp_path, topics, tokenizer, kind):
    model = quantized(folders["out"], kind)
    model.fit_router(topics, tokenizer)
    inputs = tokenizer([topics["math"][0], topics["code"][0]], return_tensors="pt", padding=True)
    route = model.route(**inputs)
    assert route.expert_weights.argmax(dim=1).tolist() == [0, 1]
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, expert_weights=["math", "code"])
    for row, expert in enumerate(["math", "code"]):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert torch.equal(
            model.generate(**one, max_new_tokens=6, do_sample=False, expert_weights=expert)[0], tokens[row]
        )
    model.save_pretrained(tmp_path / "adapter")
    again = quantized(tmp_path / "adapter", kind)
    ours, theirs = model.base_model.state_dict(), again.base_model.state_dict()
    bank = [name for name in ours if "mediator_" in name]
    assert bank
    assert all(torch.equal(ours[name], theirs[name]) for name in bank)
    routed = (each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (model, again))
    assert torch.equal(*routed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_around_a_base_that_is_quantised_already(folders, kind):
    settings = BitsAndBytesConfig(**KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(folders["base"], quantization_config=settings, dtype=torch.float32)
    experts = {name: str(folders[name]) for name in ("math", "code")}
    wrapped = get_mediator_model(base, MediatorConfig(experts=experts, density=DENSITY)).eval()
    loaded = quantized(folders["out"], kind)
    prompts = random_prompts(len(MIXES))
    ours, theirs = (in_float32(model)(input_ids=prompts, expert_weights=MIXES).logits for model in (wrapped, loaded))
    assert torch.equal(ours, theirs)
    with wrapped.disable_adapter(), loaded.disable_adapter():
        assert torch.equal(wrapped(input_ids=prompts).logits, loaded(input_ids=prompts).logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_low_rank_deltas_stay_beside_the_codes(folders, tmp_path, kind):
    experts = {name: folders[name] for name in ("math", "code")}
    settings = MediatorConfig(sparsifier="svd", rank=12)
    build_mediator(folders["base"], experts, tmp_path / "low", settings)
    model, prompts = quantized(tmp_path / "low", kind), random_prompts(1)
    plain = load(tmp_path / "low")
    state = plain.state_dict()
    for name, layer in model.base_model.routed_layers().items():
        weight = f"{name}.weight"
        state[weight] = numbers_of(state[weight], kind) + layer.mediator_bank["default"].get("math").dense()
    plain.load_state_dict(state)
    expected = plain(input_ids=prompts).logits
    tolerance = 0.15 if kind == "int8" else 2e-3
    with model.disable_adapter():
        assert (model(input_ids=prompts).logits - expected).abs().max() > 2 * tolerance
    for execution in (None, "sparse", "dense"):
        model.set_execution(execution)
        found = model(input_ids=prompts, expert_weights="math").logits
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("in_bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_saving_leaves_the_model_as_it_is(folders, tmp_path, kind, in_bfloat16):
    """On some processors bitsandbytes lays codes out anew at the first inference, and does not find back by itself."""
    model = quantized(folders["out"], kind, in_bfloat16=in_bfloat16)
    prompts = random_prompts(len(MIXES))
    before = model(input_ids=prompts, expert_weights=MIXES).logits
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
        after = model(input_ids=prompts, expert_weights=MIXES).logits
        # Scales that were stored in 8 bits are quantised once more.
        tolerance = 0.05 if "8 bits" in kind else 1e-3
        assert (after - before).norm() < tolerance * before.norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_way_of_applying_deltas_after_the_other(folders, kind):
    prompts = random_prompts(len(MIXES))
    logits = []
    for executions in (["sparse"], ["dense"], ["sparse", "dense", "sparse", "dense"]):
        model = quantized(folders["out"], kind)
        for execution in executions:
            model.set_execution(execution)
            logits.append(model(input_ids=prompts, expert_weights=MIXES).logits)
    sparse, dense, *again = logits
    for place, found in enumerate(again):
        assert torch.equal(found, (sparse, dense)[place % 2])


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [
        ("nf4", "sign"),
        ("int8", "sign"),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in [("nf4", "float"), ("fp4", "sign")]),
    ],
)
@pytest.mark.parametrize("execution", ["sparse", "dense"])
@torch.no_grad()
def test_a_correction_corrects_quantization_error(folders, tmp_path, monkeypatch, kind, encoding, execution):
    # Matrices of several tiles, as real ones are.
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 512)
    experts = {name: folders[name] for name in ("math", "code")}
    settings = MediatorConfig(density=DENSITY, encoding=encoding, for_quantization=kind, correction_density=0.4)
    build_mediator(folders["base"], experts, tmp_path / "corrected", settings)
    model = quantized(tmp_path / "corrected", kind)
    model.set_execution(execution)
    prompts = random_prompts(len(MIXES))
    logits = model(input_ids=prompts, expert_weights=MIXES).logits
    plain = load(folders["out"])
    backbone = plain.state_dict()
    routed = [name for name in backbone if name.endswith("proj.weight")]
    corrected = {}
    for name in routed:
        rounded = numbers_of(backbone[name], kind)
        corrected[name] = rounded + thin_out(backbone[name] - rounded, 0.4, encoding, "mean")
    deltas = {
        (expert, name): thin_out(weights_of(folders[expert])[name] - backbone[name], DENSITY, encoding)
        for expert in ("base", "math", "code")
        for name in routed
    }
    for row, mix in enumerate(MIXES):
        state = plain.state_dict()
        for name in routed:
            state[name] = corrected[name]
            for expert, weight in mix.items():
                state[name] = state[name] + weight * deltas[expert, name]
        by_hand = load(folders["out"])
        by_hand.load_state_dict(state)
        expected = by_hand(input_ids=prompts[row : row + 1]).logits[0]
        tolerance = 0.15 if kind == "int8" and execution == "sparse" else 2e-3
        torch.testing.assert_close(logits[row], expected, rtol=tolerance, atol=tolerance)
    if kind != "int8":  # whose errors are small beside those of its rounded inputs
        exact = plain(input_ids=prompts[-1:]).logits[0]
        with model.disable_adapter():
            uncorrected = model(input_ids=prompts[-1:]).logits[0]
        assert (logits[-1] - exact).norm() < 0.7 * (uncorrected - exact).norm()


@torch.no_grad()
def test_a_correction_is_left_out_where_it_does_not_belong(folders, tmp_path):
    experts = {name: folders[name] for name in ("math", "code")}
    config = MediatorConfig(density=DENSITY, for_quantization="nf4")
    build_mediator(folders["base"], experts, tmp_path / "corrected", config)
    prompts = random_prompts(len(MIXES))
    plain, without = (
        load_mediator(folder, dtype=torch.float32)[0] for folder in (tmp_path / "corrected", folders["out"])
    )
    ours, theirs = (model(input_ids=prompts, expert_weights=MIXES).logits for model in (plain, without))
    assert torch.equal(ours, theirs)
    plain.save_pretrained(tmp_path / "saved")
    quantized(tmp_path / "saved", "nf4")  # the correction was not lost on the way
    with pytest.warns(UserWarning, match="correction is for a backbone in nf4, this one is in int8"):
        other = quantized(tmp_path / "corrected", "int8")
    ours = other(input_ids=prompts, expert_weights=MIXES).logits
    assert torch.equal(ours, quantized(folders["out"], "int8")(input_ids=prompts, expert_weights=MIXES).logits)


@torch.no_grad()
def test_prompts_are_read_with_the_correction(folders, tmp_path):
    experts = {name: folders[name] for name in ("math", "code")}
    settings = MediatorConfig(density=DENSITY, for_quantization="nf4", correction_density=0.4)
    build_mediator(folders["base"], experts, tmp_path / "corrected", settings)
    by_hand = load(folders["out"])
    state = by_hand.state_dict()
    for name in [name for name in state if name.endswith("proj.weight")]:
        rounded = numbers_of(state[name], "nf4")
        state[name] = rounded + thin_out(state[name] - rounded, 0.4, "sign", "mean")
    by_hand.load_state_dict(state)
    model, prompts = quantized(tmp_path / "corrected", "nf4").base_model, random_prompts(3)
    layer = model.prompt_router.router_layer
    expected = by_hand(input_ids=prompts, output_hidden_states=True).hidden_states[layer].mean(dim=1)
    torch.testing.assert_close(model.prompt_router.features(prompts, None), expected, rtol=2e-3, atol=2e-3)
    # A correction is all that is added: no expert's delta, and nothing where the codes are others.
    plain = load_mediator(tmp_path / "corrected", dtype=torch.float32)[0].base_model
    exact = load(folders["out"])(input_ids=prompts, output_hidden_states=True).hidden_states[layer].mean(dim=1)
    torch.testing.assert_close(plain.prompt_router.features(prompts, None), exact, rtol=1e-5, atol=1e-5)


def test_a_router_fitted_on_other_weights_is_not_used_without_a_word(folders, tmp_path, topics, tokenizer):
    def fitted(model, name):
        model.fit_router(topics, tokenizer, background=[])
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    def said(load, *of):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            load(*of)
        return [str(each.message) for each in found if "the router was fitted on" in str(each.message)]

    def plain(folder):
        return load_mediator(folder, dtype=torch.float32)[0]

    on_plain, on_codes = fitted(plain(folders["out"]), "plain"), fitted(quantized(folders["out"], "nf4"), "codes")
    (message,) = said(quantized, on_plain, "nf4")
    assert "fitted on plain weights, and the backbone has weights in nf4" in message
    (message,) = said(plain, on_codes)
    assert "fitted on weights in nf4, and the backbone has plain weights" in message
    assert not said(quantized, on_codes, "nf4")
    assert not said(plain, on_plain)
    assert not said(quantized, on_plain, "int8")
    assert not said(quantized, folders["out"], "nf4"), "there is no fitted router yet"
    both = quantized(on_codes, "nf4")
    (message,) = said(both.load_adapter, str(on_plain), "second")
    assert "fitted on plain weights" in message
    assert not said(both.load_adapter, str(on_codes), "third")
    experts = {name: folders[name] for name in ("math", "code")}
    build_mediator(folders["base"], experts, tmp_path / "corrected", MediatorConfig(for_quantization="nf4"))
    corrected = fitted(plain(tmp_path / "corrected"), "with correction")
    assert not said(quantized, corrected, "nf4")
    assert not said(plain, fitted(quantized(tmp_path / "corrected", "nf4"), "with correction on codes"))


def test_what_cannot_be_done_is_refused(folders):
    model = quantized(folders["out"], "nf4")
    with pytest.raises(UnsupportedError, match="quantised weight cannot take a mix"):
        model.merge_and_unload(expert_weights="math")
    settings = BitsAndBytesConfig(**KINDS["nf4"])
    other = AutoModelForCausalLM.from_pretrained(folders["base"], quantization_config=settings, dtype=torch.float32)
    from peft import PeftModel

    with pytest.raises(BackboneMismatchError):
        PeftModel.from_pretrained(other, str(folders["out"] / "mediator"))
    other = AutoModelForCausalLM.from_pretrained(folders["base"], quantization_config=settings, dtype=torch.float32)
    other.name_or_path = other.config._name_or_path = ""
    experts = {name: str(folders[name]) for name in ("math", "code")}
    with pytest.raises(CheckpointError, match="full-precision weights"):
        get_mediator_model(other, MediatorConfig(experts=experts))


def test_the_router_trains_on_a_quantised_backbone(folders):
    model = quantized(folders["out"], "nf4")
    model.train()
    for parameter in model.base_model.mediator_router.parameters():
        parameter.requires_grad_(True)
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    prompts = random_prompts(2)
    model(input_ids=prompts, labels=prompts, expert_weights=weights).loss.backward()
    assert weights.grad is not None
    assert weights.grad.abs().min() > 0
