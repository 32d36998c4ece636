"""The gate's formulas, worked out by hand, and its stated rates."""

import math

import pytest
import torch

from mediator_peft.routing.explain import explain_rows
from mediator_peft.routing.gate import GateSettings, gate, smallest_sufficient_set
from mediator_peft.routing.ood import Known, fit_tail, gate_coefficients, ood_threshold, tail_share, threshold

NONE = torch.zeros(0)


def known_of(*classes, background=NONE, excess=NONE):
    values = torch.cat(classes)
    labels = torch.cat([torch.full((len(one),), number) for number, one in enumerate(classes)])
    return Known(values, labels, values, background, excess)


def test_top_p_keeps_the_fewest_experts():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.95, 0.03, 0.02], [0.25, 0.25, 0.5]])
    found = smallest_sufficient_set(probabilities, 0.7)
    torch.testing.assert_close(found[0], torch.tensor([0.625, 0.375, 0.0]))
    assert found[1].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(found[2], torch.tensor([1 / 3, 0.0, 2 / 3]))
    torch.testing.assert_close(smallest_sufficient_set(probabilities, 1.0), probabilities)


def test_a_tail_is_the_mean_excess_by_hand():
    values = torch.arange(1.0, 26.0)  # the largest fifth: 21 to 25, above 20
    tail = fit_tail(values, torch.zeros(25), 1)
    assert tail.start.item() == 20.0
    assert tail.scale.item() == pytest.approx(3.0)
    assert tail.share.item() == pytest.approx(5.5 / 26)
    share = tail_share(torch.tensor([26.0]), torch.tensor([0]), tail).item()
    assert share == pytest.approx(5.5 / 26 * math.exp(-2.0))
    limit = threshold(tail, 0.01)
    assert tail_share(limit, torch.tensor([0]), tail).item() == pytest.approx(0.01)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
@pytest.mark.parametrize("distribution", [torch.distributions.Normal(5.0, 2.0), torch.distributions.Exponential(0.3)])
def test_the_stated_rate_is_kept_on_new_prompts(alpha, distribution):
    torch.manual_seed(0)
    rates = []
    for _ in range(40):
        known = known_of(distribution.sample((100,)), 100 + 50 * distribution.sample((100,)))
        new = distribution.sample((500,))
        rates.append(
            gate_coefficients(new, new, torch.zeros(500, dtype=torch.long), known, alpha).is_ood.double().mean()
        )
    assert 0.5 * alpha < torch.stack(rates).mean() < 1.5 * alpha


def test_each_expert_has_its_own_yardstick():
    known = known_of(torch.linspace(0, 1, 50), torch.linspace(0, 100, 50))
    ood_score = torch.tensor([10.0, 10.0])
    found = gate_coefficients(ood_score, ood_score, torch.tensor([0, 1]), known, 0.01)
    assert found.is_ood.tolist() == [True, False]
    assert found.gate_coefficient[0] < 1e-3
    assert found.gate_coefficient[1] == 1


def test_new_prompts_that_are_unlike_ordinary_ones_are_trusted():
    background = torch.linspace(10, 20, 101)
    known = known_of(torch.linspace(-20, -10, 50), background=background, excess=torch.linspace(0, 5, 101))
    ood_score = torch.tensor([-15.0, 0.0, 11.4, 12.05, 12.6, 15.0])
    near = torch.full((6,), -15.0)
    found = gate_coefficients(ood_score, near, torch.zeros(6, dtype=torch.long), known, 0.01)
    # 21 of the 101 background prompts are at most as novel as 12.05: about half the way from 0.15 to 0.25.
    expected = torch.tensor([1.0, 1.0, 1.0, (0.25 - 21 / 101) / 0.1, 0.0, 0.0])
    torch.testing.assert_close(found.gate_coefficient, expected)
    assert found.is_ood.tolist() == [False, True, True, True, True, True]
    # What is farther off than every background prompt is not trusted, however un-ordinary it is.
    far = torch.full((6,), 1000.0)
    found = gate_coefficients(ood_score, far, torch.zeros(6, dtype=torch.long), known, 0.01)
    assert found.gate_coefficient.tolist() == [0.0] * 6
    assert found.is_ood.all()


