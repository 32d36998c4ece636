"""LiNeS: the merged task vector scaled by depth."""

from __future__ import annotations

import pytest
import torch

from mediator_peft.checkpoints.opening import ModelCheckpoint
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import ConfigError
from mediator_peft.merge.builder import merge_in_memory
from mediator_peft.merge.compatibility import check_job
from mediator_peft.merge.model_method import ModelMethod
from mediator_peft.methods.merging import TensorContext
from tests.methods.merging_helpers import merged, tensor_tiles
from tests.methods.test_merging_rows import BASE, TAU
from tests.tiny import fine_tuned, tiny_model


def factors(alpha, beta, num_blocks):
    method = ModelMethod(MediatorSettings(), {}, alpha, beta)
    blocks = [*range(num_blocks), None]
    contexts = [TensorContext("w", block=block, num_blocks=num_blocks) for block in blocks]
    method.contexts = {str(number): context for number, context in enumerate(contexts)}
    return [method.of_tensor(str(number), False).factor for number in range(len(contexts))]


def test_the_worked_factors():
    assert factors(0.5, 0.5, 4) == pytest.approx([0.5, 2 / 3, 5 / 6, 1.0, 0.5])
    assert factors(0.5, 0.5, 1) == [0.5, 0.5]
    third = merged("task_arithmetic", BASE, TAU[:2], parameters={"scale": 1.0}, factor=5 / 6)
    expected = [[0.333333, 0.083333, -0.25], [0, 0.166667, -0.25]]
    torch.testing.assert_close(third, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def test_the_worked_alpha_of_ties():
    of_sum, of_merged = tensor_tiles("ties", BASE, TAU[:2], parameters={"density": 0.5}).l1_norms()
    assert (of_sum, of_merged) == pytest.approx((1.3, 1.4), abs=1e-5)
    assert of_sum / of_merged / 2 == pytest.approx(0.464286, abs=1e-5)
    entrywise = tensor_tiles("task_arithmetic", BASE, TAU[:2], factor=3.0).l1_norms()
    assert entrywise == pytest.approx((1.3, 1.3 * 0.4 * 3), abs=1e-5)


@pytest.fixture(scope="module")
def job():
    base = tiny_model()
    experts = {name: fine_tuned(base, number) for number, name in enumerate(("a", "b"), 1)}
    checkpoints = {name: ModelCheckpoint(model, f"expert {name!r}") for name, model in experts.items()}
    return check_job(ModelCheckpoint(base), checkpoints)


def backbone(job, **settings):
    names = dict.fromkeys(job.experts, "x")
    _, found, _, report = merge_in_memory(job, MediatorSettings(experts=names, routed_layers=[0], **settings))
    return found, report


def test_the_first_block_is_the_average_and_the_last_one_the_sum(job):
    scaled, report = backbone(job, merge_method="task_arithmetic", depth_scaling="auto")
    again, _ = backbone(job, merge_method="average", depth_scaling="auto")
    assert any("depth_scaling" in note for note in report.notes)
    last = job.structure.num_blocks - 1
    for name, tensor in scaled.items():
        base = job.base.tensor(name)
        total = sum(job.experts[expert].tensor(name) - base for expert in sorted(job.experts))
        share = 1.0 if f".layers.{last}." in name else 0.75 if ".layers.1." in name else 0.5
        torch.testing.assert_close(tensor, base + share * total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tensor, again[name], rtol=1e-4, atol=1e-6)


def test_auto_keeps_the_l1_norm_of_the_average_in_the_first_block(job):
    # What is no multiple of the sum is merged once more for its norm; ties at density 1 of experts that agree is.
    scaled, _ = backbone(job, merge_method="ties", depth_scaling="auto")
    plain, _ = backbone(job, merge_method="ties")
    total = merged_norm = 0.0
    for name, tensor in plain.items():
        base = job.base.tensor(name)
        total += float(sum(job.experts[each].tensor(name) - base for each in sorted(job.experts)).abs().double().sum())
        merged_norm += float((tensor - base).abs().double().sum())
    alpha = total / merged_norm / 2
    for name, tensor in scaled.items():
        if ".layers." not in name or ".layers.0." in name:
            base = job.base.tensor(name)
            torch.testing.assert_close(tensor - base, alpha * (plain[name] - base), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("wrong", ["deep", [1.0], [1.0, float("nan")], [True, 1.0], 0.5])
def test_other_values_are_refused(wrong):
    with pytest.raises(ConfigError, match="depth_scaling"):
        MediatorSettings(depth_scaling=wrong)
