"""Calibration and detection scores, against numbers worked out by hand and scikit-learn."""

import pytest
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from mediator_peft.routing.metrics import (
    auroc,
    brier_score,
    expected_calibration_error,
    false_positive_rate,
    fit_temperature,
    reliability_bins,
)


def test_calibration_error_by_hand():
    # Two bins of ten are filled: (0.6, 0.7] with confidences .65, .65, one of them right; (0.9, 1] with .95, right.
    probabilities = torch.tensor([[0.65, 0.35], [0.35, 0.65], [0.95, 0.05]])
    labels = torch.tensor([0, 0, 0])
    expected = (2 * abs(0.5 - 0.65) + 1 * abs(1.0 - 0.95)) / 3
    assert expected_calibration_error(probabilities, labels, num_bins=10) == pytest.approx(expected, abs=1e-6)
    bins = reliability_bins(probabilities, labels, num_bins=10)
    assert bins.counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 1]
    assert bins.accuracy[6] == 0.5


def test_a_certain_router_that_is_always_right_has_no_error():
    probabilities = torch.eye(3)
    assert expected_calibration_error(probabilities, torch.arange(3)) == 0
    assert brier_score(probabilities, torch.arange(3)) == 0
    assert brier_score(probabilities, torch.tensor([1, 2, 0])) == 2


def test_brier_score_is_scikit_learns_for_two_classes():
    probabilities = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)).double()
    labels = (torch.arange(50) % 3 == 0).long()
    both = torch.cat([1 - probabilities, probabilities], dim=1)
    # Theirs counts one of two classes, ours both.
    expected = 2 * brier_score_loss(labels.numpy(), probabilities.flatten().numpy())
    assert brier_score(both, labels) == pytest.approx(expected)


def test_auroc_is_scikit_learns_with_ties():
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randint(0, 8, (60,), generator=generator), torch.randint(3, 12, (40,), generator=generator)
    truth = [0] * 60 + [1] * 40
    assert auroc(known, unknown) == pytest.approx(roc_auc_score(truth, torch.cat([known, unknown]).numpy()))
    assert auroc(torch.zeros(3), torch.ones(2)) == 1.0
    assert auroc(torch.ones(3), torch.ones(2)) == 0.5


def test_false_positive_rate_is_read_off_the_curve():
    generator = torch.Generator().manual_seed(1)
    known, unknown = torch.randn(200, generator=generator), torch.randn(100, generator=generator) + 1.5
    rates, recalls, _ = roc_curve([0] * 200 + [1] * 100, torch.cat([known, unknown]).numpy(), drop_intermediate=False)
    expected = min(rate for rate, recall in zip(rates, recalls, strict=True) if recall >= 0.95)
    assert false_positive_rate(known, unknown) == pytest.approx(expected)


def test_temperature_undoes_a_scaling_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    assert fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.1)
    assert fit_temperature(logits * 25, labels) == pytest.approx(25.0, rel=0.1)
    assert fit_temperature(logits / 10, labels) == pytest.approx(0.1, rel=0.1)


def test_temperature_is_finite_where_all_held_out_prompts_are_right():
    labels = torch.arange(3).repeat(30)
    scores = 1000.0 * torch.nn.functional.one_hot(labels, 3).float()
    temperature = fit_temperature(scores, labels)
    certainty = (scores / temperature).softmax(dim=1).max()
    assert certainty == pytest.approx(31 / 32, abs=1e-3)
    assert fit_temperature(torch.randn(5, 1), torch.zeros(5)) == 1.0


def test_many_experts_of_few_prompts_are_not_mixed_where_each_prompt_is_clear():
    labels = torch.arange(50).repeat(25)
    scores = 1000.0 * torch.nn.functional.one_hot(labels, 50).float()
    certainty = (scores / fit_temperature(scores, labels)).softmax(dim=1).max(dim=1).values
    torch.testing.assert_close(certainty.float(), torch.full((1250,), 26 / 27), atol=1e-3, rtol=0)
