"""Routers made from deltas alone: responses, border, editing and files, against plain formulas."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny import tiny_model, write_tiny_checkpoints

from mediator_peft import MediatorConfig, build_mediator, load_mediator
from mediator_peft.errors import AdapterError, ConfigError, RoutingError, UnsupportedError
from mediator_peft.routing.explain import explain_rows
from mediator_peft.routing.gate import GateSettings, gate
from mediator_peft.routing.routers import SpectralRouter
from mediator_peft.routing.routers.gaussian import GaussianRouter

TOPICS = {"math": (5, 20), "code": (21, 36), "law": (37, 52)}
BACKGROUND = {
    f"family {n}": [f"w{a} w{a + 1 + n} w{a + 2} w{94 - a + 55 - n}" for a in range(55, 80)] for n in range(4)
}


def texts_of(name, count=6):
    low, high = TOPICS[name]
    return [" ".join(f"w{low + (7 * n + 3 * i) % (high - low)}" for i in range(4 + n % 3)) for n in range(count)]


@pytest.fixture
def checkpoints(tmp_path):
    """Experts that read their topic's direction; tokens of a topic have it in their embedding."""
    base, folder = tiny_model(), tmp_path / "checkpoints"
    generator = torch.Generator().manual_seed(5)
    ways = torch.linalg.qr(torch.randn(32, 3, generator=generator)).Q.T
    with torch.no_grad():
        for way, (low, high) in zip(ways, TOPICS.values(), strict=True):
            base.model.embed_tokens.weight[low : high + 1] += 1.5 * way
    base.save_pretrained(folder / "base")
    for number, name in enumerate(TOPICS):
        expert = deepcopy(base)
        with torch.no_grad():
            for block in expert.model.layers:
                for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.up_proj):
                    noise = 0.01 * torch.randn(layer.weight.shape, generator=generator)
                    column = torch.randn(layer.weight.shape[0], 1, generator=generator)
                    layer.weight += noise + 0.3 * column * ways[number]
        expert.save_pretrained(folder / name)
    return {name: folder / name for name in ("base", *TOPICS)}


@pytest.fixture
def made(build, tokenizer):
    """A model of three experts with a router made from their deltas."""

    def make(names=tuple(TOPICS), folder="out", **settings):
        settings = {"density": 1.0, "encoding": "float", "routed_layers": "all", "router_layer": 0, **settings}
        model = build(names, folder, **settings)
        model.fit_router_from_deltas(tokenizer, background=BACKGROUND)
        return model

    return make


def fitted(num_experts=3, size=8, seed=0, kinds=(0, 0, 0, 1, 1, 2, 2, 2, 2, 3)):
    """A router with random directions and background prompts."""
    generator = torch.Generator().manual_seed(seed)
    router = SpectralRouter(num_experts, size)
    router.set_directions(torch.randn(num_experts, size, 2, generator=generator))
    shares = torch.rand(len(kinds), generator=generator)
    responses = torch.randn(len(kinds), num_experts, generator=generator)
    router.set_background(responses, shares / shares.sum(), torch.tensor(kinds))
    return router


def test_responses_are_the_formula_token_by_token():
    router = fitted()
    hidden, mask = torch.randn(4, 5, 8), torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5])
    hidden[1, 0] = torch.nan
    found = router.pool(hidden, mask)
    for row in range(3):
        for expert in range(3):
            values = []
            for token in range(5):
                if mask[row, token]:
                    state = hidden[row, token].double().numpy()
                    state = state / np.sqrt((state**2).mean())
                    values.append(sum((state @ way) ** 2 for way in router.directions[expert].double().numpy().T))
            assert float(found[row, expert]) == pytest.approx(np.log(np.mean(values)), rel=1e-5)
    assert (found[3] == 0).all()


def moments_by_hand(values, shares):
    mean = sum(v * s for v, s in zip(values, shares, strict=True)) / sum(shares)
    return mean, (sum(s * (v - mean) ** 2 for v, s in zip(values, shares, strict=True)) / sum(shares)) ** 0.5


def test_scores_and_border_are_in_standard_deviations_of_background_prompts():
    router = fitted()
    background, shares = router.background_responses.tolist(), router.background_share.tolist()
    kinds = router.background_kinds.tolist()
    prompts = torch.randn(5, 3)
    for row in range(5):
        deviations = []
        for expert in range(3):
            mean, deviation = moments_by_hand(background[expert], shares)
            deviations.append((float(prompts[row, expert]) - mean) / deviation)
            expected = np.sign(deviations[-1]) * deviations[-1] ** 2 / 2
            assert float(router.scores(prompts)[row, expert]) == pytest.approx(expected, rel=1e-4)
        assert float(router.ood_score(prompts)[row]) == pytest.approx(-max(deviations), rel=1e-4)
    for place, kind in enumerate(kinds):
        rest = [other for other in range(len(kinds)) if kinds[other] != kind]
        largest = max(
            (background[expert][place] - mean) / deviation
            for expert in range(3)
            for mean, deviation in [moments_by_hand([background[expert][r] for r in rest], [shares[r] for r in rest])]
        )
        assert float(router.known.background_novelty[place]) == pytest.approx(-largest, rel=1e-4)


