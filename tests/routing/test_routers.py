"""Every router keeps the contract; the closed forms agree with other libraries and with plain formulas."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.distributions import MultivariateNormal

from mediator_peft.errors import AdapterError, UnsupportedError
from mediator_peft.routing.metrics import auroc
from mediator_peft.routing.ood import Known
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.routers.gaussian import GaussianRouter, inverse_root, oas_shrinkage
from mediator_peft.routing.routers.moments import Moments
from mediator_peft.routing.uncertainty import free_energy, normalised_entropy, squared_mahalanobis


def blobs(num_classes=3, per_class=40, size=12, gap=3.0, seed=0, offset=0.0):
    """Classes with one covariance that is far from round, and means ``gap`` apart in it."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(size, size, generator=generator) / size**0.5
    means = gap * torch.randn(num_classes, size, generator=generator) / size**0.5 + offset
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), size, generator=generator) @ shape
    return means[labels] + noise, labels


def fitted(name, features, labels, seed=0):
    router = ROUTERS[name](int(labels.max()) + 1, features.shape[1], seed)
    router.fit(features, labels)
    return router


def known_rows(router, features, labels):
    none = torch.zeros(0)
    with torch.no_grad():
        return Known(router.background_log_odds(features), labels, router.distance(features), none, none)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_fitted_router_finds_the_class_of_new_rows(name):
    features, labels = blobs(gap=8.0, per_class=80)
    router = fitted(name, features[::2], labels[::2])
    with torch.no_grad():
        guess = router.scores(features[1::2]).argmax(dim=1)
    assert (guess == labels[1::2]).double().mean() > 0.95


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_far_from_everything_are_more_novel_than_known_ones(name):
    features, labels = blobs(gap=8.0)
    router = fitted(name, features, labels)
    far = -6 * features.mean(dim=0, keepdim=True)
    if name == "mlp":  # energy is unbounded along a class's own direction; it is judged between the classes
        far = features.mean(dim=0, keepdim=True)
    with torch.no_grad():
        assert router.background_log_odds(far).item() > router.background_log_odds(features).median()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_background_tells_a_kind_apart_that_distance_does_not(name):
    # Unknown rows lie no farther from class 0 than its own, but where ordinary rows are.
    features, labels = blobs(gap=8.0, per_class=80)
    other, _ = blobs(num_classes=1, per_class=60, gap=8.0, seed=9)
    router = ROUTERS[name](3, 12)
    router.fit(features[::2], labels[::2], background=other[::2])
    with torch.no_grad():
        scores, known, unknown = (
            router.scores(features),
            router.background_log_odds(features[1::2]),
            router.background_log_odds(other[1::2]),
        )
    assert scores.shape == (len(features), 3)
    assert auroc(known, unknown) > 0.95
    assert (scores.argmax(dim=1) == labels).double().mean() > 0.95


def test_background_log_odds_are_those_of_two_gaussians():
    features, labels = blobs()
    other, _ = blobs(num_classes=1, seed=9)
    router = GaussianRouter(3, 12)
    router.fit(features, labels, background=other)
    covariance = torch.linalg.inv((router.whitening @ router.whitening.T).double())
    best = router.scores(features).argmax(dim=1)
    nearest = router.scores(other).argmax(dim=1)
    groups = [other, *(other[nearest == expert] for expert in range(3))]
    means = [group.double().mean(dim=0) for group in groups if len(group) >= 5]
    ordinary = torch.stack([MultivariateNormal(mean, covariance).log_prob(features.double()) for mean in means])
    expert = MultivariateNormal(router.means.double()[best], covariance).log_prob(features.double())
    torch.testing.assert_close(
        router.background_log_odds(features).double(), ordinary.amax(0) - expert, rtol=1e-3, atol=1e-3
    )


def test_a_few_ordinary_prompts_near_an_expert_show_where_it_ends():
    features, labels = blobs(gap=8.0, per_class=80)
    far, _ = blobs(num_classes=1, per_class=60, gap=8.0, seed=9)
    # Beside the first expert, on the side that looks away from all others.
    away = features[labels == 0].mean(dim=0) - features.mean(dim=0)
    near = features[labels == 0][:40] + 0.7 * away
    ood_score = []
    for count in (0, 4, 10):
        router = GaussianRouter(3, 12)
        router.fit(features, labels, background=torch.cat([far, near[:count]]))
        assert (router.scores(near).argmax(dim=1) == 0).all()
        own = router.background_log_odds(features[labels == 0])
        ood_score.append(auroc(own, router.background_log_odds(near[20:])))
    assert ood_score[2] > 0.95 > ood_score[0]


