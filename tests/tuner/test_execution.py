"""Ways of applying deltas, in every dtype and under everything that wraps or drives a model."""

import pytest
import torch
from reference import mixed_model
from tiny import random_prompts, tiny_model, write_tiny_checkpoints

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.bank.layer_bank import LayerBank
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.errors import RoutingError, UnsupportedError
from mediator_peft.kernels import dispatch as kernels
from mediator_peft.tuner import merged_weight
from mediator_peft.tuner.execution import WholeWeight
from mediator_peft.tuner.merged_weight import mixed_weight

SETTINGS = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
MIXES = [{"math": 1.0}, {"code": 1.0}, {"math": 0.3, "code": 0.6}, {}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("execution")
    paths = write_tiny_checkpoints(folder / "checkpoints")
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(density=0.3))
    return {**paths, "out": folder / "out"}


@pytest.fixture
def model(paths):
    return load_mediator(paths["out"], dtype=torch.float32)[0]


def dense(paths, mix, dtype=torch.float32):
    checkpoints = {name: path for name, path in paths.items() if name != "out"}
    return mixed_model(checkpoints, mix, 0.3, "sign").to(dtype)


@pytest.mark.parametrize("execution", [None, "merged", "sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), pytest.param(torch.float16, 0.02, marks=pytest.mark.slow), (torch.bfloat16, 0.12)],
    ids=str,
)
@torch.no_grad()
def test_every_way_equals_the_dense_formula_in_every_dtype(paths, dtype, tolerance, execution):
    model, _ = load_mediator(paths["out"], dtype=dtype)
    model.set_execution(execution)
    prompts = random_prompts(len(MIXES))
    with model.disable_adapter():
        backbone = model(input_ids=prompts).logits.float()
    prefill = model(input_ids=prompts[:, :-1], expert_weights=MIXES, use_cache=True)
    step = model(input_ids=prompts[:, -1:], past_key_values=prefill.past_key_values, expert_weights=MIXES).logits
    mixed = torch.cat([prefill.logits, step], dim=1).float()
    for row, mix in enumerate(MIXES):
        expected = dense(paths, mix, dtype)(input_ids=prompts[row : row + 1]).logits[0].float()
        with model.use_experts(mix):
            alone = model(input_ids=prompts[row : row + 1]).logits[0].float()
        change = (expected - backbone[row]).norm() if mix else expected.norm()
        assert (mixed[row] - expected).norm() < tolerance * change
        assert (alone - expected).norm() < tolerance * change


@pytest.mark.parametrize(
    "settings", [dict(sparsifier="svd", rank=3), dict(encoding="factors_sign", density=0.1)], ids=str
)
@torch.no_grad()
def test_few_tokens_of_a_mixed_batch_are_multiplied_by_the_factors(paths, tmp_path, monkeypatch, settings):
    """A whole matrix for each step would cost many times the product."""
    experts = {name: paths[name] for name in ("math", "code")}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(**settings))
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    prompts = random_prompts(len(MIXES), 1)
    model.set_execution("dense")
    expected = model(input_ids=prompts, expert_weights=MIXES).logits
    model.set_execution(None)
    many = model(input_ids=random_prompts(len(MIXES), 140), expert_weights=MIXES).logits

    def refuse(delta):
        raise AssertionError("a whole matrix")

    monkeypatch.setattr(SparseDelta, "dense", refuse)
    found = model(input_ids=prompts, expert_weights=MIXES).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert many.isfinite().all()


@torch.no_grad()
def test_steps_of_one_request_go_on_as_the_first_until_something_changes(model):
    """What is kept from step to step must not outlive its route."""
    prompts, one = random_prompts(4), random_prompts(4, 1, seed=2)
    rows = ["math", "math", "code", None]
    expected = {
        spec: model(input_ids=one, expert_weights=list(spec)).logits for spec in [tuple(rows), tuple(rows[::-1])]
    }
    with model.disable_adapter():
        backbone = model(input_ids=one).logits
    for _ in range(2):
        for spec, logits in expected.items():
            with model.use_experts(list(spec)):
                for _ in range(3):
                    assert torch.equal(model(input_ids=one).logits, logits)
                model(input_ids=prompts)
                with model.use_experts("math"):
                    folded = model(input_ids=one).logits
                    assert torch.equal(model(input_ids=one).logits, folded)
                    with model.disable_adapter():
                        assert torch.equal(model(input_ids=one).logits, backbone)
                    assert torch.equal(model(input_ids=one).logits, folded)
                assert torch.equal(model(input_ids=one).logits, logits)
    with model.use_experts(None):
        assert torch.equal(model(input_ids=one).logits, backbone)