def test_without_texts_background_alone_gives_weight_and_border():
    router = fitted(kinds=tuple(range(40)))
    known, settings = router.known, GateSettings(0.01, 0.5, True, 0.2)
    scores = known.background_novelty
    output = gate(torch.zeros(40, 3), scores, scores, known, settings)
    for place in range(40):
        share = float(known.background_share[scores <= scores[place]].sum())
        expected = min(1.0, max(0.0, 1.5 - share / 0.2))
        assert float(output.expert_weights[place, :3].sum()) == pytest.approx(expected, abs=1e-4)
        assert bool(output.is_ood[place]) == (expected < 0.5)
    rows = explain_rows(torch.zeros(40, 3), scores, scores, known, settings, ["a", "b", "c", "base"])
    for score, row in zip(scores.tolist(), rows, strict=True):
        assert row.tail_share is None
        assert row.is_ood == (score > row.threshold) or score == row.threshold


def test_nothing_depends_on_the_order_of_experts():
    router, order = fitted(), [2, 0, 1]
    other = SpectralRouter(3, 8)
    other.set_directions(router.directions[order])
    other.set_background(router.background_responses[order].T, router.background_share, router.background_kinds)
    hidden, mask = torch.randn(6, 7, 8), torch.ones(6, 7)
    ours, theirs = router.pool(hidden, mask), other.pool(hidden, mask)
    assert torch.equal(ours[:, order], theirs)
    assert torch.equal(router.scores(ours)[:, order], other.scores(theirs))
    assert torch.equal(router.ood_score(ours), other.ood_score(theirs))
    assert torch.equal(router.known.background_novelty, other.known.background_novelty)


def test_an_expert_that_goes_leaves_a_router_of_the_others():
    router = fitted()
    expected = SpectralRouter(2, 8)
    expected.set_directions(router.directions[[0, 2]])
    expected.set_background(router.background_responses[[0, 2]].T, router.background_share, router.background_kinds)
    router.remove_class(1)
    assert router.num_experts == 2
    assert router.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(router.state_dict()[key], value), key


def test_what_is_stored_is_checked():
    stored = {key: value.flatten() for key, value in fitted().state_dict().items()}
    loaded = SpectralRouter(3, 8)
    loaded.load_flat(stored)
    features = torch.randn(4, 3)
    assert torch.equal(loaded.scores(features), fitted().scores(features))
    damaged = {
        "directions": stored["directions"][1:],
        "background_responses": stored["background_responses"][:-3],
        "background_kinds": stored["background_kinds"][1:],
        "background_share": stored["background_share"][1:],
        "background_novelty": stored["background_novelty"][1:],
        "known_labels": torch.zeros(1),
        "temperature": torch.zeros(2),
        "something": torch.zeros(1),
    }
    for key, value in damaged.items():
        with pytest.raises(AdapterError):
            SpectralRouter(3, 8).load_flat({**stored, key: value})
    with pytest.raises(AdapterError, match="lacks"):
        SpectralRouter(3, 8).load_flat({key: value for key, value in stored.items() if key != "directions"})
    with pytest.raises(AdapterError):
        SpectralRouter(4, 8).load_flat(stored)
    with pytest.raises(UnsupportedError, match="made from deltas"):
        SpectralRouter(3, 8).fit(torch.zeros(3, 8), torch.arange(3))


def test_directions_are_the_singular_vectors_of_query_and_key_after_the_norm(made, checkpoints):
    model = made(router_layer=1)
    weights = {name: load_weights(path) for name, path in checkpoints.items()}
    scale = weights["base"]["model.layers.1.input_layernorm.weight"]
    for number, name in enumerate(TOPICS):
        layers = [f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"]
        delta = np.concatenate([(weights[name][layer] - weights["base"][layer]).numpy() for layer in layers])
        right = np.linalg.svd(delta)[2][:16]
        directions = (model.router.directions[number] / scale[:, None]).numpy()
        # The same subspace, in whatever basis: the last direction may change places with the next.
        common = np.linalg.svd(right @ directions)[1]
        assert common[:12].min() > 0.999
        assert np.allclose(directions.T @ directions, np.eye(16), atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "norm", "shift"), [("gemma", "layers.1.input_layernorm.weight", 1.0), ("gpt2", "h.1.ln_1.weight", 0.0)]
)
def test_the_scale_of_the_norm_is_found_in_other_architectures(arch, norm, shift, tokenizer, tmp_path):
    paths = write_tiny_checkpoints(tmp_path, arch=arch)
    config = MediatorConfig(density=1.0, encoding="float", routed_layers="all")
    build_mediator(paths["base"], {name: paths[name] for name in ("math", "code")}, tmp_path / "out", config)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    report = model.fit_router_from_deltas(tokenizer, background=BACKGROUND)
    scale = next(value for name, value in load_weights(tmp_path / "out").items() if name.endswith(norm)) + shift
    directions = (model.router.directions / scale[:, None]).transpose(1, 2)
    torch.testing.assert_close(directions @ directions.transpose(1, 2), torch.eye(16).expand(2, 16, 16))
    assert all(".1." in name for name in report.layers)
    assert len(report.layers) == (1 if arch == "gpt2" else 3)