def test_a_router_of_an_earlier_version_is_read():
    features, labels = blobs()
    other, _ = blobs(num_classes=1, seed=9)
    router = GaussianRouter(3, 12)
    router.fit(features, labels, background=other)
    router.set_known(known_rows(router, features, labels), 1.0)
    stored = {key: value.detach().flatten() for key, value in router.state_dict().items()}
    del stored["background_means"]
    loaded = GaussianRouter(3, 12)
    loaded.load_flat({**stored, "background_mean": router.background_means[-1]})
    assert torch.equal(loaded.background_means, router.background_means[-1:].repeat(10, 1))
    near = router.background_means[[0, 1, 2, -1]]
    loaded.load_flat({**stored, "background_means": near.flatten()})
    assert torch.equal(loaded.background_means, torch.cat([near[:3], near[3:].repeat(7, 1)]))
    assert torch.equal(loaded.background_log_odds(features), router.background_log_odds(features))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_seed_gives_the_same_router(name):
    features, labels = blobs()
    one, two = fitted(name, features, labels, seed=3), fitted(name, features, labels, seed=3)
    for key in one.shapes():
        assert torch.equal(getattr(one, key), getattr(two, key)), key


@pytest.mark.parametrize("name", ROUTERS)
def test_states_have_the_shapes_they_say_and_survive_the_file(name):
    features, labels = blobs()
    router = fitted(name, features, labels)
    router.set_known(known_rows(router, features, labels), 2.5)
    for key, shape in router.shapes().items():
        assert getattr(router, key).shape == shape
    stored = {key: value.detach().flatten() for key, value in router.state_dict().items()}
    loaded = ROUTERS[name](3, 12)
    loaded.load_flat(stored)
    assert torch.equal(loaded.calibrated(features), router.calibrated(features))
    assert torch.equal(loaded.background_log_odds(features), router.background_log_odds(features))
    assert float(loaded.temperature) == 2.5
    for fault in ("missing", "short", "labels"):
        bad = dict(stored)
        if fault == "missing":
            del bad["known_novelty"]
        elif fault == "short":
            bad[next(iter(router.shapes()))] = torch.zeros(3)
        else:
            bad["known_labels"] = stored["known_labels"] + 7
        with pytest.raises(AdapterError):
            ROUTERS[name](3, 12).load_flat(bad)


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_do_not_depend_on_their_batch(name):
    features, labels = blobs()
    router = fitted(name, features, labels)
    with torch.no_grad():
        torch.testing.assert_close(router.scores(features)[5:6], router.scores(features[5:6]))
        torch.testing.assert_close(router.background_log_odds(features)[5:6], router.background_log_odds(features[5:6]))


def test_gaussian_posteriors_are_those_of_scikit_learns_lda():
    features, labels = blobs(num_classes=4, size=20, gap=0.6)
    router = fitted("gaussian", features, labels)
    # Their pooled covariance weighs classes by prior; with equal class sizes and equal priors it is ours.
    pooled = sum(np.cov(features[labels == k].double().numpy().T, bias=True) for k in range(4)) / 4
    scale = np.sqrt(np.diag(pooled))
    share = oas_shrinkage(torch.tensor(pooled / np.outer(scale, scale)), len(labels) - 4)
    assert 0.01 < share < 0.99
    lda = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=max(0.5 * 5 * 20 / (len(labels) - 4), share), priors=[0.25] * 4
    )
    standard = features.double().numpy() / scale
    expected = lda.fit(standard, labels.numpy()).predict_proba(standard)
    with torch.no_grad():
        posterior = router.scores(features).double().softmax(dim=1)
    assert 0.2 < expected.max(axis=1).min() < 0.9, "posteriors are all certain, so nothing is compared"
    np.testing.assert_allclose(posterior.numpy(), expected, atol=1e-4)


def test_the_shrinkage_is_that_of_scikit_learns_oas():
    features = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)).double()
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred / 50
    assert oas_shrinkage(covariance, 50) == pytest.approx(OAS().fit(features.numpy()).shrinkage_, rel=1e-6)


def test_distances_are_those_of_the_plain_formula():
    features, labels = blobs(size=8)
    router = fitted("gaussian", features, labels)
    covariance = torch.linalg.inv((router.whitening @ router.whitening.T).double())
    expected = []
    for row in features[:10].double().tolist():
        squared = []
        for mean in router.means.double().tolist():
            difference = torch.tensor([a - b for a, b in zip(row, mean, strict=True)], dtype=torch.float64)
            squared.append(float(difference @ torch.linalg.solve(covariance, difference)))
        expected.append(min(squared))
    found = router.distance(features[:10]).double().exp()
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert squared_mahalanobis(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 2.0]])).tolist() == [
        [25.0, 4.0]
    ]


