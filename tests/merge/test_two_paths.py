"""One tensor by the native kernels and by plain numpy: every number the same; and what neither may let through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointError, ConfigError
from mediator_peft.kernels import dispatch
from mediator_peft.merge import tiles
from mediator_peft.merge.tensor_work import Task, TensorWork
from mediator_peft.storage import to_tensor
from tests.merge.helpers import InMemory

needs_loops = pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are not there")
SHAPES = [(9, 1), (1, 21), (7, 37), (40, 64), (33, 80), (5, 2003)]


def weights_of(shape, number, dtype=torch.bfloat16):
    """A weight and its bias; the base has number 0. Fine-tunes are near it, with many equal entries."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    step = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02 * (number > 0)
    return {"w": (base + step).to(dtype), "b": (base + step)[:, 0].contiguous().to(dtype)}


def work_on(checkpoints, task, **settings):
    """(results, backbone) of one task; the first checkpoint is the base."""
    names = [f"e{number}" for number in range(1, len(checkpoints))]
    written = {name: [] for name in checkpoints[0].tensors}
    config = MediatorSettings(experts=dict.fromkeys(names, "x"), **settings)
    work = TensorWork(
        checkpoints[0],
        dict(zip(names, checkpoints[1:], strict=True)),
        config,
        checkpoints[0].tensors["w"].dtype,
        lambda name, _, rows: written[name].append(rows.copy()),
    )
    result = work(task)
    return result, {name: np.concatenate(parts) for name, parts in written.items() if parts}


def numbers_of(result, backbone):
    """All that came of it, as plain bytes."""
    found = {f"backbone {name}": array.view(np.uint8) for name, array in backbone.items()}
    found |= {f"counts {name}": counts for name, counts in result.counts.items()}
    for column, delta in result.deltas.items():
        found |= {f"{part} {column}": array.view(np.uint8) for part, array in delta.parts.items()}
        found[f"errors {column}"] = np.array(result.errors[column])
    return found


@needs_loops
@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"merge_method": "base"}, {"merge_method": "ties"}, {"density": 1.0}, {"dtype": torch.float16}]
)
def test_both_paths_give_the_same_numbers(num_experts, shape, settings, monkeypatch):
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.bfloat16)
    density = settings.pop("density", 0.2)
    checkpoints = [InMemory(weights_of(shape, number, dtype)) for number in range(num_experts + 1)]
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 200)
    tasks = [
        Task("w", True, density, False, "b"),
        Task("w", True, density, True, None),  # stored as Conv1D does
        Task("w", False, density, False, None),
        Task("w", False, None, False, None),  # an embedding
        Task("b", False, None, False, None),  # a norm
    ]
    found = []
    for native_or_none in (dispatch.native(), None):
        monkeypatch.setattr(dispatch, "native", lambda given=native_or_none: given)
        found.append([numbers_of(*work_on(checkpoints, task, **settings)) for task in tasks])
    for fast, slow in zip(*found, strict=True):
        assert fast.keys() == slow.keys()
        for name, array in fast.items():
            np.testing.assert_array_equal(array, slow[name], err_msg=name)


@pytest.mark.parametrize("use_loops", [pytest.param(True, marks=needs_loops), False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", [0, 1, 2])
def test_what_is_not_finite_is_found_wherever_it_is(use_loops, value, whose, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 100)
    for name, place in (("w", (0, 0)), ("w", (-1, 20)), ("w", (-1, 15)), ("w", (3, 16)), ("b", (0,)), ("b", (-1,))):
        for task in (
            Task("w", True, 0.2, False, "b"), Task("w", False, None, False, "b"), Task("w", True, 0.2, True, "b")
        ):  # fmt: skip
            stored = [weights_of((13, 21), number) for number in range(3)]
            stored[whose][name][place] = value
            checkpoints = [InMemory(weights, f"number {number}") for number, weights in enumerate(stored)]
            with pytest.raises(CheckpointError, match=f"(?s)number {whose}.*'{name}'.*1 of them"):
                work_on(checkpoints, task)


@pytest.mark.parametrize("use_loops", [pytest.param(True, marks=needs_loops), False])
def test_infinity_in_all_of_them_is_found(use_loops, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    stored = [weights_of((13, 21), number) for number in range(3)]
    for weights in stored:
        weights["w"][5, 5] = float("inf")
    with pytest.raises(CheckpointError, match="number 0"):
        work_on([InMemory(each, f"number {k}") for k, each in enumerate(stored)], Task("w", False, None, False, None))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e7), (torch.float32, 3e38), (torch.bfloat16, 3e38)])
@pytest.mark.parametrize("place", ["w", "b"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_merge_beyond_the_range_of_its_dtype_is_refused(place, dtype, scale):
    stored = [weights_of((13, 21), number, dtype) for number in range(3)]
    stored[1][place].view(-1)[5] += 100
    checkpoints = [InMemory(each, f"number {k}") for k, each in enumerate(stored)]
    settings = {"merge_method": "task_arithmetic", "merge_parameters": {"scale": scale}, "fallback": "backbone"}
    for task in (Task("w", False, None, False, "b"), Task("w", True, 0.2, True, "b")):
        with pytest.raises(ConfigError, match=r"(?s)'[wb]'.*beyond the range"):
            work_on(checkpoints, task, **settings)
    work_on(checkpoints, task, **settings | {"merge_parameters": {"scale": 0.5}})


@pytest.mark.parametrize("use_loops", [pytest.param(True, marks=needs_loops), False])
@pytest.mark.filterwarnings("ignore:overflow")
def test_large_numbers_are_numbers(use_loops, monkeypatch):
    if not use_loops:
        monkeypatch.setattr(dispatch, "native", lambda: None)
    stored = [weights_of((13, 21), number) for number in range(3)]
    stored[1]["w"][5, 5] = 1e30  # its square is infinite in float32
    _, backbone = work_on([InMemory(each) for each in stored], Task("w", False, None, False, None))
    assert float(to_tensor(backbone["w"])[5, 5]) == pytest.approx(5e29, rel=0.01)