def load_weights(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def routes(model, tokenizer, texts):
    return model.route(**tokenizer(texts, return_tensors="pt", padding=True))


def everything():
    return [text for name in TOPICS for text in texts_of(name)] + [
        text for some in BACKGROUND.values() for text in some
    ]


def test_prompts_go_to_the_expert_whose_delta_responds_and_others_to_the_base(made, tokenizer, tmp_path):
    model = made()
    for number, name in enumerate(TOPICS):
        assert routes(model, tokenizer, texts_of(name)).expert_weights[:, number].mean() > 0.9
    others = routes(model, tokenizer, ["w60 w70 w80", "w90 w58 w64 w73"])
    assert others.expert_weights[:, -1].min() > 0.9
    assert others.is_ood.all()
    known, unknown = model.explain([texts_of("law")[0], "w60 w70 w80"], tokenizer)
    assert known.reason.startswith("the delta of law responds more than to background prompts (")
    assert known.reason.endswith("→ law")
    assert unknown.reason.startswith("no delta responds much more than to background prompts (most: ")
    assert unknown.reason.endswith("→ base")
    # The same in the prompt's own pass, where nothing routed lies below.
    assert model.single_pass_routing
    inputs = tokenizer(texts_of("code")[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        routed, named = model(**inputs).logits, model(**inputs, expert_weights="code").logits
    torch.testing.assert_close(routed, named)
    # Saved and loaded, the routes are the same bits.
    model.save_pretrained(str(tmp_path / "saved"))
    loaded, _ = load_mediator(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["fitted_router"] == "spectral"
    ours, theirs = routes(model, tokenizer, everything()), routes(loaded, tokenizer, everything())
    assert torch.equal(ours.expert_weights, theirs.expert_weights)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), loaded.generate(**inputs, max_new_tokens=4))


def test_a_fit_on_texts_takes_its_place_and_the_reverse(made, tokenizer, tmp_path):
    model = made()
    before, state = routes(model, tokenizer, everything()).expert_weights, deepcopy(model.state_dict())
    model.fit_router({name: texts_of(name, 20) for name in TOPICS}, tokenizer, background=[])
    assert type(model.router) is GaussianRouter
    assert model.active.config.fitted_router is None
    after = routes(model, tokenizer, everything()).expert_weights
    model.save_pretrained(str(tmp_path / "saved"))
    assert "fitted_router" not in json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    loaded, _ = load_mediator(tmp_path / "saved")
    assert torch.equal(routes(loaded, tokenizer, everything()).expert_weights, after)
    # A state dict brings the kind of its router along, either way.
    loaded.load_state_dict(state)
    assert torch.equal(routes(loaded, tokenizer, everything()).expert_weights, before)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(routes(loaded, tokenizer, everything()).expert_weights, after)


def test_an_expert_is_added_by_its_delta_alone(made, checkpoints, tokenizer):
    model = made(("math", "law"), merge_method="base")
    with pytest.raises(RoutingError, match="give the tokenizer"):
        model.add_expert("code", str(checkpoints["code"]))
    with pytest.raises(RoutingError, match="takes no texts"):
        model.add_expert("code", str(checkpoints["code"]), texts_of("code"), tokenizer)
    model.add_expert("code", str(checkpoints["code"]), tokenizer=tokenizer)
    whole = made(("math", "law", "code"), "whole", merge_method="base")
    for key, value in whole.router.state_dict().items():
        assert torch.equal(model.router.state_dict()[key], value), key
    model.remove_expert("law")
    assert routes(model, tokenizer, texts_of("code")).expert_weights[:, 1].mean() > 0.9


def test_experts_that_cannot_be_told_apart_are_refused(build, tokenizer):
    settings = {"density": 1.0, "encoding": "float", "routed_layers": "all"}
    model = build(("math", "code"), fallback="backbone", **settings)
    with pytest.raises(UnsupportedError, match="'math' and 'code' have the same directions"):
        model.fit_router_from_deltas(tokenizer, background=BACKGROUND)
    model = build(("math", "code"), "other", **settings)
    report = model.fit_router_from_deltas(tokenizer, background=BACKGROUND)
    assert report.router_layer == 1
    assert report.num_background == 100
    assert [name.rpartition(".")[2] for name in report.layers] == ["q_proj", "k_proj", "v_proj"]


def test_too_little_background_and_a_depth_without_deltas_are_refused(build, tokenizer):
    model = build(routed_layers=[2], router_layer=1)
    with pytest.raises(UnsupportedError, match=r"blocks with deltas: \[2\]"):
        model.fit_router_from_deltas(tokenizer, background=BACKGROUND)
    for background in ([], None, ["w60 w61"] * 3):
        with pytest.raises(RoutingError, match="there are too few"):
            model.fit_router_from_deltas(tokenizer, background=background)
    assert not model.router.is_fitted
    with pytest.raises(ConfigError, match="Did you mean 'spectral'"):
        build(folder="none", fitted_router="spectrum")
