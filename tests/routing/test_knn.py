"""Nearest neighbours: shapes that one Gaussian misses, ties, few texts, and what the file holds."""

import pytest
import torch

from mediator_peft.errors import AdapterError
from mediator_peft.routing.ood import Known
from mediator_peft.routing.routers import ROUTERS


def around_two_centres(seed=0, count=60):
    """Expert 0 in two groups on either side of expert 1: a mean of its own says nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[8.0, 0, 0, 1.0], [-8.0, 0, 0, 1.0], [0, 0.5, 0, 8.0]])
    place = torch.arange(count * 3) % 3
    labels = (place == 2).long()
    return centres[place] + torch.randn(len(place), 4, generator=generator), labels


def fitted(features, labels, **options):
    router = ROUTERS["knn"](int(labels.max()) + 1, features.shape[1])
    router.fit(features, labels, **options)
    return router


def test_it_separates_experts_of_several_kinds_that_one_gaussian_does_not():
    def crossed(seed):
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.tensor([[6.0, 0, 0], [-6.0, 0, 0], [0, 6.0, 0], [0, -6.0, 0]])
        place = torch.arange(240) % 4
        return kinds[place] + torch.randn(240, 3, generator=generator), place // 2

    features, labels = crossed(0)
    new, truth = crossed(1)
    gaussian = ROUTERS["gaussian"](2, 3)
    gaussian.fit(features, labels)
    right = [float((r.scores(new).argmax(1) == truth).float().mean()) for r in (fitted(features, labels), gaussian)]
    assert right[0] > 0.98
    assert right[1] < 0.7


def test_scores_are_votes_and_an_expert_without_neighbours_has_a_floor():
    features, labels = around_two_centres()
    router = fitted(features, labels)
    shares = router.scores(features).exp() - 1 / len(features)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(features)), atol=1e-4, rtol=0)
    assert float(router.scores(features).min()) == pytest.approx(-torch.tensor(180.0).log().item(), abs=1e-4)


def test_the_order_of_experts_and_texts_changes_nothing():
    features, labels = around_two_centres()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    one, other = fitted(features, labels), fitted(features[order], 1 - labels[order])
    torch.testing.assert_close(one.scores(features), other.scores(features).flip(1), atol=1e-4, rtol=1e-4)


def test_few_texts_have_one_neighbour():
    features = torch.eye(3)
    router = fitted(features, torch.tensor([0, 1, 1]))
    assert router.num_neighbours == 1
    assert router.scores(features).argmax(dim=1).tolist() == [0, 1, 1]


def test_an_added_expert_is_as_if_it_had_been_there_and_a_removed_one_as_if_never():
    features, labels = around_two_centres()
    router = fitted(features, labels)
    before = router.scores(features)
    router.add_class(torch.tensor([[0.0, 9.0, 0.0, -3.0]]).repeat(60, 1))
    assert router.scores(torch.tensor([[0.0, 9.0, 0.0, -3.0]])).argmax() == 2
    router.remove_class(2)
    torch.testing.assert_close(router.scores(features), before)


def test_a_file_decides_how_many_texts_there_are():
    features, labels = around_two_centres()
    router = fitted(features, labels, background=torch.randn(30, 4))
    none = torch.zeros(0)
    router.set_known(Known(router.background_log_odds(features), labels, router.distance(features), none, none))
    stored = {name: value.flatten() for name, value in router.state_dict().items()}
    loaded = fitted(features[:30], labels[:30])
    loaded.load_flat(stored)
    torch.testing.assert_close(loaded.background_log_odds(features), router.background_log_odds(features))
    with pytest.raises(AdapterError, match="do not fit together"):
        ROUTERS["knn"](2, 4).load_flat({**stored, "reference_labels": stored["reference_labels"][1:]})
