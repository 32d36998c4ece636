"""Views of a whole model: what they read, and what merging a tensor is predicted to hold."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mediator_peft.checkpoints.opening import ModelCheckpoint
from mediator_peft.config import MediatorSettings
from mediator_peft.merge.builder import plan_merge
from mediator_peft.merge.compatibility import check_job
from mediator_peft.merge.model_method import ModelViews
from mediator_peft.methods.merging import MERGE_METHODS
from tests.tiny import fine_tuned


@pytest.fixture(scope="module")
def job():
    """Experts of a model whose matrices are stored as (inputs, outputs)."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    experts = {name: ModelCheckpoint(fine_tuned(base, seed), name) for seed, name in enumerate("ab", 1)}
    return check_job(ModelCheckpoint(base), experts)


def test_a_list_of_all_views_holds_no_weights(job, monkeypatch):
    read = []
    plain = ModelCheckpoint.read
    monkeypatch.setattr(ModelCheckpoint, "read", lambda self, name: read.append(name) or plain(self, name))
    settings = MediatorSettings(experts=dict.fromkeys("ab", "x"), merge_method="karcher", fallback="backbone")
    method = plan_merge(job, settings).method
    views = list(ModelViews(method, job))
    assert not read
    transposed = [view for view in views if view.context.is_transposed]
    assert len(transposed) == 8
    for view in transposed:
        whole, _ = view.whole()
        tiles = torch.cat([vectors for vectors, _ in view.tiles()], dim=1)
        torch.testing.assert_close(tiles, whole.transpose(1, 2))
    assert set(read) == {view.context.name for view in transposed}


PEAK = """
import sys
from pathlib import Path
import torch
from mediator_peft.methods.merging import MERGE_METHODS, TensorContext
from mediator_peft.methods.merging.row import LINEAR

name, num_experts, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vectors, base = torch.randn(num_experts, size, size), torch.randn(size, size)
context = TensorContext("w", tuple("abcdef"[:num_experts]), (size, size), kind=LINEAR, block=0, base=base)
MERGE_METHODS[name](vectors[:, :64, :64].contiguous(), context)

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
MERGE_METHODS[name](vectors, context)
print((resident("VmHWM") - before) / 4 / size**2)
"""


@pytest.mark.release
@pytest.mark.skipif(sys.platform != "linux", reason="resets the largest resident memory through /proc")
@pytest.mark.parametrize(("name", "size"), [("ties", 4096), ("consensus_ties", 4096), ("pcb", 4096), ("opcm", 1536)])
def test_the_work_of_a_row_is_about_what_it_holds(name, size):
    command = [sys.executable, "-c", PEAK, name, "3", str(size)]
    found = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    predicted = MERGE_METHODS[name].work_numbers(3, 1, 1, is_linear=True)
    assert 0.8 * predicted < found < 1.25 * predicted


def test_predicted_work_is_that_of_the_tensor_at_hand():
    tsv, ties, average = (MERGE_METHODS[name] for name in ("tsv", "ties", "average"))
    assert average.work_numbers(3, 10, 10, True) == 0
    assert tsv.work_numbers(3, 10, 20, True) > 2 * tsv.work_numbers(3, 10, 20, False) > 0
    assert MERGE_METHODS["regmean"].work_numbers(3, 10, 20, True) == 14 * 400
    assert MERGE_METHODS["regmean"].work_numbers(3, 10, 20, False) == 0
    assert ties.work_numbers(6, 10, 20, True) > ties.work_numbers(3, 10, 20, True)
