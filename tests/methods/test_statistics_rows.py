"""Merge methods that read statistics of the experts: worked numbers, thresholds, and what their files may hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mediator_peft.errors import ConfigError
from mediator_peft.methods.merging import MERGE_METHODS, TensorContext
from mediator_peft.methods.merging.fisher import open_fisher, scales
from mediator_peft.methods.merging.ota import open_moments, thresholds
from mediator_peft.methods.merging.regmean import open_grams
from mediator_peft.methods.merging.row import EMBEDDING, LINEAR
from tests.methods.merging_helpers import Statistics, merged
from tests.methods.test_merging_rows import BASE, TAU

FISHER = {"a": torch.tensor([[4.0, 1, 0], [2, 1, 3]]), "b": torch.tensor([[1.0, 2, 0], [2, 4, 1]])}
GRAM = {
    "a": torch.tensor([[2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1]]),
    "b": torch.tensor([[1, -0.3, 0.1], [-0.3, 2, 0], [0.1, 0, 0.5]]),
}
MOMENTS = {
    "a": 1e-6 * torch.tensor([[4.0, 1, 9], [1, 4, 1]], dtype=torch.float64),
    "b": 1e-6 * torch.tensor([[1.0, 9, 1], [4, 1, 0]], dtype=torch.float64),
}
RANK_ONE = {name: torch.outer(v.sum(1), v.sum(0)) / v.sum() for name, v in MOMENTS.items()}
LIMITS = {"a": 3e-8, "b": 3e-8}


@pytest.mark.parametrize(
    ("name", "data", "shared", "parameters", "expected"),
    [
        ("fisher", FISHER, {"epsilon": 1e-6}, {}, [[0.26, 0.1, -0.15], [0, 0.13, -0.275]]),
        (
            "fisher",
            FISHER,
            {"epsilon": 1e-6, "a": 1 / 5.567764, "b": 1 / 5.099020},
            {},
            [[0.257111, 0.105775, -0.156592], [-0.008789, 0.131370, -0.266575]],
        ),
        *(
            ("regmean", GRAM, None, {"off_diagonal": factor, "ridge": 0.0}, expected)
            for factor, expected in (
                (1.0, [[0.182103, 0.136998, -0.137073], [0.061709, 0.156888, -0.265032]]),
                (0.9, [[0.187364, 0.132748, -0.133172], [0.062352, 0.152609, -0.261387]]),
                (0.0, [[0.233333, 0.1, -0.1], [0.066667, 0.116667, -0.233333]]),
            )
        ),
        ("ota", MOMENTS, None, {}, [[0.233333, 0.125, -0.075], [-0.066667, 0.083333, -0.4]]),
        ("ota", MOMENTS, LIMITS, {}, [[0.3, 0.2, -0.3], [-0.066667, 0, -0.4]]),
        ("ota", MOMENTS, LIMITS, {"combine": "mean"}, [[0.15, 0.1, -0.15], [0, 0, -0.2]]),
        ("ota", RANK_ONE, None, {}, [[0.200450, 0.075080, -0.071584], [-0.002041, 0.109073, -0.278001]]),
    ],
)
def test_the_worked_numbers(name, data, shared, parameters, expected):
    found = merged(name, BASE, TAU[:2], data=Statistics(data), shared=shared, parameters=parameters)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1.5e-6)


def test_regmean_minimises_the_error_of_outputs_on_the_inputs_of_each_expert():
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(40, 6, generator=generator, dtype=torch.float64) for name in "abc"}
    vectors = torch.randn(3, 5, 6, generator=generator)
    data = Statistics({name: (x.T @ x).float() for name, x in inputs.items()})
    parameters = {"off_diagonal": 1.0, "ridge": 0.0}
    found = merged("regmean", torch.zeros(5, 6), vectors, data=data, parameters=parameters).numpy()
    stacked = np.vstack([inputs[name].numpy() for name in "abc"])
    outputs = np.vstack([inputs[name].numpy() @ v.double().numpy().T for name, v in zip("abc", vectors, strict=True)])
    np.testing.assert_allclose(found, np.linalg.lstsq(stacked, outputs, rcond=None)[0].T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_regmean_with_fewer_tokens_than_inputs_stays_finite(num_tokens):
    inputs = torch.randn(num_tokens, 3, generator=torch.Generator().manual_seed(1))
    data = Statistics(dict.fromkeys("ab", inputs.T @ inputs))
    found = merged("regmean", BASE, TAU[:2], data=data, parameters={"off_diagonal": 1.0})
    # One Gram matrix for all experts gives the average whatever its rank.
    torch.testing.assert_close(found, TAU[:2].mean(dim=0).double(), rtol=0, atol=1e-4)


def test_fisher_without_any_information_is_the_mean():
    data = Statistics(dict.fromkeys("ab", torch.zeros(2, 3)))
    found = merged("fisher", BASE, TAU[:2], data=data, shared={"epsilon": 0.0})
    torch.testing.assert_close(found, TAU[:2].mean(dim=0).double(), rtol=0, atol=1e-6)


class View:
    """A pre-pass's view of one tensor at hand."""

    def __init__(self, context, vectors):
        self.context, self.vectors = context, vectors

    def tiles(self):
        for start in range(self.vectors.shape[1]):
            yield self.vectors[:, start : start + 1], TensorContext(**{**vars(self.context), "start": start})


def write(folder, files, **header):
    folder.mkdir(exist_ok=True)
    for expert, tensors in files.items():
        save_file(dict(tensors), folder / f"{expert}.safetensors", {"statistic": "fisher", **header})
    return folder


