"""The learned decision: detectors, their combination with the distance, the two rates, and what is saved of them."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mediator_peft.errors import AdapterError, RoutingError
from mediator_peft.routing.background import background_families, numbers_alone, random_token_rows, user_families
from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.decision_rule import (
    Negatives,
    equal_weights,
    family_numbers,
    fit_combination,
    fit_detectors,
    fit_logistic,
)
from mediator_peft.routing.depth import choose_depth
from mediator_peft.routing.gate import GateSettings, gate
from mediator_peft.routing.ood import Known, gate_coefficients, unknown_share
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.rule_fitting import leave_out
from mediator_peft.tuner.fitting_rows import RANDOM_TOKENS, background_rows


def drawn(seed=0, size=60, num_features=12, num_families=6):
    """Three experts and families of negatives around other centres."""
    generator = torch.Generator().manual_seed(seed)

    def around(centres, count):
        labels = torch.arange(count) % len(centres)
        return centres[labels] + torch.randn(count, num_features, generator=generator), labels

    experts = 8 * torch.randn(3, num_features, generator=generator)
    others = 8 * torch.randn(num_families, num_features, generator=generator)
    features, labels = around(experts, 3 * size)
    rows, families = around(others, 20 * num_families)
    return features, labels, Negatives(rows, families, torch.ones(len(rows), dtype=torch.bool))


def fitted(name="gaussian", seed=0, **options):
    features, labels, negatives = drawn(seed)
    router = ROUTERS[name](3, features.shape[1])
    keys = [str(number) for number in range(len(labels))]
    report = calibrate(
        lambda: ROUTERS[name](3, features.shape[1]),
        router,
        features,
        labels,
        keys,
        ["a", "b", "c"],
        0,
        0.02,
        negatives=negatives,
        family_names=[f"family {number}" for number in range(6)],
        **options,
    )
    return router, report, features, labels, negatives


def test_logistic_regression_is_that_of_another_library():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2
    targets = (rows[:, 0] - 0.2 * rows[:, 1] + torch.randn(200, generator=generator) > 0).float()
    weights = torch.rand(200, generator=generator)
    weights = weights / weights.sum()
    weight, bias = fit_logistic(rows, targets, weights, ridge=0.05)
    mean = (weights.unsqueeze(1) * rows).sum(dim=0)
    scale = (weights.unsqueeze(1) * (rows - mean).square()).sum(dim=0).sqrt()
    other = LogisticRegression(C=1 / 0.05, tol=1e-10, max_iter=10000)
    other.fit(((rows - mean) / scale).numpy(), targets.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close(weight * scale, torch.tensor(other.coef_[0]).float(), atol=1e-3, rtol=1e-3)
    logits = rows @ weight + bias
    expected = torch.tensor(other.decision_function(((rows - mean) / scale).numpy())).float()
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_a_feature_that_never_varied_says_nothing():
    rows = torch.randn(40, 3)
    rows[:, 1] = 7.0
    weight, _ = fit_logistic(rows, torch.arange(40) % 2, torch.full((40,), 1 / 40), 0.01)
    assert weight[1] == 0


def test_every_family_weighs_the_same():
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(equal_weights(groups), torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]))
    assert family_numbers(["b", "a", "b"]).tolist() == [1, 0, 1]


def test_an_experts_detector_does_not_depend_on_the_other_experts():
    features, labels, negatives = drawn()
    weight, bias = fit_detectors(features, labels, negatives, 3)
    alone, alone_bias = fit_detectors(features[labels == 1], torch.zeros(60, dtype=torch.long), negatives, 1)
    assert torch.equal(weight[1], alone[0])
    assert torch.equal(bias[1], alone_bias[0])


def test_a_statistic_that_counts_against_what_it_says_is_dropped():
    known, unknown = torch.tensor([[3.0, -1.0]] * 20), torch.tensor([[-3.0, 1.0]] * 20)
    spread = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(20, dtype=torch.long)
    combination = fit_combination(known + spread, labels, unknown + spread, labels)
    assert combination[0] > 0
    assert combination[1] == 0


def test_a_family_is_judged_by_rules_that_never_saw_it():
    features, labels, negatives = drawn()
    negatives = negatives._replace(features=negatives.features.clone())
    negatives.features[:, 0] = negatives.families.float() + 1000
    seen = []

    class Spy(ROUTERS["gaussian"]):
        def fit(self, features, labels, background=None, hard_negatives=None):
            self.families = set(background[:, 0].tolist())
            super().fit(features, labels, background, hard_negatives)

        def scores(self, features):
            if (features[:, 0] > 500).any() and len(features) != len(negatives.features):
                seen.append(self.families & set(features[:, 0].tolist()))
            return super().scores(features)

    make = lambda: Spy(3, features.shape[1])  # noqa: E731
    folds = torch.arange(len(labels)) % 4
    left_out = leave_out(make, features, labels, folds, negatives, None)
    # The gaussian router looks at its own background while it is fitted; what it judges afterwards it has not seen.
    assert seen
    assert set() in [set(one) for one in seen]
    assert left_out.negative_statistics.shape == (120, 2)
    assert left_out.statistics.shape == (180, 2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "mlp" else name for name in ROUTERS]
)
def test_unknown_families_go_to_the_base_and_known_prompts_to_their_expert(name):
    router, report, *_ = fitted(name)
    generator = torch.Generator().manual_seed(5)
    features, labels, _ = drawn(0, size=50)
    far = 8 * torch.randn(200, features.shape[1], generator=generator)
    settings = GateSettings(0.02, 0.5, True)

    def routed(rows):
        scores = router.calibrated(rows)
        return gate(scores, router.ood_score(rows), router.distance(rows), router.known, settings).expert_weights

    known = routed(features).gather(1, labels.unsqueeze(1)).mean()
    assert known > 0.95
    assert routed(far)[:, -1].mean() > 0.85
    assert set(report.base_weight_by_family) == {f"family {number}" for number in range(6)}
    assert report.known_to_fallback <= 0.04


def test_the_rate_of_unknown_prompts_is_the_stated_one():
    generator = torch.Generator().manual_seed(0)
    unknown = torch.randn(400, generator=generator)
    families = torch.arange(400) % 4
    known = Known(
        torch.full((50,), -9.0), torch.zeros(50, dtype=torch.long), torch.zeros(50), unknown, torch.zeros(400),
        equal_weights(families),
    )  # fmt: skip
    for beta in (0.02, 0.05, 0.2):
        found = gate_coefficients(unknown, torch.zeros(400), torch.zeros(400, dtype=torch.long), known, 1e-6, beta)
        assert float(found.gate_coefficient.mean()) == pytest.approx(beta, abs=0.004)
    assert unknown_share(torch.tensor([-100.0, 100.0]), known).tolist() == pytest.approx([0.0, 1.0])


def test_known_prompts_go_first_where_both_rates_cannot_be_held():
    values = torch.linspace(0, 1, 100)
    known = Known(
        values, torch.zeros(100, dtype=torch.long), torch.zeros(100), values, torch.zeros(100), torch.full((100,), 0.01)
    )
    found = gate_coefficients(values, torch.zeros(100), torch.zeros(100, dtype=torch.long), known, 0.05, 0.05)
    assert float(found.gate_coefficient.mean()) > 0.9


def test_hard_negatives_train_and_do_not_set_the_rate():
    features, labels, negatives = drawn()
    hard = negatives._replace(is_background=negatives.families != 0)
    router = ROUTERS["gaussian"](3, features.shape[1])
    keys = [str(number) for number in range(len(labels))]
    calibrate(
        lambda: ROUTERS["gaussian"](3, features.shape[1]), router, features, labels, keys, "abc", 0, 0.02,
        negatives=hard, family_names=list("uvwxyz"),
    )  # fmt: skip
    assert len(router.background_novelty) == 100
    score = router.ood_score(negatives.features[negatives.families == 0])
    assert float(score.median()) > 0


def test_a_rule_is_saved_and_routers_without_one_load():
    router, *_ = fitted()
    stored = {name: value.flatten() for name, value in router.state_dict().items()}
    loaded = ROUTERS["gaussian"](3, 12)
    loaded.load_flat(stored)
    rows = torch.randn(7, 12)
    torch.testing.assert_close(loaded.ood_score(rows), router.ood_score(rows))
    assert loaded.known.background_share is not None
    old = {name: value for name, value in stored.items() if not name.startswith(("detector", "combination"))}
    old.pop("background_share")
    earlier = ROUTERS["gaussian"](3, 12)
    earlier.load_flat(old)
    assert earlier.rule is None
    torch.testing.assert_close(earlier.ood_score(rows), earlier.background_log_odds(rows))
    with pytest.raises(AdapterError):
        ROUTERS["gaussian"](3, 12).load_flat({**stored, "combination": torch.zeros(2)})


def test_the_depth_that_tells_families_apart_is_chosen():
    features, labels, negatives = drawn()
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    blurred = negatives._replace(features=torch.randn(negatives.features.shape))
    keys = [str(number) for number in range(len(labels))]
    make = lambda: ROUTERS["gaussian"](3, features.shape[1])  # noqa: E731
    good, bad = (features, None, negatives), (noise, None, blurred)
    assert choose_depth([bad, good, bad], make, labels, keys) == 1
    assert choose_depth([good, bad], make, labels, keys) == 0
    assert choose_depth([(features, None, None)] * 3, make, labels, keys) == 2


def test_background_families_follow_from_the_seed_and_cover_much():
    families = background_families(3)
    assert families == background_families(3)
    assert families != background_families(4)
    assert len(families) >= 20
    assert all(prompt.strip() for prompts in families.values() for prompt in prompts)
    assert all(len(prompts) >= 8 for prompts in families.values())
    assert random_token_rows([5, 6], 0, 4) == random_token_rows([5, 6], 0, 4)


def test_digits_without_a_request_follow_from_the_seed():
    assert numbers_alone(3) == numbers_alone(3) != numbers_alone(4)
    assert len(numbers_alone(3)) > 12
    assert not any(letter.isalpha() for text in numbers_alone(3, 100) for letter in text)


class WordTokenizer:
    """A token a word; its number is its hash."""

    all_special_ids = (0,)
    unk_token_id = None

    def __len__(self):
        return 1000

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[1 + hash(word) % 999 for word in text.split()][:max_length] for text in texts]}


def test_fewer_tokens_of_long_background_prompts_are_read_and_all_of_a_users():
    own = {"mine": ["word " * 40] * 20, "news": ["long " * 30] * 15}
    whole = background_rows(0, WordTokenizer(), own, 512)
    reduced = background_rows(0, WordTokenizer(), own, 512, is_reduced=True)
    assert list(reduced) == list(whole)
    for name in own:
        assert reduced[name] == whole[name]
        assert len(reduced[name]) == len(own[name])
    library = set(whole) - set(own) - {RANDOM_TOKENS}
    assert any(len(row) > 24 for name in library for row in whole[name])
    cut = {name: [row[:24] for row in whole[name]] for name in library}
    fewer = {name for name in library if sum(map(len, cut[name])) > 14 * len(cut[name])}
    assert fewer
    assert library - fewer
    for name in library:
        assert reduced[name] == (cut[name][:12] if name in fewer else cut[name])
    assert all(len(row) <= 9 for row in background_rows(0, WordTokenizer(), None, 9, is_reduced=True)["news"])


def test_a_user_adds_families_prompts_or_files(tmp_path):
    assert user_families({"mine": ["a", "b"]}) == {"mine": ["a", "b"]}
    split = user_families([f"prompt {number}" for number in range(50)])
    assert sorted(prompt for prompts in split.values() for prompt in prompts) == sorted(
        f"prompt {number}" for number in range(50)
    )
    assert len(split) == 5
    (tmp_path / "some.txt").write_text("one\n\ntwo\n")
    assert sum(map(len, user_families(tmp_path / "some.txt").values())) == 2
    (tmp_path / "some.jsonl").write_text('{"prompt": "x", "family": "f"}\n"y"\n')
    assert user_families(str(tmp_path / "some.jsonl")) == {"f": ["x"], "without a family": ["y"]}
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(RoutingError, match="line 1"):
        user_families(tmp_path / "bad.jsonl")
    with pytest.raises(RoutingError, match="no such file"):
        user_families(tmp_path / "none.txt")
