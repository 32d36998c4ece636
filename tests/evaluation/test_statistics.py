"""Bootstrap intervals and paired tests, against scipy and by their properties."""

import numpy as np
import pytest
from scipy import stats

from mediator_peft.evaluation.statistics import (
    StatisticsError,
    bootstrap_kept,
    bootstrap_mean,
    permutation_test,
    sign_test,
)


def right(num_right, num_items):
    return np.arange(num_items) < num_right


def test_the_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap_mean(rng.random(80) < 0.3, seed=seed, resamples=400) for seed in range(200)]
    assert 0.89 <= np.mean([low <= 0.3 <= high for _, low, high in found]) <= 0.99


def test_figures_follow_from_the_seed():
    values = np.random.default_rng(0).random(30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


@pytest.mark.parametrize(("more", "less"), [(0, 0), (1, 0), (5, 1), (9, 9), (30, 12)])
def test_the_sign_test_is_the_exact_binomial_test(more, less):
    first = np.array([1] * more + [0] * less + [1, 0, 1])
    second = np.array([0] * more + [1] * less + [1, 0, 1])
    expected = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert sign_test(first, second) == pytest.approx(expected)
    assert sign_test(second, first) == pytest.approx(expected)


@pytest.mark.parametrize("num_items", [8, 60])
def test_the_permutation_test_agrees_with_scipy(num_items):
    rng = np.random.default_rng(2)
    first, second = rng.normal(0.25, 1, num_items), rng.normal(0, 1, num_items)
    differences = (first - second,)
    expected = stats.permutation_test(
        differences, lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=9999, rng=0
    ).pvalue
    assert permutation_test(first, second) == pytest.approx(expected, abs=0.015)
    assert permutation_test(first, second) == pytest.approx(permutation_test(second, first), abs=0.02)


def test_equal_systems_do_not_differ():
    values = np.random.default_rng(0).random(20)
    assert permutation_test(values, values) == sign_test(values, values) == 1.0


def test_a_system_equal_to_its_references_keeps_all_with_certainty():
    answers = {"a": right(7, 20), "b": right(3, 10)}
    kept = bootstrap_kept(answers, answers)
    assert kept.mean == kept.worst == (1.0, 1.0, 1.0)


def test_kept_shares_are_ratios_of_accuracies():
    reference = {"a": right(80, 100), "b": right(40, 100)}
    system = {"a": right(40, 100), "b": right(40, 100), "other": right(0, 100)}
    kept = bootstrap_kept(system, reference)
    assert kept.mean.value == pytest.approx(80 / 120)
    assert (kept.worst.value, kept.worst_task) == (0.5, "a")
    assert kept.by_task["b"].value == 1.0
    assert kept.mean.low < 80 / 120 < kept.mean.high


def test_pairing_makes_the_interval_narrower_than_independent_items():
    rng = np.random.default_rng(0)
    reference = {"a": rng.random(200) < 0.5}
    same, other = {"a": reference["a"].copy()}, {"a": rng.permutation(reference["a"])}
    same["a"][:4] = False
    other["a"][:4] = False
    width = {
        name: np.ptp(bootstrap_kept(some, reference).mean.interval) for name, some in {"s": same, "o": other}.items()
    }
    assert width["s"] < width["o"] / 3


def test_a_reference_with_nothing_right_gives_no_share():
    assert bootstrap_kept({"a": right(1, 4)}, {"a": right(0, 4)}) is None
    assert bootstrap_kept({"a": right(1, 4)}, {"b": right(1, 4)}) is None


def test_different_numbers_of_items_are_refused():
    with pytest.raises(StatisticsError, match="answered 4 and 5 items of 'a'"):
        bootstrap_kept({"a": right(1, 4)}, {"a": right(1, 5)})
    with pytest.raises(StatisticsError, match="one value"):
        bootstrap_mean([])
