"""What one tensor becomes, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mediator_peft import MediatorConfig
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.checkpoints.opening import ModelCheckpoint
from mediator_peft.merge import signed_selection as signed
from mediator_peft.merge import tensor_work, tiles
from mediator_peft.merge.builder import merge_in_memory
from mediator_peft.merge.compatibility import check_job
from mediator_peft.merge.signed_selection import errors_of
from mediator_peft.merge.tensor_work import Task, TensorWork
from mediator_peft.methods.encoding.base import Precision
from mediator_peft.methods.sparsifying.magnitude import largest_mask
from mediator_peft.storage import BFLOAT16
from tests.tiny import fine_tuned, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def job_of(arch="llama", num_experts=2, dtype=torch.float32, base_dtype=None):
    base = tiny_model(arch).float()
    experts = {f"e{k}": fine_tuned(base, k).to(dtype) for k in range(num_experts)}
    return check_job(
        ModelCheckpoint(base.to(base_dtype or dtype)),
        {name: ModelCheckpoint(model, f"expert {name!r}") for name, model in experts.items()},
    )


def run(job, **settings):
    config = MediatorConfig(experts=dict.fromkeys(job.experts, "x"), **settings)
    return config, *merge_in_memory(job, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2", "qwen2"])
def test_backbone_is_the_mean_and_deltas_are_the_formula(arch, dtype):
    job = job_of(arch, 3, dtype, base_dtype=torch.float32)
    _, bank, backbone, built, _ = run(job, density=0.3, routed_layers="all")
    assert bank.deltas
    for name, merged in backbone.items():
        weights = torch.stack([job.experts[expert].tensor(name).float() for expert in sorted(job.experts)])
        assert merged.dtype == dtype
        tolerance = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(merged.float(), weights.mean(dim=0), rtol=tolerance, atol=tolerance)
    for layer, columns in bank.deltas.items():
        for column, delta in columns.items():
            source = job.base if column == "base" else job.experts[column]
            weight = source.tensor(f"{layer}.weight").to(dtype).float()
            whole = weight - backbone[f"{layer}.weight"].float()
            whole = whole.T if arch == "gpt2" else whole
            kept = largest_mask(whole.contiguous(), 0.3)
            expected = SparseDelta.from_dense(whole, kept, "sign", Precision())
            torch.testing.assert_close(delta.mask, expected.mask, rtol=0, atol=0)
            torch.testing.assert_close(delta.parts["signs"], expected.parts["signs"], rtol=0, atol=0)
            torch.testing.assert_close(delta.parts["scales"], expected.parts["scales"], rtol=0, atol=0)
            if delta.bias is not None:
                bias = source.tensor(f"{layer}.bias").to(dtype).float() - backbone[f"{layer}.bias"].float()
                torch.testing.assert_close(delta.bias, bias, rtol=0, atol=0)
    assert built.columns == [*job.experts, "base"]


def test_the_errors_are_those_of_the_packed_deltas():
    job = job_of(num_experts=2)
    rows = {name: [] for name in job.base.tensors}
    config = MediatorConfig(experts=dict.fromkeys(job.experts, "x"))
    work = TensorWork(job.base, job.experts, config, job.dtype, lambda name, _, part: rows[name].append(part.copy()))
    name = job.structure.layers[0].name + ".weight"
    result = work(Task(name, True, 0.2, False, None))
    backbone = torch.from_numpy(np.concatenate(rows[name]))
    for column, delta in result.deltas.items():
        source = job.base if column == "base" else job.experts[column]
        expected = errors_of(source.tensor(name) - backbone, delta.as_tensors())
        torch.testing.assert_close(torch.tensor(result.errors[column]), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes_are_rounded_to_the_coarsest(dtypes):
    base = tiny_model().float()
    experts = {
        f"e{k}": ModelCheckpoint(fine_tuned(base, k).to(dtype), f"expert 'e{k}'") for k, dtype in enumerate(dtypes)
    }
    job = check_job(ModelCheckpoint(base), experts)
    assert job.dtype == BFLOAT16
    _, _, backbone, _, report = run(job)
    assert {tensor.dtype for tensor in backbone.values()} == {torch.bfloat16}
    assert report.base_was_rounded


def test_one_expert_alone_is_the_backbone():
    job = job_of(num_experts=1)
    _, bank, backbone, _built, report = run(job, routed_layers="all")
    for name, tensor in backbone.items():
        torch.testing.assert_close(tensor, job.experts["e0"].tensor(name), rtol=0, atol=0)
    assert all(not delta["e0"].dense().any() for delta in bank.deltas.values())
    assert set(report.conflict["sign"]) == {0.0}
    assert run(job)[3].routed_modules == []


def test_identical_experts_are_averaged_and_not_routed():
    base = tiny_model().float()
    expert = fine_tuned(base, 1)
    job = check_job(ModelCheckpoint(base), {name: ModelCheckpoint(expert, name) for name in ("a", "b")})
    _, bank, backbone, built, report = run(job)
    assert built.routed_modules == []
    assert not bank.deltas
    assert any("agree everywhere" in note for note in report.notes)
    for name, tensor in backbone.items():
        torch.testing.assert_close(tensor, expert.state_dict()[name], rtol=0, atol=1e-7)


def test_an_expert_equal_to_the_base_gets_the_base_back():
    base = tiny_model().float()
    experts = {"same": ModelCheckpoint(base, "same"), "other": ModelCheckpoint(fine_tuned(base, 1), "other")}
    job = check_job(ModelCheckpoint(base), experts)
    _, bank, _, _, _ = run(job, routed_layers="all")
    for columns in bank.deltas.values():
        torch.testing.assert_close(columns["same"].dense(), columns["base"].dense(), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"density": 1.0}, {"density": 0.3, "rescale": "mean"}])
def test_float_values_are_the_entries(settings):
    job = job_of(num_experts=2)
    _, bank, backbone, _, _ = run(job, routed_layers="all", encoding="float", **settings)
    for layer, columns in bank.deltas.items():
        whole = job.experts["e1"].tensor(f"{layer}.weight") - backbone[f"{layer}.weight"]
        kept = largest_mask(whole, settings["density"])
        torch.testing.assert_close(columns["e1"].dense(), torch.where(kept, whole, 0), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_deltas_are_as_near_as_can_be(arch, dtype):
    job = job_of(arch, 2, dtype)
    _, bank, backbone, built, _ = run(job, routed_layers="all", sparsifier="svd", rank=3)
    assert built.encoding == "factors"
    for layer, columns in bank.deltas.items():
        whole = job.experts["e1"].tensor(f"{layer}.weight").float() - backbone[f"{layer}.weight"].float()
        whole = whole.T if arch == "gpt2" else whole
        best = float(torch.linalg.svdvals(whole)[3:].norm())
        assert float((whole - columns["e1"].dense()).norm()) <= 1.01 * best
        assert columns["e1"].parts["left"].dtype == torch.bfloat16
        assert columns["e1"].num_bytes == 2 * 3 * sum(whole.shape) + (arch == "gpt2") * 4 * whole.shape[0]


def test_all_singular_values_are_the_delta():
    job = job_of(num_experts=2)
    _, bank, backbone, _, _ = run(job, routed_layers="all", sparsifier="svd", density=1.0)
    for layer, columns in bank.deltas.items():
        whole = job.experts["e1"].tensor(f"{layer}.weight") - backbone[f"{layer}.weight"]
        torch.testing.assert_close(columns["e1"].dense(), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparsifier", ["dare", "svd"])
def test_what_is_drawn_hangs_on_seed_tensor_and_expert_alone(sparsifier):
    job = job_of(num_experts=2)
    experts = {name: job.experts[name] for name in sorted(job.experts, reverse=True)}
    turned = check_job(job.base, experts)
    one, same, other = (
        run(which, routed_layers="all", sparsifier=sparsifier, density=0.02, seed=seed)[1].deltas
        for which, seed in ((job, 0), (turned, 0), (job, 1))
    )
    for layer, columns in one.items():
        for column, delta in columns.items():
            torch.testing.assert_close(delta.dense(), same[layer][column].dense(), rtol=0, atol=0)
    if sparsifier == "dare":
        assert any(not torch.equal(d.mask, other[layer][c].mask) for layer, cs in one.items() for c, d in cs.items())
        masks = [delta.mask for columns in one.values() for delta in columns.values() if delta.shape == (32, 32)]
        assert len({bytes(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_a_miss_of_the_sample_changes_nothing(monkeypatch):
    job = job_of(num_experts=3, dtype=torch.bfloat16)
    expected = run(job)[1].deltas
    for slack in ((1e-9, 1e-9), (0.9, 0.9)):
        monkeypatch.setattr(signed, "SLACK", slack[0])
        monkeypatch.setattr(tensor_work, "WIDE_SLACK", slack[1])
        monkeypatch.setattr(tiles, "_SAMPLED_ENTRIES", 8)
        for layer, columns in run(job)[1].deltas.items():
            for column, delta in columns.items():
                torch.testing.assert_close(delta.mask, expected[layer][column].mask, rtol=0, atol=0)


def test_a_merge_that_must_see_the_whole_tensor_gets_it(monkeypatch):
    from mediator_peft.methods import merging

    seen = []

    def by_norm(task_vectors):
        seen.append(tuple(task_vectors.shape))
        return task_vectors[0] * task_vectors.norm()

    for arch in ("llama", "gpt2"):
        job = job_of(arch, 2)
        monkeypatch.setitem(merging.MERGE_METHODS, "by_norm", merging.MergeMethod(by_norm))
        _, _, backbone, _, _ = run(job, merge_method="by_norm")
        for name, merged in backbone.items():
            base = job.base.tensor(name)
            vectors = torch.stack([job.experts[expert].tensor(name) - base for expert in sorted(job.experts)])
            torch.testing.assert_close(merged, base + by_norm(vectors), rtol=1e-5, atol=1e-6)