def test_weights_are_trust_times_selection_and_the_rest_is_the_fallback():
    known = known_of(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
    scores = torch.tensor([[8.0, 0.0], [1.0, 1.0], [0.0, 9.0]])
    ood_score = torch.tensor([0.5, 0.5, 50.0])
    found = gate(scores, ood_score, ood_score, known, GateSettings(0.01, 0.9, True))
    torch.testing.assert_close(found.expert_weights, torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1.0]]))
    torch.testing.assert_close(found.uncertainty, torch.tensor([0.0, 1.0, 1.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(found.scores.exp().sum(dim=1), torch.ones(3))
    without = gate(scores, ood_score, ood_score, known, GateSettings(0.01, 0.9, False))
    torch.testing.assert_close(without.expert_weights, found.expert_weights[:, :2])


def test_an_explanation_says_what_the_gate_did():
    known = known_of(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
    scores = torch.tensor([[0.0, 2.0], [9.0, 0.0]])
    ood_score = torch.tensor([0.3, 30.0])
    settings = GateSettings(0.01, 0.9, True)
    decided = gate(scores, ood_score, ood_score, known, settings)
    clear, unknown = explain_rows(scores, ood_score, ood_score, known, settings, ["a", "b", "base"])
    assert clear.nearest == "b"
    assert list(clear.probabilities) == ["b", "a"]
    assert clear.probabilities["b"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert not clear.is_ood
    assert unknown.is_ood
    assert unknown.ood_score > unknown.threshold
    assert unknown.expert_weights["base"] == pytest.approx(decided.expert_weights[1, 2].item())
    assert "base" in str(unknown)
    assert "above" in str(unknown)
    assert "within" in str(clear)


def test_the_reason_is_one_plain_sentence():
    known = known_of(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
    scores = torch.tensor([[0.0, 9.0], [9.0, 0.0], [1.0, 2.0]])
    ood_score, distance = torch.tensor([0.3, 30.0, 0.0]), torch.tensor([0.5, 4.0, 0.5])
    rows = explain_rows(
        scores, ood_score, distance, known, GateSettings(0.01, 0.9, True), ["a", "b", "base"],
        torch.tensor([False, False, True]), lambda found, usual: found / usual,
    )  # fmt: skip
    usual = float(known.distance.median())
    assert rows[0].reason == "like the calibration texts of b → b"
    assert rows[1].reason == f"unlike every calibration text (closest: a, {4 / usual:.1f} × its usual distance) → base"
    assert rows[2].reason.startswith("there is nothing to read")
    assert rows[2].reason.endswith("→ base")
    assert rows[2].expert_weights == {"base": 1.0}
    assert rows[1].reason in str(rows[1])


def test_flag_threshold_weights_and_reason_agree():
    generator = torch.Generator().manual_seed(0)
    background = 2 + 2 * torch.randn(200, generator=generator)
    known = known_of(torch.randn(80, generator=generator), torch.randn(80, generator=generator))
    known = known._replace(background_novelty=background, background_share=torch.full((200,), 1 / 200))
    scores, ood_score = torch.randn(400, 2, generator=generator), torch.linspace(-3, 9, 400)
    for alpha, beta in ((0.01, 0.03), (0.001, 0.3), (0.3, 0.01)):
        settings = GateSettings(alpha, 0.9, True, beta)
        rows = explain_rows(scores, ood_score, ood_score, known, settings, ["a", "b", "base"])
        for row in rows:
            to_base = row.expert_weights.get("base", 0.0)
            assert row.is_ood == (to_base > 0.5) == (row.ood_score > row.threshold)
            assert row.like_calibration == (row.tail_share >= alpha)
            if row.like_calibration:
                assert to_base == 0
            if row.reason.endswith("→ base"):
                assert row.is_ood
                assert row.reason.startswith(("unlike every", "near the calibration texts"))
            if row.reason.startswith(("like", "unlike the")):
                assert to_base <= 0.05
            assert ("above" in str(row)) == row.is_ood
        assert 0 < sum(row.is_ood for row in rows) < len(rows)


def test_without_a_known_share_of_background_prompts_the_threshold_is_that_of_known_prompts():
    known = known_of(torch.linspace(0, 1, 50))
    limit = threshold(fit_tail(known.ood_score, known.labels, 1), 0.01)
    torch.testing.assert_close(ood_threshold(known, 0.01, 0.03), limit)
