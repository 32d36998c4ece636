"""Experts come and go; the backbone, the other experts and their held-out statistics stay bit for bit."""

import pytest
import torch
from fitting import fit_once
from tiny import random_prompts, write_tiny_checkpoints

from mediator_peft import load_mediator
from mediator_peft.errors import CheckpointError, CheckpointMismatchError, ConfigError, RoutingError, UnsupportedError


def two(topics):
    return {name: topics[name] for name in ("math", "code")}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


SETTINGS = [
    {},
    {"encoding": "float"},
    {"density": 1.0, "encoding": "float"},
    {"sparsifier": "dare", "encoding": "float"},
    {"sparsifier": "svd", "rank": 8},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_expert_added_later_is_the_one_built_in(build, checkpoints, settings):
    # With the base as backbone nothing else depends on who is there.
    later = build(merge_method="base", **settings)
    later.add_expert("law", str(checkpoints["law"]))
    at_once = build(("math", "code", "law"), "all", merge_method="base", **settings)
    assert later.expert_names == at_once.expert_names == ["math", "code", "law", "base"]
    ours, theirs = later.state_dict(), at_once.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.endswith(":scales"):  # summed in another order
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(ours[key], value), key


def test_adding_leaves_everything_else_alone_and_routes_to_the_new_expert(build, checkpoints, topics, tokenizer):
    model = build()
    fit_once(model, two(topics), tokenizer)
    before = state(model)
    inputs = tokenizer(topics["math"][:8] + topics["law"][:8], return_tensors="pt", padding=True)
    old = model.route(**inputs)
    model.add_expert("law", str(checkpoints["law"]), topics["law"], tokenizer)
    for key, value in before.items():
        now = model.state_dict()[key]
        assert torch.equal(now[: len(value)] if ".mediator_router." in key else now, value), key
    route = model.route(**inputs)
    assert route.expert_weights.shape == (16, 4)
    # What the old experts' scores say of each other is as it was.
    torch.testing.assert_close(route.scores[:, 0] - route.scores[:, 1], old.scores[:, 0] - old.scores[:, 1])
    assert (route.scores[8:].argmax(dim=1) == 2).double().mean() > 0.7
    assert route.expert_weights[8:, 2].mean() > 0.5 > route.expert_weights[:8, 2].mean() + 0.3
    with torch.no_grad():
        by_name = model(input_ids=random_prompts(2), expert_weights="law").logits
    with torch.no_grad(), model.disable_adapter():
        assert (model(input_ids=random_prompts(2)).logits - by_name).abs().max() > 1e-2


def test_a_new_expert_is_its_own_delta_to_the_backbone(build, checkpoints):
    model = build(density=1.0, encoding="float", routed_layers="all")
    model.add_expert("law", str(checkpoints["law"]))
    merged = model.merge_and_unload(expert_weights="law").state_dict()
    expected = weights_of(checkpoints["law"])
    for name in merged:
        if "_proj" in name:
            torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-6)


def weights_of(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def test_an_edited_model_is_saved_and_loaded(build, checkpoints, topics, tokenizer, tmp_path):
    model = build()
    fit_once(model, two(topics), tokenizer)
    model.add_expert("law", str(checkpoints["law"]), topics["law"], tokenizer)
    model.remove_expert("math")
    assert model.expert_names == ["code", "law", "base"]
    model.save_pretrained(tmp_path / "edited")
    loaded, _ = load_mediator(tmp_path / "edited", dtype=torch.float32)
    assert loaded.expert_names == model.expert_names
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    inputs = tokenizer(topics["code"][:4], return_tensors="pt", padding=True)
    assert torch.equal(loaded.route(**inputs).expert_weights, model.route(**inputs).expert_weights)


def test_adding_and_removing_is_nothing(build, checkpoints, topics, tokenizer):
    model = build()
    fit_once(model, two(topics), tokenizer)
    before = state(model)
    model.add_expert("law", str(checkpoints["law"]), topics["law"], tokenizer)
    assert state(model).keys() != before.keys()
    model.remove_expert("law")
    after = state(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("base", ConfigError, "fallback"), ("math", ConfigError, "already"), ("a.b", ConfigError, "cannot be used")],
)
def test_names_are_checked(build, checkpoints, name, error, message):
    with pytest.raises(error, match=message):
        build().add_expert(name, str(checkpoints["law"]))


def test_faults_change_nothing(build, checkpoints, topics, tokenizer, tmp_path):
    model = build()
    fit_once(model, two(topics), tokenizer)
    before = state(model)
    law = str(checkpoints["law"])
    other = write_tiny_checkpoints(tmp_path / "other", names=["base"], arch="qwen3")["base"]
    for path, texts, error in (
        (str(tmp_path / "nowhere"), topics["law"], CheckpointError),
        (str(other), topics["law"], CheckpointMismatchError),
        (law, None, RoutingError),
        (law, ["one"], RoutingError),
    ):
        with pytest.raises(error):
            model.add_expert("law", path, texts, tokenizer)
    assert model.expert_names == ["math", "code", "base"]
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
def test_a_router_that_cannot_grow_says_so_or_is_left_unfitted(build, checkpoints, topics, tokenizer):
    model, quick = build(router="mlp"), {"background": [], "augmented": False, "hard_negatives": False}
    model.fit_router(two(topics), tokenizer, **quick)
    with pytest.raises(UnsupportedError, match="fitted again"):
        model.add_expert("law", str(checkpoints["law"]), topics["law"], tokenizer)
    model.add_expert("law", str(checkpoints["law"]), reset_router=True)
    report = model.fit_router(topics, tokenizer, **quick)
    assert list(report.num_texts) == ["math", "code", "law"]


def test_the_last_expert_stays(build):
    model = build()
    model.remove_expert("code")
    with pytest.raises(ConfigError, match="only expert"):
        model.remove_expert("math")
    with pytest.raises(ConfigError, match="no expert"):
        model.remove_expert("code")


def test_an_added_expert_gets_a_detector_and_the_others_keep_theirs(build, checkpoints, topics, tokenizer):
    model = build()
    background = [f"w{86 + number % 9} w{86 + number // 9 % 9} w95" for number in range(40)]
    two = {name: topics[name] for name in ("math", "code")}
    model.fit_router(two, tokenizer, background=background)
    before = model.base_model.router.rule
    model.add_expert("law", checkpoints["law"], topics["law"], tokenizer)
    after = model.base_model.router.rule
    assert torch.equal(after.detector_weight[:2], before.detector_weight)
    assert torch.equal(after.combination, before.combination)
    weights = model.route(**tokenizer(topics["law"][:5], padding=True, return_tensors="pt")).expert_weights
    assert float(weights[:, 2].mean()) > 0.9
    model.remove_expert("math")
    assert torch.equal(model.base_model.router.rule.detector_weight, after.detector_weight[1:])
    model.base_model.prompt_router.background = None
    with pytest.raises(RoutingError, match="background="):
        model.add_expert("math", checkpoints["math"], topics["math"], tokenizer)