def contexts_of(shapes, **more):
    return {
        name: TensorContext(name, ("a", "b"), shape, kind=LINEAR if len(shape) == 2 else EMBEDDING, **more)
        for name, shape in shapes.items()
    }


def test_thresholds_keep_the_share_of_the_whole_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (30, 40), "v": (500,)}
    files = {
        name: {key: torch.rand(shape, generator=generator) * {"w": 1, "v": 1e-3}[key] for key, shape in shapes.items()}
        for name in "ab"
    }
    data = open_moments(write(tmp_path / "side", files), contexts_of(shapes))
    vectors = {"w": torch.randn(2, 30, 40, generator=generator), "v": torch.randn(2, 500, 1, generator=generator)}
    views = [View(context, vectors[name]) for name, context in contexts_of(shapes, data=data).items()]
    found = thresholds(views, density=0.3)
    for number, name in enumerate("ab"):
        saliency = torch.cat([(files[name][key].double() * vectors[key][number].double().reshape(shapes[key]) ** 2)
                              .flatten() for key in shapes])  # fmt: skip
        share = float((saliency >= found[name]).double().mean())
        assert 0.3 <= share < 0.31
    assert thresholds(views, density=1.0) == {}


def test_scales_of_fisher_are_those_of_the_whole_model(tmp_path):
    files = {"a": {"w": FISHER["a"], "v": torch.tensor([3.0])}, "b": {"w": FISHER["b"], "v": torch.tensor([4.0])}}
    contexts = contexts_of({"w": (2, 3), "v": (1,)})
    data = open_fisher(write(tmp_path / "side", files), contexts)
    views = [View(context, None) for context in contexts_of({"w": (2, 3), "v": (1,)}, data=data).values()]
    plain = scales(views, floor=0.1)
    # 11 + 3 and 10 + 4 over 7 entries: mean weight 2.
    assert plain == {"a": 1.0, "b": 1.0, "epsilon": pytest.approx(0.2)}
    assert scales(views, normalise=True)["a"] == pytest.approx(1 / 40**0.5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_of_files_are_those_of_the_model(tmp_path, is_transposed):
    whole = {name: torch.rand(4, 6, dtype=torch.float64) for name in "ab"}
    stored = {name: (value.T if is_transposed else value).contiguous() for name, value in whole.items()}
    shapes, more = {"w": tuple(stored["a"].shape)}, {"is_transposed": is_transposed}
    plain = {"a": {"w": stored["a"]}, "b": {"w.exp_avg_sq": stored["b"]}}
    data = open_moments(write(tmp_path / "side", plain), contexts_of(shapes, **more))
    context = TensorContext(**{**vars(contexts_of(shapes, **more)["w"]), "start": 1})
    for name in "ab":
        torch.testing.assert_close(data.tile(name, context, 2, 6), whole[name][1:3], rtol=0, atol=0)
    halves = {name: {"w.rows": value.sum(1), "w.columns": value.sum(0)} for name, value in stored.items()}
    data = open_moments(write(tmp_path / "halves", halves), contexts_of(shapes, **more))
    for name in "ab":
        expected = torch.outer(whole[name].sum(1), whole[name].sum(0)) / whole[name].sum()
        torch.testing.assert_close(data.tile(name, context, 2, 6), expected[1:3])


def test_files_that_do_not_fit_are_refused_together(tmp_path):
    contexts = contexts_of({"w": (2, 3), "u": (2, 3)})
    with pytest.raises(ConfigError, match="must be a folder"):
        open_fisher(tmp_path / "none", contexts)
    folder = write(tmp_path / "side", {"a": {"w": torch.ones(3, 2)}})
    with pytest.raises(ConfigError) as caught:
        open_fisher(folder, contexts)
    text = str(caught.value)
    assert all(part in text for part in ("shape (3, 2)", "u: it is missing", "b.safetensors", "measure"))
    with pytest.raises(ConfigError, match="holds 'fisher', this merge method needs 'gram'"):
        open_grams(folder, contexts)
    (folder / "b.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ConfigError, match=r"b\.safetensors"):
        open_fisher(folder, contexts)


def test_gram_matrices_are_shared_and_checked_by_width(tmp_path):
    shared = json.dumps({"u": "w"})
    files = {"a": {"w": torch.eye(3)}, "b": {"w": 2 * torch.eye(3)}}
    contexts = contexts_of({"w": (2, 3), "u": (5, 3), "v": (7,)})
    data = open_grams(write(tmp_path / "side", files, statistic="gram", shared=shared), contexts)
    torch.testing.assert_close(data.gram("b", contexts["u"]), 2 * torch.eye(3))
    with pytest.raises(ConfigError, match="the layer has 4 inputs"):
        open_grams(tmp_path / "side", contexts_of({"w": (3, 4)}))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_statistics_that_are_no_weights_are_refused(tmp_path, bad):
    value = torch.ones(2, 3)
    value[1, 1] = bad
    contexts = contexts_of({"w": (2, 3)})
    data = open_fisher(write(tmp_path / "side", {"a": {"w": value}, "b": {"w": value}}), contexts)
    with pytest.raises(ConfigError, match="below 0, NaN or infinity"):
        data.tile("a", contexts["w"], 2, 3)


@pytest.mark.parametrize("name", ["regmean", "fisher", "ota"])
def test_they_need_their_files(name):
    assert MERGE_METHODS[name].needs_data
