"""The share of new known prompts that is flagged is the stated one, also with more features than texts."""

import pytest
import torch

from mediator_peft.routing.calibration import calibrate
from mediator_peft.routing.ood import gate_coefficients
from mediator_peft.routing.routers.gaussian import GaussianRouter, inverse_root, oas_shrinkage

SIZE, PER_EXPERT, ALPHA = 150, 50, 0.05


def draw(count, generator):
    """Rows of three experts and background ones, far apart in a space that no one of them fills."""
    centres = 0.5 * torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(count)
    return centres[labels] + torch.randn(len(labels), SIZE, generator=generator), labels


def flagged():
    rates = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        (x, labels), (new, new_labels) = draw(PER_EXPERT, generator), draw(300, generator)
        known, new = labels < 3, new[new_labels < 3]
        router = GaussianRouter(3, SIZE)
        keys = [str(number) for number in range(int(known.sum()))]
        calibrate(lambda: GaussianRouter(3, SIZE), router, x[known], labels[known], keys, "abc", seed, ALPHA, x[~known])
        nearest = router.scores(new).argmax(dim=1)
        found = gate_coefficients(router.background_log_odds(new), router.distance(new), nearest, router.known, ALPHA)
        rates.append(found.is_ood.double().mean())
    return float(torch.stack(rates).mean())


@torch.no_grad()
def test_the_stated_rate_holds_for_new_prompts():
    assert 0.5 * ALPHA < flagged() < 1.5 * ALPHA


@torch.no_grad()
@pytest.mark.parametrize(("num_samples", "least"), [(100, 0.5), (300, 0.5), (600, 0.25), (4000, 0.0375)])
def test_the_covariance_is_shrunk_by_half_while_texts_are_few(num_samples, least):
    x = torch.randn(4000, 60, generator=torch.Generator().manual_seed(1)).double()
    x[:, 1:] += 3 * x[:, :1]  # all entries go with the first
    covariance, correlation = torch.cov(x.T), torch.corrcoef(x.T)
    root = inverse_root(covariance, num_samples)
    shrunk = torch.linalg.inv(root @ root.T)
    scale = shrunk.diagonal().sqrt()
    found = (shrunk / scale.outer(scale))[0, 1]
    assert oas_shrinkage(correlation, num_samples) < least
    assert found == pytest.approx((1 - least) * float(correlation[0, 1]), abs=1e-6)
