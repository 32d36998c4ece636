"""Reference requests in many wordings: the basis that comes of them, the depth they choose, and what they change."""

import torch

from mediator_peft.routing.decision_rule import Negatives, fit_detectors
from mediator_peft.routing.reference_texts import FURTHER_LANGUAGES, FURTHER_TASKS, REFERENCE_TASKS
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.wording import (
    choose_depth_by_wordings,
    recognised_across_wordings,
    reference_prompts,
    wording_basis,
)


def spoken(seed=0, num_tasks=12, num_wordings=6, size=10, spread=6.0):
    """Tasks that differ in the first half of the features; wordings change the other half, the same for all tasks."""
    generator = torch.Generator().manual_seed(seed)
    half = size // 2
    tasks = torch.arange(num_tasks).repeat_interleave(num_wordings)
    wordings = torch.arange(num_wordings).repeat(num_tasks)
    rows = 0.3 * torch.randn(len(tasks), size, generator=generator)
    rows[:, :half] += torch.randn(num_tasks, half, generator=generator)[tasks]
    rows[:, half:] += spread * torch.randn(num_wordings, size - half, generator=generator)[wordings]
    return rows, tasks, wordings


def test_the_covariance_within_tasks_is_nearly_round_in_the_basis():
    rows, tasks, _ = spoken()
    basis = wording_basis(rows, tasks)
    inside = rows @ basis
    centred = inside - torch.stack([inside[tasks == task].mean(dim=0) for task in range(12)])[tasks]
    before = rows - torch.stack([rows[tasks == task].mean(dim=0) for task in range(12)])[tasks]

    def stretch(some):
        values = torch.linalg.eigvalsh(some.T @ some)
        return float(values[-1] / values[0])

    assert stretch(centred) < 30
    assert stretch(before) > 1000


def test_the_basis_depends_on_neither_scales_nor_the_order_of_prompts():
    rows, tasks, _ = spoken()
    scales = torch.logspace(-2, 2, rows.shape[1])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    inside = rows @ wording_basis(rows, tasks)
    scaled = (rows * scales) @ wording_basis(rows * scales, tasks)
    torch.testing.assert_close(torch.cdist(inside, inside), torch.cdist(scaled, scaled), rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(
        wording_basis(rows[order], tasks[order]), wording_basis(rows, tasks), rtol=1e-4, atol=1e-5
    )


def test_the_depth_is_chosen_where_other_wordings_are_recognised():
    rows, tasks, wordings = spoken()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    assert recognised_across_wordings(rows, tasks, wordings) > 0.9
    assert 0.3 < recognised_across_wordings(noise, tasks, wordings) < 0.7
    assert choose_depth_by_wordings([noise, rows, noise], tasks, wordings) == 1


def test_detectors_in_a_basis_are_those_of_the_features_in_it():
    rows, tasks, _ = spoken(seed=4)
    basis = wording_basis(rows, tasks)
    own = torch.randn(40, 10, generator=torch.Generator().manual_seed(5)) + 2
    negatives = Negatives(rows, tasks, torch.ones(len(rows), dtype=torch.bool))
    labels = torch.zeros(40, dtype=torch.long)
    weight, bias = fit_detectors(own, labels, negatives._replace(basis=basis), 1)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(6))).Q
    turned, turned_bias = fit_detectors(own, labels, negatives._replace(basis=basis @ turn), 1)
    torch.testing.assert_close(rows @ turned[0] + turned_bias, rows @ weight[0] + bias, rtol=1e-2, atol=1e-2)
    plain, _ = fit_detectors(own, labels, negatives, 1)
    # Wordings change the second half of the features, and in the basis little is made of them.
    deviation = rows.std(dim=0)

    def share(some):
        return float((some * deviation)[0, 5:].norm() / (some * deviation)[0].norm())

    assert share(weight) < 0.5 * share(plain)


def test_a_gaussian_router_in_a_basis_is_that_of_the_features_in_it():
    rows, tasks, _ = spoken()
    basis = wording_basis(rows, tasks)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(3).repeat(30)
    features = rows[labels * 7] + torch.randn(90, 10, generator=generator)
    one, other = ROUTERS["gaussian"](3, 10), ROUTERS["gaussian"](3, 10)
    one.basis = basis
    one.fit(features, labels)
    other.fit(features @ basis, labels)
    torch.testing.assert_close(one.distance(features), other.distance(features @ basis), rtol=1e-3, atol=1e-3)
    ours, theirs = one.scores(features), other.scores(features @ basis)
    torch.testing.assert_close(ours - ours[:, :1], theirs - theirs[:, :1], rtol=1e-3, atol=2e-3)


def test_every_reference_task_is_put_in_every_wording():
    prompts, tasks, wordings = reference_prompts(0)
    everything = (*REFERENCE_TASKS, *FURTHER_TASKS)
    of_languages = [form for forms in FURTHER_LANGUAGES for _, form in forms]
    assert len(prompts) == len(tasks) == len(wordings) == 8 * len(everything) + len(of_languages)
    assert all(len(forms) == 8 and all(form.count("{}") == 1 for form in forms) for _, forms in everything)
    assert all(form.count("{}") == 1 for form in of_languages)
    assert len(set(zip(tasks.tolist(), wordings.tolist(), strict=True))) == len(prompts)
    assert reference_prompts(0)[0] == prompts != reference_prompts(1)[0]