@pytest.mark.parametrize("mix", [{"math": 1.0}, {"math": 0.5, "code": 0.5}], ids=["one", "blend"])
@torch.no_grad()
def test_an_exception_while_folding_leaves_the_backbone(monkeypatch, model, mix):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = list(model.routed_layers().values())
    fold = type(layers[0].weight_state.merged)
    original, calls = fold._write, []

    def fails(self, bank, mix):
        original(self, bank, mix)
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError

    monkeypatch.setattr(fold, "_write", fails)
    with pytest.raises(MemoryError), model.use_experts(mix):
        model(input_ids=random_prompts(1))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("spec", ["math", ["math", "code"]], ids=["one", "mixed"])
def test_assisted_generation_gives_the_tokens_of_plain_generation(model, spec):
    prompts = random_prompts(1 if isinstance(spec, str) else 2)
    expected = model.generate(prompts, expert_weights=spec, **SETTINGS)
    if isinstance(spec, str):
        assisted = model.generate(prompts, expert_weights=spec, assistant_model=tiny_model(seed=0), **SETTINGS)
        assert torch.equal(assisted, expected)
        looked_up = model.generate(prompts, expert_weights=spec, prompt_lookup_num_tokens=2, **SETTINGS)
        assert torch.equal(looked_up, expected)
    else:
        with pytest.raises(ValueError, match="batch"):  # transformers' own limit
            model.generate(prompts, expert_weights=spec, assistant_model=tiny_model(seed=0), **SETTINGS)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decode_step_with_a_static_route_gives_the_same(model):
    # Tracing takes seconds a layer; the blocks are alike.
    plain = model.base_model.model
    plain.model.layers, plain.config.num_hidden_layers = plain.model.layers[-1:], 1
    plain.model.layers[0].self_attn.layer_idx = 0
    prompts, step = random_prompts(2), random_prompts(2, 1, seed=3)
    with model.disable_adapter():
        backbone = model(input_ids=prompts).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="eager")
    for spec in ("math", ["math", "code"]):
        assert (model(input_ids=prompts, expert_weights=spec).logits - backbone).abs().max() > 1e-2
        with model.use_experts(spec):
            eager_cache = model(input_ids=prompts, use_cache=True).past_key_values
            cache = model(input_ids=prompts, use_cache=True).past_key_values
            for _ in range(2):
                expected = model(input_ids=step, past_key_values=eager_cache).logits
                torch.testing.assert_close(compiled(input_ids=step, past_key_values=cache).logits, expected)
    with model.use_experts("code"):
        torch.testing.assert_close(compiled(input_ids=step).logits, model(input_ids=step).logits)


@torch.no_grad()
def test_a_further_step_does_not_go_through_all_modules(model, monkeypatch):
    """Which would take a millisecond of each decode step."""
    prompts = random_prompts(1)
    with model.use_experts("math"):
        expected = model(input_ids=prompts).logits
        monkeypatch.setattr(
            type(model.base_model.model), "named_modules", lambda *_, **__: pytest.fail("all modules were gone through")
        )
        assert torch.equal(model(input_ids=prompts).logits, expected)
        monkeypatch.undo()


@torch.no_grad()
def test_offloaded_layers_keep_their_deltas(paths, model, tmp_path):
    placement = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    placement |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = dict(dtype=torch.float32, device_map=placement, offload_folder=str(tmp_path))
    offloaded, _ = load_mediator(paths["out"], **options)
    weights = {layer.base_layer.weight.device.type for layer in offloaded.routed_layers().values()}
    assert weights == {"cpu", "meta"}, "nothing is offloaded"
    prompts = random_prompts(2)
    for spec in ("math", ["math", "code"], {"math": 0.4, "code": 0.5}):
        expected = model(input_ids=prompts, expert_weights=spec).logits
        torch.testing.assert_close(offloaded(input_ids=prompts, expert_weights=spec).logits, expected)
        tokens = offloaded.generate(prompts, expert_weights=spec, **SETTINGS)
        assert torch.equal(tokens, model.generate(prompts, expert_weights=spec, **SETTINGS))
    with pytest.raises(UnsupportedError, match="offloaded"):
        offloaded.merge_and_unload(expert_weights="math")


