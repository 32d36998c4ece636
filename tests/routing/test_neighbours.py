"""Closeness to an expert's texts and to background prompts: by hand, in a rule, saved, and with experts added."""

import math

import torch

from mediator_peft.routing.background import background_families, kind_numbers
from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.decision_rule import Negatives
from mediator_peft.routing.neighbours import fit_neighbours
from mediator_peft.routing.routers import ROUTERS


def some(count, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_closeness_is_the_difference_of_the_largest_cosines():
    features, labels, background, rows = some(9), torch.arange(9) % 2, some(30, seed=1), some(4, seed=2)
    found = fit_neighbours(features, labels, background, torch.eye(6)).closeness(rows, torch.tensor([0, 1, 0, 1]))
    centre = background.mean(dim=0).tolist()

    def cosine(one, other):
        u, v = ([a - c for a, c in zip(x.tolist(), centre, strict=True)] for x in (one, other))
        length = math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))
        return sum(a * b for a, b in zip(u, v, strict=True)) / length

    for number, row in enumerate(rows):
        own = max(cosine(row, text) for text in features[labels == number % 2])
        other = max(cosine(row, prompt) for prompt in background)
        assert math.isclose(float(found[number]), own - other, abs_tol=1e-4)


def test_no_turn_of_the_axes_changes_it():
    features, labels, background, rows = some(9), torch.arange(9) % 2, some(30, seed=1), some(4, seed=2)
    turn = torch.linalg.qr(some(6, seed=3)).Q
    nearest = torch.tensor([0, 1, 0, 1])
    plain = fit_neighbours(features, labels, background, torch.eye(6)).closeness(rows, nearest)
    turned = fit_neighbours(features @ turn, labels, background @ turn, torch.eye(6)).closeness(rows @ turn, nearest)
    torch.testing.assert_close(plain, turned, rtol=1e-3, atol=1e-4)


def test_fewer_prompts_than_features_span_a_smaller_space():
    features, labels, background = some(9, size=20), torch.arange(9) % 2, some(7, size=20, seed=1)
    found = fit_neighbours(features, labels, background, torch.eye(20))
    assert found.projection.shape == (20, 6)
    torch.testing.assert_close(found.projection.T @ found.projection, torch.eye(6), rtol=1e-4, atol=1e-5)
    centred = background - background.mean(dim=0)
    torch.testing.assert_close(centred @ found.projection @ found.projection.T, centred, rtol=1e-3, atol=1e-4)


def test_an_expert_is_added_and_removed_again():
    features, labels, background, rows = some(9), torch.arange(9) % 2, some(30, seed=1), some(4, seed=2)
    two = fit_neighbours(features, labels, background, torch.eye(6))
    three = two.with_expert(some(5, seed=4), 2)
    own = three.closeness(some(5, seed=4), torch.full((5,), 2))
    assert (own > 0).all()
    back = three.without_expert(2)
    assert torch.equal(
        back.closeness(rows, torch.tensor([0, 1, 0, 1])), two.closeness(rows, torch.tensor([0, 1, 0, 1]))
    )
    moved = three.without_expert(0)
    assert torch.equal(moved.closeness(rows, torch.ones(4).long()), three.closeness(rows, torch.full((4,), 2)))


def test_a_rule_with_neighbours_is_saved_with_its_router():
    generator = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(6, 12, generator=generator)
    labels, families = torch.arange(60) % 2, torch.arange(80) % 4
    features = centres[labels] + torch.randn(60, 12, generator=generator)
    others = centres[2 + families] + torch.randn(80, 12, generator=generator)
    negatives = Negatives(others, families, torch.ones(80, dtype=torch.bool), torch.eye(12), families // 2)
    router = ROUTERS["gaussian"](2, 12)
    calibrate(
        lambda: ROUTERS["gaussian"](2, 12), router, features, labels, [str(n) for n in range(60)], ["a", "b"], 0, 0.02,
        negatives=negatives, family_names=list("uvwx"),
    )  # fmt: skip
    assert router.rule.neighbours is not None
    assert router.combination.shape == (4,)
    assert router.ood_score(others).median() > router.ood_score(features).median()
    stored = {name: value.flatten() for name, value in router.state_dict().items()}
    loaded = ROUTERS["gaussian"](2, 12)
    loaded.load_flat(stored)
    rows = torch.randn(7, 12, generator=generator)
    torch.testing.assert_close(loaded.ood_score(rows), router.ood_score(rows))
    again = ROUTERS["gaussian"](2, 12)
    again.load_state_dict(router.state_dict())
    torch.testing.assert_close(again.ood_score(rows), router.ood_score(rows))
    # A rule of an earlier version has no neighbours and three weights.
    old = {name: value for name, value in stored.items() if not name.startswith("neighbour_")}
    earlier = ROUTERS["gaussian"](2, 12)
    earlier.load_flat({**old, "combination": old["combination"][[0, 1, 3]]})
    assert earlier.rule.neighbours is None
    assert earlier.ood_score(rows).shape == (7,)


def test_families_of_a_kind_are_left_out_together():
    families = list(background_families(0))
    kinds = dict(zip(families, kind_numbers(families), strict=True))
    assert kinds["germanic"] == kinds["requests in German"] == kinds["nordic and baltic"]
    assert kinds["code"] == kinds["programming help"] != kinds["germanic"]
    assert kinds["very short"] not in [kind for name, kind in kinds.items() if name != "very short"]