def test_a_large_common_offset_costs_no_digits():
    features, labels = blobs(seed=2)
    plain, shifted = fitted("gaussian", features, labels), fitted("gaussian", features + 500.0, labels)
    torch.testing.assert_close(
        shifted.background_log_odds(features + 500.0), plain.background_log_odds(features), rtol=5e-3, atol=5e-3
    )


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_moments_do_not_depend_on_batches(batch_size):
    features, labels = blobs(offset=50.0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    moments = Moments(3, 12)
    for rows in order.split(batch_size):
        moments.update(features[rows], labels[rows])
    expected = sum(np.cov(features[labels == k].double().numpy().T, bias=True) for k in range(3)) / 3
    np.testing.assert_allclose(moments.pooled_covariance().numpy(), expected, rtol=1e-9, atol=1e-12)
    streamed = GaussianRouter(3, 12)
    streamed.fit_batches((features[rows], labels[rows]) for rows in order.split(batch_size))
    torch.testing.assert_close(streamed.scores(features), fitted("gaussian", features, labels).scores(features))


def test_a_large_class_weighs_no_more_than_a_small_one():
    features, labels = blobs()
    more = torch.cat([features, features[labels == 0].repeat(9, 1)])
    more_labels = torch.cat([labels, torch.zeros(9 * 40, dtype=torch.long)])
    once, often = Moments(3, 12), Moments(3, 12)
    once.update(features, labels)
    often.update(more, more_labels)
    torch.testing.assert_close(often.pooled_covariance(), once.pooled_covariance())


def test_constant_features_and_a_single_row_do_no_harm():
    features, labels = blobs()
    features[:, 3] = 7.0
    router = fitted("gaussian", features, labels)
    assert torch.isfinite(router.background_log_odds(features)).all()
    assert torch.isfinite(inverse_root(torch.zeros(4, 4, dtype=torch.float64), 1)).all()


@pytest.mark.parametrize("name", ["gaussian", "prototype"])
def test_a_class_can_be_added_and_taken_out_again(name):
    features, labels = blobs(num_classes=4, gap=8.0)
    old = labels < 3
    router = fitted(name, features[old], labels[old])
    before = {key: getattr(router, key).clone() for key in router.shapes()}
    known = router.background_log_odds(features[old])
    router.add_class(features[~old])
    assert router.shapes() == {key: tuple(getattr(router, key).shape) for key in router.shapes()}
    for key, value in before.items():
        kept = getattr(router, key)[: len(value)]
        assert torch.equal(kept, value), key
    with torch.no_grad():
        guess = router.scores(features).argmax(dim=1)
    assert (guess == labels).double().mean() > 0.95
    assert (router.background_log_odds(features[old]) <= known + 1e-4).all()
    router.remove_class(3)
    for key, value in before.items():
        assert torch.equal(getattr(router, key), value), key
    router.remove_class(1)
    assert torch.equal(router.scores(features), _scores(before, name, features)[:, [0, 2]])


def _scores(state, name, features):
    router = ROUTERS[name](3, 12)
    for key, value in state.items():
        router._set(key, value)
    return router.scores(features)


def test_an_mlp_says_that_it_must_be_fitted_again():
    features, labels = blobs()
    router = fitted("mlp", features, labels)
    with pytest.raises(UnsupportedError, match="fit_router"):
        router.add_class(features)
    with pytest.raises(UnsupportedError, match="fit_router"):
        router.remove_class(0)


def test_an_mlp_is_balanced_and_keeps_its_best_epoch():
    features, labels = blobs(gap=8.0, per_class=60)
    rare = torch.cat([torch.arange(60), torch.arange(60, 120), torch.arange(120, 126)])
    router = fitted("mlp", features[rare], labels[rare])
    with torch.no_grad():
        guess = router.scores(features).argmax(dim=1)
    assert (guess[labels == 2] == 2).double().mean() > 0.9
    assert all(parameter.grad is None for parameter in router.parameters())


def test_energy_and_entropy_by_hand():
    scores = torch.tensor([[1.0, 2.0, 0.5], [-3.0, 0.0, 4.0]])
    by_hand = [-math.log(sum(math.exp(value) for value in row)) for row in scores.tolist()]
    torch.testing.assert_close(free_energy(scores), torch.tensor(by_hand))
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    by_hand = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)) / math.log(3), 0.0, 1.0]
    torch.testing.assert_close(normalised_entropy(probabilities), torch.tensor(by_hand))
    assert normalised_entropy(torch.ones(2, 1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("has_rule", [False, True])
def test_a_fitted_state_dict_loads_into_a_fresh_router(has_rule):
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    router = ROUTERS["gaussian"](2, 6)
    router.fit(features + labels.unsqueeze(1), labels, features[:10] - 2)
    router.set_known(Known(torch.randn(40), labels, torch.randn(40), torch.randn(10), torch.randn(10)))
    if has_rule:
        for name, shape in {"detector_weight": (2, 6), "detector_bias": (2,), "combination": (3,)}.items():
            router.register_buffer(name, torch.randn(shape))
        router.register_buffer("background_share", torch.rand(10))
    fresh = ROUTERS["gaussian"](2, 6)
    fresh.load_state_dict(router.state_dict())
    assert fresh.is_fitted
    for name, tensor in router.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=0, atol=0)
