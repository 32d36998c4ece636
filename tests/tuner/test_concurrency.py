"""Threads, coroutines and forked processes on one model: none sees another's experts, nor weights half merged."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_prompts

from .conftest import build_and_fit

SETTINGS = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)


class Answering:
    """Threads that answer under one expert, over and over, for as long as the block lasts."""

    def __init__(self, model, name="math", num_threads=2):
        self.model, self.name = model, name
        self.stop, self.faults = threading.Event(), []
        self.threads = [threading.Thread(target=self.work) for _ in range(num_threads)]

    def work(self):
        prompts = random_prompts(1)
        try:
            with self.model.use_experts(self.name), torch.no_grad():
                while not self.stop.is_set():
                    self.model(input_ids=prompts)
        except Exception as fault:
            self.faults.append(fault)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        layer = next(iter(self.model.routed_layers().values()))
        deadline = time.monotonic() + 30
        while not layer.merged_bytes and time.monotonic() < deadline:
            time.sleep(0.001)
        assert layer.merged_bytes, "nothing is merged"
        return self

    def __exit__(self, *args):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert not self.faults


def backbone_of(model):
    return {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in model.base_model.model.state_dict().items()
        if "mediator" not in name
    }


def assert_same(found, expected):
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not wrong, f"{len(wrong)} of {len(expected)} tensors differ: {wrong[:3]}"


def state(model):
    return backbone_of(model)


def copied(model):
    return backbone_of(copy.deepcopy(model))


def pickled(model):
    return backbone_of(pickle.loads(pickle.dumps(model)))


def slowly_read_state(model):
    found = model.base_model.model.state_dict()
    time.sleep(0.05)
    return {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in found.items()}


def slowly_read_parameters(model):
    with model.reading_weights():
        found = dict(model.base_model.model.named_parameters(remove_duplicate=False))
        time.sleep(0.05)
        return {name.replace(".base_layer.", "."): tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("read", [state, slowly_read_state, slowly_read_parameters, copied, pickled])
@pytest.mark.parametrize("arch", ["llama", "llama_tied"])
def test_weights_are_read_unmerged_while_threads_answer(tmp_path, topics, tokenizer, read, arch):
    settings = {"target_modules": "all-linear"} if arch == "llama" else {"target_modules": ["embed_tokens", "q_proj"]}
    model = build_and_fit(tmp_path, topics, tokenizer, arch, **settings)
    expected = backbone_of(model)
    with Answering(model):
        for _ in range(5):
            found = read(model)
            assert_same(found, {name: tensor for name, tensor in expected.items() if name in found})


def test_a_backbone_is_saved_unmerged_while_threads_answer(tmp_path, model):
    expected = backbone_of(model)
    with Answering(model):
        for number in range(3):
            model.base_model.adapter_files.backbone_path = None
            model.save_pretrained(tmp_path / f"saved{number}")
    for number in range(3):
        files = list((tmp_path / f"saved{number}" / "backbone").glob("*.safetensors"))
        assert files
        for file in files:
            assert_same(expected, load_file(file))


def test_an_expert_is_added_against_the_plain_backbone_while_threads_answer(tmp_path, model):
    from tiny import fine_tuned, tiny_model

    fine_tuned(tiny_model(), seed=5).save_pretrained(tmp_path / "extra")
    model.add_expert("extra", str(tmp_path / "extra"), reset_router=True)
    with torch.no_grad():
        expected = model(input_ids=random_prompts(), expert_weights="extra").logits
    model.remove_expert("extra")
    with Answering(model):
        model.add_expert("extra", str(tmp_path / "extra"), reset_router=True)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=random_prompts(), expert_weights="extra").logits, expected)


def test_layers_merge_again_after_reading(model):
    with model.reading_weights():
        pass
    with model.use_experts("math"), torch.no_grad():
        model(input_ids=random_prompts())
        assert any(layer.merged_bytes for layer in model.routed_layers().values())
        with model.reading_weights():
            model(input_ids=random_prompts())
            assert not any(layer.merged_bytes for layer in model.routed_layers().values())


def test_several_threads_read_and_answer_at_once(model):
    expected = backbone_of(model)
    with Answering(model), ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: backbone_of(model), range(6)):
            assert_same(found, expected)
