"""What differs on a GPU: kernels of its own, ways of applying deltas, moves between devices. Skips without one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import mixed_model
from tiny import ARCHITECTURES, random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.tuner.execution import MOST_DEVICE_ROWS, DeviceRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

MIXES = [{"math": 1.0}, {"math": 0.3, "code": 0.6}, {"code": 0.5, "base": 0.5}, {}]
SETTINGS = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(autouse=True)
def whole_words(monkeypatch):
    """Rows of the tiny models that fill words of a bitmap: shapes that a GPU's kernels take."""
    for architecture in ARCHITECTURES.values():
        if hasattr(architecture, "intermediate_size"):
            monkeypatch.setattr(architecture, "intermediate_size", 64)


def built(folder, arch="llama", dtype=torch.float32, **settings):
    paths = write_tiny_checkpoints(folder / "checkpoints", arch=arch)
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(**{"density": 0.3, **settings}))
    model, _ = load_mediator(folder / "out", dtype=dtype)
    return paths, model.to("cuda")


@pytest.mark.parametrize("encoding", ["sign", "float"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_each_row_equals_its_own_dense_model(tmp_path, arch, encoding):
    paths, model = built(tmp_path, arch, encoding=encoding)
    assert all(layer.bank("default").has_device_loops for layer in model.routed_layers().values())
    prompts = random_prompts(len(MIXES))
    on_gpu = prompts.cuda()
    with model.disable_adapter():
        backbone = model(input_ids=on_gpu).logits
    for execution in (None, "merged", "sparse", "dense"):
        model.set_execution(execution)
        prefill = model(input_ids=on_gpu[:, :-1], expert_weights=MIXES, use_cache=True)
        cache = prefill.past_key_values
        step = model(input_ids=on_gpu[:, -1:], past_key_values=cache, expert_weights=MIXES).logits
        logits = torch.cat([prefill.logits, step], dim=1)
        assert (logits[:-1] - backbone[:-1]).abs().amax(dim=(1, 2)).min() > 1e-2, "the adapter changes nothing"
        for row, mix in enumerate(MIXES):
            expected = mixed_model(paths, mix, 0.3, encoding).cuda()(input_ids=on_gpu[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            with model.use_experts(mix):
                alone = model(input_ids=on_gpu[row : row + 1]).logits[0]
            torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.12)], ids=str)
@pytest.mark.parametrize("execution", [None, "sparse", "dense"])
@torch.no_grad()
def test_half_precision_is_as_near_to_the_formula_as_its_rounding(tmp_path, dtype, tolerance, execution):
    paths, model = built(tmp_path, dtype=dtype)
    model.set_execution(execution)
    prompts = random_prompts(len(MIXES)).cuda()
    with model.disable_adapter():
        backbone = model(input_ids=prompts).logits.float()
    mixed = model(input_ids=prompts, expert_weights=MIXES).logits.float()
    for row, mix in enumerate(MIXES):
        expected = mixed_model(paths, mix, 0.3, "sign").to("cuda", dtype)(input_ids=prompts[row : row + 1]).logits[0]
        change = (expected.float() - backbone[row]).norm() if mix else expected.float().norm()
        assert (mixed[row] - expected.float()).norm() < tolerance * change


@torch.no_grad()
def test_few_rows_take_the_kernels_and_give_what_many_do(tmp_path):
    _, model = built(tmp_path)
    prompts = random_prompts(2, MOST_DEVICE_ROWS).cuda()
    spec = ["math", "code"]
    many = model(input_ids=prompts, expert_weights=spec).logits
    layer = next(iter(model.routed_layers().values()))
    assert layer.steps.short_way is None
    few = model(input_ids=prompts[:, :8], expert_weights=spec).logits
    assert isinstance(layer.steps.short_way, DeviceRows)
    torch.testing.assert_close(few, many[:, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_folding_restores_every_bit(tmp_path, dtype):
    _, model = built(tmp_path, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prompts = random_prompts(1).cuda()
    for spec in ["math", "code", {"math": 0.5, "base": 0.5}, "math"] * 3:
        with model.use_experts(spec):
            model(input_ids=prompts)
            assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_generation_of_a_mixed_batch_is_that_of_its_rows(tmp_path):
    _, model = built(tmp_path)
    prompts = random_prompts(3).cuda()
    specs = ["math", {"math": 0.5, "code": 0.5}, {}]
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        mixed = model.generate(prompts, expert_weights=specs, **SETTINGS, **more)
        for row, spec in enumerate(specs):
            alone = model.generate(prompts[row : row + 1], expert_weights=spec, **SETTINGS, **more)
            assert torch.equal(mixed[row], alone[0])


def test_routing_there_is_routing_on_the_cpu(tmp_path):
    _, model = built(tmp_path)
    tokenizer = tiny_tokenizer()
    topics = {"math": topic_texts(5, 45, 40, seed=1), "code": topic_texts(50, 90, 40, seed=2)}
    model.fit_router(topics, tokenizer)
    texts = tokenizer([topics["math"][0], topics["code"][0]], return_tensors="pt", padding=True)
    there = model.route(texts["input_ids"].cuda(), texts["attention_mask"].cuda())
    generated = model.generate(**texts.to("cuda"), **SETTINGS)
    model.to("cpu")
    here = model.route(texts["input_ids"].cpu(), texts["attention_mask"].cpu())
    assert there.expert_weights.argmax(dim=1).tolist() == [0, 1]
    torch.testing.assert_close(there.expert_weights.cpu(), here.expert_weights, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(**texts.to("cpu"), **SETTINGS), generated.cpu())


def test_a_model_saved_there_loads_anywhere(tmp_path):
    _, model = built(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved", dtype=torch.float32, device_map="cuda")
    prompts = random_prompts(2).cuda()
    with torch.no_grad():
        first, second = (each(input_ids=prompts, expert_weights=["math", "code"]).logits for each in (model, again))
    assert torch.equal(first, second)


@torch.no_grad()
def test_wrapping_a_base_that_lies_there(tmp_path):
    paths, model = built(tmp_path)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=torch.float32).cuda()
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    wrapped = get_mediator_model(base, MediatorConfig(density=0.3, experts=experts)).eval()
    prompts = random_prompts(2).cuda()
    first, second = (each(input_ids=prompts, expert_weights=["math", "code"]).logits for each in (model, wrapped))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_two_threads_at_once(tmp_path):
    _, model = built(tmp_path)
    prompts = random_prompts(2).cuda()
    expected = {name: model.generate(prompts, expert_weights=name, **SETTINGS) for name in ("math", "code")}
    wrong = []

    def work(name):
        for _ in range(10):
            if not torch.equal(model.generate(prompts, expert_weights=name, **SETTINGS), expected[name]):
                wrong.append(name)

    with ThreadPoolExecutor(len(expected)) as pool:
        list(pool.map(work, expected))
    assert not wrong


def test_gradients_reach_the_expert_weights(tmp_path):
    _, model = built(tmp_path)
    prompts = random_prompts(2).cuda()
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], device="cuda", requires_grad=True)
    model(input_ids=prompts, labels=prompts, expert_weights=weights).loss.backward()
    assert weights.grad is not None
    assert weights.grad.abs().min() > 0


def test_compiled_decoding_gives_the_same(tmp_path):
    _, model = built(tmp_path)
    prompts = random_prompts(2).cuda()
    for spec in ("math", ["math", "code"]):
        with torch.no_grad(), model.use_experts(spec):
            expected = model(input_ids=prompts).logits
            compiled = torch.compile(model, backend="inductor")
            torch.testing.assert_close(compiled(input_ids=prompts).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_few_experts_at_a_time_lie_on_the_gpu(tmp_path):
    names = ["math", "code", "law", "chat"]
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", names=["base", *names])
    build_mediator(paths["base"], {name: paths[name] for name in names}, tmp_path / "out", MediatorConfig(density=0.3))
    everything, _ = load_mediator(tmp_path / "out", dtype=torch.float32, device_map="cuda")
    few, _ = load_mediator(tmp_path / "out", dtype=torch.float32, max_resident_experts=2, device_map="cuda")
    prompts = random_prompts(2).cuda()
    banks = [layer.bank("default") for layer in few.routed_layers().values()]
    assert all(buffer.device.type == "cpu" for bank in banks for buffer in bank.buffers())
    for name in [*names, *names]:
        expected = everything(input_ids=prompts, expert_weights=[name, "math"]).logits
        assert torch.equal(few(input_ids=prompts, expert_weights=[name, "math"]).logits, expected)
        assert all({name, "math"} <= set(bank._brought) and len(bank._brought) <= 2 for bank in banks)
    few.to("cpu")
    here = few(input_ids=prompts.cpu(), expert_weights=["law", "math"]).logits
    there = everything(input_ids=prompts, expert_weights=["law", "math"]).logits
    torch.testing.assert_close(here, there.cpu(), rtol=1e-4, atol=1e-4)
