"""The calibration report: counts that add up, metrics by hand, files that can be read."""

import csv
import json

import pytest
import torch

from mediator_peft.evaluation.routing_report import (
    confusion,
    detection,
    histograms,
    risk_coverage,
    write_routing_report,
)
from mediator_peft.routing.calibration import Evidence, calibrate
from mediator_peft.routing.routers import ROUTERS


def evidence():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.4, 0.6]]).double()
    labels = torch.tensor([0, 0, 1, -1, -1])
    uncertainty = torch.tensor([0.0, 0.3, 0.6, 0.5, 1.0])
    return Evidence(
        probabilities,
        labels,
        uncertainty,
        torch.tensor([False, False, True, False, True]),
        1 - uncertainty,
        uncertainty,
    )


def test_the_table_counts_by_hand():
    assert confusion(evidence(), 2) == [[1, 1, 0], [0, 0, 1], [1, 0, 1]]


def test_detection_by_hand():
    # Six pairs; only (0.6 known, 0.5 unknown) is the wrong way round. At recall 1 the threshold is 0.5.
    assert detection(evidence()) == {"auroc": pytest.approx(5 / 6), "fpr_at_95": pytest.approx(1 / 3)}
    known_only = Evidence(*(column[:3] for column in evidence()))
    assert detection(known_only) == {"auroc": None, "fpr_at_95": None}


def test_every_prompt_is_in_a_histogram():
    _, known, unknown = histograms(evidence())
    assert (sum(known), sum(unknown)) == (3, 2)
    assert unknown[-1] == 1


def test_a_fit_becomes_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    features = torch.randn(120, 6, generator=generator) + 12.0 * torch.nn.functional.one_hot(labels, 6)
    ordinary = torch.randn(40, 6, generator=generator) - 12.0
    router = ROUTERS["gaussian"](3, 6)
    keys = [str(number) for number in range(120)]
    names = ["a", "b", "c"]
    report = calibrate(
        lambda: ROUTERS["gaussian"](3, 6), router, features, labels, keys, names, 0, 0.01, background=ordinary
    )
    summary = write_routing_report(tmp_path / "report", report, router.evidence)
    assert json.loads((tmp_path / "report" / "routing.json").read_text()) == summary
    assert summary["auroc"] > 0.99
    assert summary["fpr_at_95"] < 0.05
    assert summary["false_fallback"] <= 0.1
    rows = list(csv.reader((tmp_path / "report" / "confusion.csv").open()))
    assert [sum(map(int, row[1:])) for row in rows[1:]] == [40, 40, 40, 40]
    assert (tmp_path / "report" / "routing.png").stat().st_size > 5000
    for name in ("reliability.csv", "uncertainty.csv"):
        assert len((tmp_path / "report" / name).read_text().splitlines()) > 5


def test_risk_and_coverage_by_hand():
    # By uncertainty 0, .3, .5, .6, 1: right, wrong, background, right, background.
    assert risk_coverage(evidence()) == [
        (pytest.approx(share), pytest.approx(risk))
        for share, risk in ((0.2, 0), (0.4, 1 / 2), (0.6, 2 / 3), (0.8, 2 / 4), (1.0, 3 / 5))
    ]
