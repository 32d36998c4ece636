"""FSDP2: parameters in shards, gathered a block at a time, under the same routes as whole ones."""

import multiprocessing
from itertools import product

import pytest
import torch
from peft import PeftModel
from reference import load
from tiny import random_prompts
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mediator_peft import load_mediator
from mediator_peft.errors import UnsupportedError
from mediator_peft.structure import find_blocks
from mediator_peft.tuner import forward
from tests.architectures import PROMPT, round_trip

from .conftest import build_and_fit

SETTINGS = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)


def answers_of(model, prompts):
    """What each way of asking gives: logits, or generated tokens."""
    with torch.no_grad():
        found = {name: model(prompts, expert_weights=name).logits for name in ("math", "code", "base")}
        found["a row each"] = model(prompts, expert_weights=["math", "code"]).logits
        found["routed pass"] = model(prompts).logits
        found["named"] = model.generate(prompts, expert_weights="math", **SETTINGS)
        found["routed"] = model.generate(prompts, **SETTINGS)
        with model.use_experts("code"):
            found["block"] = model.generate(prompts, **SETTINGS)
        for execution in ("merged", "sparse", "dense"):
            model.set_execution(execution)
            found[execution] = model.generate(prompts, expert_weights={"math": 0.4, "code": 0.5}, **SETTINGS)
        model.set_execution(None)
        found["again"] = model(prompts, expert_weights="base").logits
    return found


def shard(model, root, num_processes):
    mesh = init_device_mesh("cpu", (num_processes,))
    whole = model.get_base_model()
    for block in find_blocks(whole):
        fully_shard(block, mesh=mesh)
    fully_shard(whole if root == "base model" else model, mesh=mesh)
    assert all(type(parameter).__name__ == "DTensor" for parameter in whole.parameters())


def compare(rank, num_processes, store, model, root, tmp_path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    try:
        prompts = random_prompts(2 * num_processes, seed=3)[2 * rank : 2 * rank + 2]
        expected = answers_of(model, prompts)
        routes = model.route(prompts).expert_weights
        assert not torch.equal(expected["math"], expected["base"])
        shard(model, root, num_processes)
        if root != "base model":
            with pytest.raises(UnsupportedError, match="register_fsdp_forward_method"):
                model.generate(prompts, expert_weights="math", **SETTINGS)
            register_fsdp_forward_method(model, "generate")
        found = answers_of(model, prompts)
        for way, answer in expected.items():
            torch.testing.assert_close(found[way], answer, msg=lambda text, way=way: f"{way}: {text}")
        if root == "base model":
            torch.testing.assert_close(model.route(prompts).expert_weights, routes)
        for write in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(UnsupportedError, match="sharded"):
                write(expert_weights="math")
        with pytest.raises(UnsupportedError, match="sharded"):
            model.cache_merged_experts(["math"])
        with pytest.raises(UnsupportedError, match="sharded"):
            model.save_pretrained(tmp_path)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "root"), [("llama", "base model"), ("gpt2", "model with adapter")])
def test_one_process(tmp_path, topics, tokenizer, arch, root):
    model = build_and_fit(tmp_path, topics, tokenizer, arch)
    compare(0, 1, distributed.HashStore(), model, root, tmp_path / "saved")


@pytest.mark.slow
def test_two_processes(tmp_path, topics, tokenizer):
    model = build_and_fit(tmp_path, topics, tokenizer, routed_layers="all")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_in_a_child, args=(rank, tmp_path, model)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def _in_a_child(rank, path, model):
    compare(rank, 2, distributed.FileStore(str(path / "store"), 2), model, "base model", path / f"saved {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", pytest.param("mamba", marks=pytest.mark.release)])
def test_weights_that_are_read_past_a_layer(tmp_path, kind):
    """Fused experts, and state spaces that compute with a layer's weight."""
    assert round_trip(kind, tmp_path).status == "works"
    model, _ = load_mediator(tmp_path / "out")
    with torch.no_grad():
        expected = {name: model(PROMPT, expert_weights=name).logits for name in ("math", "code", "base")}
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh, whole = init_device_mesh("cpu", (1,)), model.get_base_model()
            for block in find_blocks(whole):
                fully_shard(block, mesh=mesh)
            fully_shard(whole, mesh=mesh)
            for _, name in product(range(2), expected):
                torch.testing.assert_close(model(PROMPT, expert_weights=name).logits, expected[name])
            model.generate(PROMPT, expert_weights="math", **SETTINGS)
        finally:
            distributed.destroy_process_group()


def test_tensor_parallelism_is_refused(tmp_path, topics, tokenizer):
    build_and_fit(tmp_path, topics, tokenizer)
    plain = load(tmp_path / "out")
    plain._tp_size = 2
    with pytest.raises(UnsupportedError, match="tensor parallelism"):
        PeftModel.from_pretrained(plain, str(tmp_path / "out" / "mediator"))


def test_shards_are_looked_for_once_a_pass(model, monkeypatch):
    asked = []
    monkeypatch.setattr(forward, "is_sharded", lambda whole: bool(asked.append(whole)))
    with torch.no_grad():
        for expert_weights in ("math", None):
            model(random_prompts(2, seed=3), expert_weights=expert_weights)
    assert asked == [model.get_base_model()] * 2
