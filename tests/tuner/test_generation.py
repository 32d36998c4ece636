"""One decision per prompt, reused for the whole generation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import ARCHITECTURES, random_prompts
from tokenizer import topic_texts

from mediator_peft.errors import RouterNotFittedError, RoutingError, UnsupportedError

from .conftest import build_and_fit

SETTINGS = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def encode(tokenizer, texts, side):
    tokenizer.padding_side = side
    encoded = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return dict(encoded)


def texts_of_both():
    return [*topic_texts(5, 45, 2, seed=7), *topic_texts(50, 90, 2, seed=8)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_side_and_batching_change_nothing(tmp_path, topics, tokenizer, arch):
    model = build_and_fit(tmp_path, topics, tokenizer, arch)
    texts = texts_of_both()
    left, right = encode(tokenizer, texts, "left"), encode(tokenizer, texts, "right")
    assert (left["attention_mask"] == 0).any(), "nothing is padded"
    routes = [model.route(**left), model.route(**right)]
    torch.testing.assert_close(routes[0].expert_weights, routes[1].expert_weights, rtol=1e-4, atol=1e-4)
    assert len(routes[0].expert_weights.unique(dim=0)) > 1, "all prompts are routed alike"
    together = model.generate(**left, **SETTINGS)[:, left["input_ids"].shape[1] :]
    for row, text in enumerate(texts):
        alone = encode(tokenizer, [text], "left")
        single = model.route(**alone)
        torch.testing.assert_close(single.expert_weights[0], routes[0].expert_weights[row], rtol=1e-4, atol=1e-4)
        tokens = model.generate(**alone, **SETTINGS)[0, alone["input_ids"].shape[1] :]
        assert tokens.tolist() == together[row].tolist()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_routed_generation_is_generation_with_the_routed_weights(tmp_path, topics, tokenizer, arch):
    model = build_and_fit(tmp_path, topics, tokenizer, arch)
    batch = encode(tokenizer, texts_of_both(), "left")
    weights = model.route(**batch).expert_weights
    routed = model.generate(**batch, **SETTINGS)
    assert torch.equal(routed, model.generate(**batch, expert_weights=weights, **SETTINGS))
    backbone = model.generate(**batch, expert_weights=torch.zeros(3), **SETTINGS)
    assert not torch.equal(routed, backbone), "routing changes nothing"


@pytest.mark.parametrize(
    "extra",
    [
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2),
        dict(use_cache=False),
        dict(do_sample=True, num_return_sequences=3),
        dict(prefill_chunk_size=2),
    ],
    ids=lambda extra: "-".join(extra),
)
def test_every_strategy_uses_the_route_of_the_prompt(model, tokenizer, extra):
    texts = texts_of_both()
    batch = encode(tokenizer, texts, "left")
    settings = {**SETTINGS, **extra}
    torch.manual_seed(0)
    routed = model.generate(**batch, **settings)
    weights = model.route(**batch).expert_weights
    with model.use_experts(weights):
        torch.manual_seed(0)
        assert torch.equal(routed, model.generate(**batch, **settings))
    if not settings["do_sample"]:
        for row, text in enumerate(texts):
            alone = encode(tokenizer, [text], "left")
            prompt, count = alone["input_ids"].shape[1], settings.get("num_return_sequences", 1)
            expected = model.generate(**alone, expert_weights=weights[row], **settings)[:, prompt:]
            got = routed[row * count : (row + 1) * count, batch["input_ids"].shape[1] :]
            assert got.tolist() == expected.tolist()


def test_a_carried_over_cache_keeps_its_route(model, tokenizer):
    """A second turn that would be routed elsewhere by itself goes on under the route that filled the cache."""
    first = encode(tokenizer, topic_texts(5, 45, 1, seed=3), "left")["input_ids"]
    more = torch.cat([first, encode(tokenizer, topic_texts(50, 90, 1, seed=4, length=30), "left")["input_ids"]], dim=1)
    with torch.no_grad():
        output = model(input_ids=first, use_cache=True)
        logits = model(input_ids=more[:, first.shape[1] :], past_key_values=output.past_key_values).logits
        weights = model.route(first).expert_weights
        expected = model(input_ids=more, expert_weights=weights).logits[:, first.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_static_cache_gives_the_same_tokens(model, tokenizer):
    batch = encode(tokenizer, texts_of_both(), "left")
    dynamic = model.generate(**batch, **SETTINGS)
    assert torch.equal(
        dynamic, model.generate(**batch, cache_implementation="static", disable_compile=True, **SETTINGS)
    )


def test_two_threads_generate_with_different_experts_at_once(model):
    prompts = random_prompts(2)
    names = ["math", "code", None, {"math": 0.5, "base": 0.5}]
    expected = [model.generate(prompts, expert_weights=[name] * 2, **SETTINGS) for name in names]
    assert not torch.equal(expected[0], expected[1])
    results: list[list[torch.Tensor]] = [[] for _ in names]

    def work(number):
        for _ in range(5):
            results[number].append(model.generate(prompts, expert_weights=[names[number]] * 2, **SETTINGS))

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, range(len(names))))
    for number, tokens in enumerate(results):
        assert len(tokens) == 5
        assert all(torch.equal(one, expected[number]) for one in tokens)


def test_weights_are_the_backbones_again_after_use_also_after_an_exception(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = random_prompts(2)
    for _ in range(3):
        model.generate(prompts, expert_weights="math", **SETTINGS)
        model.generate(prompts, expert_weights={"code": 0.4, "base": 0.3}, **SETTINGS)
    with pytest.raises(ZeroDivisionError), model.use_experts("code"):
        model.generate(prompts, **SETTINGS)
        layer = next(iter(model.routed_layers().values()))
        assert layer.weight_state.merged.mix, "nothing was folded"
        raise ZeroDivisionError
    parameters = dict(model.named_parameters())
    for name, tensor in before.items():
        if name in parameters:
            assert torch.equal(tensor, parameters[name]), name


def test_use_experts_nests_and_ends(model):
    prompts = random_prompts(2)
    with torch.no_grad():
        math, code = (model(input_ids=prompts, expert_weights=name).logits for name in ("math", "code"))
        with model.use_experts("math"):
            torch.testing.assert_close(model(input_ids=prompts).logits, math)
            with model.use_experts("code"):
                torch.testing.assert_close(model(input_ids=prompts).logits, code)
            torch.testing.assert_close(model(input_ids=prompts).logits, math)
        weights = model.route(prompts).expert_weights
        torch.testing.assert_close(
            model(input_ids=prompts).logits, model(input_ids=prompts, expert_weights=weights).logits
        )


def test_all_forms_of_expert_weights_agree(model):
    prompts = random_prompts(2)
    one_hot = torch.tensor([1.0, 0.0, 0.0])
    with torch.no_grad():
        expected = model(input_ids=prompts, expert_weights="math").logits
        for form in (one_hot, one_hot[:2], one_hot.expand(2, 3), {"math": 1}, ["math", {"math": 1.0}], ["math"] * 2):
            torch.testing.assert_close(model(input_ids=prompts, expert_weights=form).logits, expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("maths", "Did you mean 'math'"),
        ({"math": 1, "cod": 1}, "Did you mean 'code'"),
        (torch.ones(5), "shape"),
        (torch.tensor([float("nan"), 0, 0]), "finite"),
        ([], "empty"),
        (["math", "math", "math"], "3 rows"),
        ([1.0, 2.0], "must be a name"),
        ({"math": "much"}, "weight of expert 'math' must be a number"),
        ({"math": None}, "weight of expert 'math' must be a number"),
        (3, "must be a name, a dict, a tensor"),
    ],
)
def test_wrong_expert_weights_say_what_is_wrong(model, weights, message):
    with pytest.raises(RoutingError, match=message):
        model(input_ids=random_prompts(2), expert_weights=weights)


def test_ids_and_masks_that_do_not_fit_are_refused_by_name(model):
    prompts = random_prompts(2)
    with pytest.raises(RoutingError, match=r"whole numbers, got torch\.float32"):
        model(input_ids=prompts.float())
    with pytest.raises(RoutingError, match=r"attention_mask has shape \(2, 3\)"):
        model(input_ids=prompts, attention_mask=torch.ones(2, 3))


def test_a_router_that_is_not_fitted_says_how_to_fit_it(tmp_path, checkpoints):
    from mediator_peft import MediatorConfig, build_mediator, load_mediator

    build_mediator(checkpoints["base"], {"math": checkpoints["math"]}, tmp_path / "out", MediatorConfig())
    model, _ = load_mediator(tmp_path / "out")
    for call in (model.generate, model, model.route):
        with pytest.raises(RouterNotFittedError, match="fit_router"):
            call(input_ids=random_prompts(1))


def test_adapter_names_and_embeddings_without_weights_are_refused(model):
    with pytest.raises(UnsupportedError, match="expert_weights"):
        model.generate(random_prompts(1), adapter_names=["default"])
    with pytest.raises(RoutingError, match="expert_weights"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
