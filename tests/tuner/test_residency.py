"""Many experts, few of them in memory."""

import copy
import errno
import gc
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from tiny import random_prompts, tiny_model

from mediator_peft import MediatorConfig, load_mediator
from mediator_peft.bank.expert_store import ExpertStore
from mediator_peft.bank.sparse_delta import SparseDelta
from mediator_peft.errors import ConfigError, OutputError
from mediator_peft.methods.encoding.bitmaps import pack_bits

NUM_EXPERTS = 100


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """A tiny model with a hundred random experts."""
    return saved(tmp_path_factory.mktemp("hundred"), NUM_EXPERTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same with as many as most tests need."""
    return saved(tmp_path_factory.mktemp("ten"), 10)


def saved(folder, num_experts):
    torch.manual_seed(0)
    backbone = tiny_model()
    names = [f"expert {number}" for number in range(num_experts)]
    layers = [name for name, module in backbone.named_modules() if name.endswith("_proj")]
    config = MediatorConfig(
        experts=dict.fromkeys(names, ""), expert_names=names, routed_modules=layers, num_blocks=3, fallback="backbone"
    )
    model = get_peft_model(backbone, config)
    for layer in model.base_model.routed_layers().values():
        for name in names:
            kept = torch.rand(layer.shape) < 0.2
            parts = {
                "signs": pack_bits(torch.rand(int(kept.sum())) < 0.5),
                "scales": (torch.rand(layer.shape[0]) * 0.2).bfloat16(),
            }
            layer.bank("default").put(name, SparseDelta(layer.shape, "sign", pack_bits(kept), parts))
    model.save_pretrained(folder)
    return folder


def pages_of(folder):
    """Bytes in memory of the files mapped from a folder, by the kernel's own account."""
    total, counts = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                counts = str(folder) in line
            elif counts and words[0] == "Rss:":
                total += 1024 * int(words[1])
    return total


@pytest.mark.slow
@torch.no_grad()
def test_a_hundred_experts_give_the_same_with_four_in_memory(hundred, tmp_path):
    prompts = random_prompts(2)
    everything, _ = load_mediator(hundred)
    few, _ = load_mediator(hundred, max_resident_experts=4, expert_folder=tmp_path / "experts")
    store = few.base_model.expert_store
    assert pages_of(tmp_path / "experts") == 0, "loading leaves experts in memory"
    sizes = []
    for number in [*range(NUM_EXPERTS), 3, 99, 3]:
        name = f"expert {number}"
        expected = everything(input_ids=prompts, expert_weights=name).logits
        assert torch.equal(few(input_ids=prompts, expert_weights=name).logits, expected)
        assert store.resident[-1] == name
        assert len(store.resident) <= 4
        sizes.append(pages_of(tmp_path / "experts"))
    assert 0 < max(sizes[50:]) <= 2 * max(sizes[:8]), "memory grows with the number of experts"
    assert sorted(path.name for path in tmp_path.joinpath("experts").iterdir()) == [store._folder.name]


@torch.no_grad()
def test_one_batch_may_need_more_experts_than_the_limit(folder):
    prompts = random_prompts(6)
    names = [f"expert {number}" for number in range(6)]
    everything, _ = load_mediator(folder)
    few, _ = load_mediator(folder, max_resident_experts=2)
    expected = everything(input_ids=prompts, expert_weights=names).logits
    assert torch.equal(few(input_ids=prompts, expert_weights=names).logits, expected)
    assert set(few.base_model.expert_store.resident) == set(names)
    few(input_ids=prompts, expert_weights="expert 9")
    assert len(few.base_model.expert_store.resident) == 2


@pytest.mark.slow
def test_threads_that_push_each_others_experts_out_get_their_own_answers(hundred):
    few, _ = load_mediator(hundred, max_resident_experts=1)
    prompts = random_prompts(2)
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    names = [f"expert {number}" for number in range(0, 40, 10)]
    expected = [few.generate(prompts, expert_weights=name, **settings) for name in names]
    faults = []

    def work(number):
        for turn in range(6):
            which = (number + turn) % len(names)
            if not torch.equal(few.generate(prompts, expert_weights=names[which], **settings), expected[which]):
                faults.append((number, turn))

    with ThreadPoolExecutor(4) as pool:  # a thread of its own would keep what it raises to itself
        list(pool.map(work, range(4)))
    assert not faults


@pytest.mark.slow
def test_the_limit_is_not_saved_and_saving_reads_all_experts(folder, tmp_path):
    few, _ = load_mediator(folder, max_resident_experts=2)
    few.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["max_resident_experts"] is None
    again, _ = load_mediator(tmp_path / "again")
    everything, _ = load_mediator(folder)
    assert again.base_model.expert_store is None
    theirs = everything.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())


def test_files_go_with_the_store(tmp_path):
    store = ExpertStore(1, tmp_path)
    store.make_room({"a": 64, "b": 64})
    kept = store.keep("a", torch.arange(5, dtype=torch.int16))
    store.release()
    store.use(["a"])
    store.use(["b"])
    assert store.resident == ["b"]
    del store
    assert list(tmp_path.iterdir()) == []
    assert kept.tolist() == [0, 1, 2, 3, 4], "a tensor does not outlive its store"


def test_a_forked_child_leaves_its_parents_files(tmp_path):
    store = ExpertStore(1, tmp_path)
    store.make_room({"math": 64})
    child = os.fork()
    if child == 0:
        try:
            del store
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["0.bin"]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "two"])
def test_a_limit_that_is_no_number_of_experts_is_refused(folder, limit):
    with pytest.raises(ConfigError, match="max_resident_experts"):
        load_mediator(folder, max_resident_experts=limit)


def test_a_pinned_expert_stays_in_memory(folder, tmp_path):
    pinned = {"max_resident_experts": 2, "expert_folder": tmp_path}
    model, _ = load_mediator(folder, pinned_experts=["expert 7"], **pinned)
    for name in ("expert 1", "expert 2", "expert 3"):
        model(random_prompts(1), expert_weights=name)
        assert set(model.base_model.expert_store.resident) == {"expert 7", name}
    model.save_pretrained(tmp_path / "again")
    assert "pinned_experts" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    with pytest.raises(ConfigError, match="stranger"):
        load_mediator(folder, pinned_experts=["stranger"], **pinned)
    with pytest.raises(ConfigError, match="leave no room"):
        load_mediator(folder, pinned_experts=["expert 1", "expert 2"], **pinned)


@torch.no_grad()
@pytest.mark.slow
def test_a_copy_shares_the_files_and_a_pickle_does_without_them(folder):
    prompts = random_prompts(1)
    model, _ = load_mediator(folder, max_resident_experts=2)
    expected = model(input_ids=prompts, expert_weights="expert 7").logits
    shared = copy.deepcopy(model)
    alone = pickle.loads(pickle.dumps(model))
    assert shared.base_model.expert_store is model.base_model.expert_store
    assert alone.base_model.expert_store is None
    del model
    for other in (shared, alone):
        assert torch.equal(other(input_ids=prompts, expert_weights="expert 7").logits, expected)


def test_a_full_disk_is_told_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        ExpertStore(1, tmp_path / "file")
    store = ExpertStore(1, tmp_path)
    store.make_room({"math": 5000})
    # Blocks are there, not only a length: writing to a hole on a full disk is a bus error.
    assert (store._folder / "0.bin").stat().st_blocks * 512 >= 5000
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        store.make_room({"code": 5000})