def test_gradient_checkpointing_recomputes_under_the_same_route(model):
    prompts = random_prompts(2)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        weights = torch.tensor([[0.5, 0.2, 0.1], [0.0, 1.0, 0.0]], requires_grad=True)
        model(input_ids=prompts, expert_weights=weights, use_cache=False).logits.square().mean().backward()
        gradients.append(weights.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_by_numpy_everything_is_the_same(monkeypatch, model):
    prompts = random_prompts(4)
    expected = model(input_ids=prompts, expert_weights=MIXES).logits
    with model.use_experts("math"):
        folded = model(input_ids=prompts).logits
    monkeypatch.setattr(kernels, "native", lambda: None)
    torch.testing.assert_close(model(input_ids=prompts, expert_weights=MIXES).logits, expected, rtol=1e-4, atol=1e-4)
    with model.use_experts("math"):
        torch.testing.assert_close(model(input_ids=prompts).logits, folded, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_kept_weights_change_nothing_but_the_way(paths, model):
    # Long enough that each group of rows reads its whole weight.
    prompts, rows = random_prompts(4, 20), ["math", "code", None, "math"]
    mixes = [{name: 1.0} if name else {} for name in rows]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = model.routed_layers().values()
    model.cache_merged_experts(["math", "code"])
    kept = sum(layer.cached_bytes for layer in layers)
    assert kept == 2 * sum(layer.base_layer.weight.nbytes for layer in layers)
    logits = model(input_ids=prompts, expert_weights=rows).logits
    for row, mix in enumerate(mixes):
        expected = dense(paths, mix)(input_ids=prompts[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    with model.use_experts("math"):
        alone = model(input_ids=prompts).logits
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    torch.testing.assert_close(alone[:1], logits[:1], rtol=1e-4, atol=1e-4)
    assert all(layer.steps.short_way is None and not layer.merged_bytes for layer in layers)
    one = random_prompts(4, 1, seed=2)
    step, by_hand = model(input_ids=one, expert_weights=rows).logits, dense(paths, mixes[1])(input_ids=one).logits
    torch.testing.assert_close(step[1], by_hand[1], rtol=1e-4, atol=1e-4)
    blend = {"math": 0.5, "code": 0.5}
    expected = dense(paths, blend)(input_ids=prompts).logits
    torch.testing.assert_close(model(input_ids=prompts, expert_weights=blend).logits, expected, rtol=1e-4, atol=1e-4)
    model.cache_merged_experts(["code"])
    assert sum(layer.cached_bytes for layer in layers) == kept / 2
    model.half()
    assert sum(layer.cached_bytes for layer in layers) == kept / 4
    half = model(input_ids=prompts, expert_weights="code").logits.float()
    assert (half[1] - logits[1]).norm() < 0.02 * logits[1].norm()
    model.cache_merged_experts(())
    assert not any(layer.cached_bytes for layer in layers)


@torch.no_grad()
def test_steps_with_a_kept_weight_are_plain_products(paths, model):
    prompt, token = random_prompts(2, 5), random_prompts(2, 1, seed=3)
    by_hand = dense(paths, {"math": 1.0})
    layers = list(model.routed_layers().values())
    seen = []
    model.cache_merged_experts(["math"])
    with model.use_experts("math"):
        for ids in (prompt, token, token):
            torch.testing.assert_close(model(input_ids=ids).logits, by_hand(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
            assert all(isinstance(layer.steps.short_way, WholeWeight) for layer in layers)
        assert not any(layer.merged_bytes for layer in layers)
        # Whoever watches the layer sees every step, and a weight that is no longer kept is no longer used.
        handle = layers[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
        model(input_ids=token)
        handle.remove()
        assert seen == [1]
        model(input_ids=token)
        model.cache_merged_experts(())
        assert all(layer.steps.short_way is None for layer in layers)
        after = model(input_ids=token).logits
        assert all(layer.merged_bytes for layer in layers)
    torch.testing.assert_close(after, by_hand(input_ids=token).logits, rtol=1e-4, atol=1e-4)
    model.cache_merged_experts(["math", "code"])
    for name in ("code", "math", "code"):
        answer = model.generate(input_ids=prompt, expert_weights=name, **SETTINGS)
        assert torch.equal(answer, dense(paths, {name: 1.0}).generate(prompt, **SETTINGS))


def test_keeping_an_unknown_expert_is_refused(model):
    with pytest.raises(RoutingError, match="unknown"):
        model.cache_merged_experts(["math", "unknown"])


@pytest.mark.skipif(not kernels.has_native(), reason="plain numpy merges whole weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_weights_merged_block_by_block_are_the_whole_weight(monkeypatch, dtype, has_bias):
    """Blocks of 16 rows, the last one of fewer; memory that was used before holds what it held."""
    monkeypatch.setattr(merged_weight, "BLOCK_BYTES", 1)
    bank = LayerBank((50, 33), "sign", False)
    delta = torch.randn(50, 33)
    bank.put("math", SparseDelta.from_dense(delta, torch.rand(50, 33) < 0.3, "sign"))
    weight, x = torch.randn(50, 33).to(dtype), torch.randn(7, 33).to(dtype)
    bias = torch.randn(50).to(dtype) if has_bias else None
    for coefficient in (1.0, -0.5):
        mix, out = (("math", coefficient),), torch.empty(7, 50, dtype=dtype)
        merged_weight.block_merging(weight, bank, mix, dtype).product(x, bias, out)
        expected = torch.nn.functional.linear(x, mixed_weight(weight, bank, mix), bias)
        assert (expected - torch.nn.functional.linear(x, weight, bias)).abs().max() > 0.1
        torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_rows_of_an_expert_may_lie_apart_in_the_batch(model):
    prompts, rows = random_prompts(5), ["math", "code", "math", None, "code"]
    model.set_execution("dense")
    mixed = model(input_ids=prompts, expert_weights=rows).logits
    for row, name in enumerate(rows):
        alone = model(input_ids=prompts[row : row + 1], expert_weights=[name]).logits[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["layer", "base_layer", "everywhere", "replaced"])
@pytest.mark.parametrize("rows", ["math", ["math", "code", None, "code"]], ids=["merged", "sparse"])
@torch.no_grad()
def test_hooks_see_every_step(model, where, rows):
    """Also those that are set in the middle of a request, whose steps take a short way."""
    one, seen = random_prompts(4, 1, seed=2), []
    layer = next(iter(model.base_model.routed_layers().values()))
    with model.use_experts(rows):
        for _ in range(3):
            expected = model(input_ids=one).logits
        if where == "everywhere":
            hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        elif where == "replaced":  # as Accelerate does it
            plain = layer.forward
            layer.forward = lambda *args: seen.append(layer) or plain(*args)
        else:
            module = layer if where == "layer" else layer.base_layer
            hook = module.register_forward_hook(lambda module, *_: seen.append(module))
        for _ in range(2):
            assert torch.equal(model(input_ids=one).logits, expected) or where in ("base_layer", "everywhere")
        if where == "replaced":
            del layer.forward
        else:
            hook.remove()
        assert seen.count(layer.base_layer if where == "base_layer" else layer) == 2


@pytest.mark.parametrize("kind", ["forward", "pre"])
@torch.no_grad()
def test_hooks_of_a_base_layer_see_every_prefill(model, kind):
    prompts, rows, seen = random_prompts(4), ["math", "code", None, "code"], []
    model.set_execution("dense")
    expected = model(input_ids=prompts, expert_weights=rows).logits
    layer = next(iter(model.base_model.routed_layers().values())).base_layer
    register = layer.register_forward_hook if kind == "forward" else layer.register_forward_pre_hook
    hook = register(lambda module, *_: seen.append(module))
    torch.testing.assert_close(model(input_ids=prompts, expert_weights=rows).logits, expected, rtol=1e-4, atol=1e-4)
    hook.remove()
    model(input_ids=prompts, expert_weights=rows)
    assert seen == [layer]
