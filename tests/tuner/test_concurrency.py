"""Threads, coroutines and forked processes on one model: none sees another's experts, nor weights half merged."""

import asyncio
import contextvars
import copy
import inspect
import json
import os
import pickle
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import fine_tuned, random_prompts, tiny_model, write_tiny_checkpoints
from tokenizer import topic_texts
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, TextIteratorStreamer

from mediator_peft import MediatorConfig, get_mediator_model, load_mediator
from mediator_peft.errors import RouterNotFittedError, RoutingError, UnsupportedError
from mediator_peft.tuner.config import FitSettings

from .conftest import build_and_fit

# Transformers 5.24 has renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
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
            with model.base_model.adapter_files.taking_backbone_along():
                model.save_pretrained(tmp_path / f"saved{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a merged weight would count as a changed backbone
            model.save_pretrained(tmp_path / "beside")
    for number in range(3):
        files = list((tmp_path / f"saved{number}" / "backbone").glob("*.safetensors"))
        assert files
        for file in files:
            assert_same(expected, load_file(file))


def test_an_expert_is_added_against_the_plain_backbone_while_threads_answer(tmp_path, model):
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


NAMES = ["math", "code", None, {"math": 0.5, "base": 0.5}]


def answers_of(model, prompts):
    return [model.generate(prompts, expert_weights=[name], **SETTINGS) for name in NAMES]


def test_coroutines_keep_their_own_experts(model):
    prompts = random_prompts(1)
    expected = answers_of(model, prompts)
    assert not torch.equal(expected[0], expected[1])

    async def ask(number):
        with model.use_experts([NAMES[number % len(NAMES)]]):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(model.generate(prompts, **SETTINGS))
            return found

    async def ask_all():
        return await asyncio.gather(*(ask(number) for number in range(8)))

    for number, found in enumerate(asyncio.run(ask_all())):
        assert all(torch.equal(tokens, expected[number % len(NAMES)]) for tokens in found), NAMES[number % len(NAMES)]
    assert not model.board.has_requests


def test_a_thread_of_asyncio_carries_the_experts_along_and_a_plain_one_does_not(model):
    prompts = random_prompts(1)
    with torch.no_grad():
        code, routed = model(input_ids=prompts, expert_weights="code").logits, model(input_ids=prompts).logits
    assert not torch.allclose(code, routed)

    @torch.no_grad()
    def logits():
        return model(input_ids=prompts).logits

    async def ask():
        with model.use_experts("code"):
            return await asyncio.gather(*(asyncio.to_thread(logits) for _ in range(4)))

    for found in asyncio.run(ask()):
        torch.testing.assert_close(found, code, rtol=1e-4, atol=1e-4)
    with model.use_experts("code"), ThreadPoolExecutor(1) as pool:
        copied_context = contextvars.copy_context()
        torch.testing.assert_close(pool.submit(copied_context.run, logits).result(), code, rtol=1e-4, atol=1e-4)
        with pytest.warns(UserWarning, match="does not see it"):
            torch.testing.assert_close(pool.submit(logits).result(), routed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copied_context.run(logits), code, rtol=1e-4, atol=1e-4)
    assert not any(layer.merged_bytes for layer in model.routed_layers().values())


def test_a_streaming_thread_answers_under_its_own_experts(model, tokenizer):
    prompts = random_prompts(1)
    expected = model.generate(prompts, expert_weights="code", **SETTINGS)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    settings = {**SETTINGS, "streamer": streamer, "expert_weights": "code"}
    with model.use_experts("math"):
        thread = threading.Thread(target=model.generate, args=(prompts,), kwargs=settings)
        thread.start()
        own = model.generate(prompts, **SETTINGS)
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected[0, prompts.shape[1] :])
    assert torch.equal(own, model.generate(prompts, expert_weights="math", **SETTINGS))


def overlapping_blocks(model):
    """Two generators, each inside its own block, the second begun inside the first."""

    def block(name):
        with model.use_experts(name):
            yield

    blocks = block("math"), block("code")
    for each in blocks:
        next(each)
    return blocks


@pytest.mark.filterwarnings("ignore:use_experts blocks overlapped")
def test_blocks_of_interleaved_generators_end_in_any_order(model):
    first, second = overlapping_blocks(model)
    contextvars.copy_context().run(first.close)
    second.close()
    first.close()
    assert not model.board._open


def extra_expert(folder):
    fine_tuned(tiny_model(), seed=5).save_pretrained(folder / "extra")
    return str(folder / "extra")


def test_experts_are_kept_by_name_through_edits(tmp_path, model):
    prompts = random_prompts(1)
    with torch.no_grad():
        code = model(input_ids=prompts, expert_weights="code").logits
        with model.use_experts("code"):
            filled = model(input_ids=prompts, use_cache=True).past_key_values
            model.add_expert("extra", extra_expert(tmp_path), reset_router=True)
            torch.testing.assert_close(model(input_ids=prompts).logits, code, rtol=1e-4, atol=1e-4)
            model.remove_expert("math")
            torch.testing.assert_close(model(input_ids=prompts).logits, code, rtol=1e-4, atol=1e-4)
            longer = torch.cat([prompts, prompts], dim=1)
            expected = model(input_ids=longer).logits[:, prompts.shape[1] :]
        found = model(input_ids=prompts, past_key_values=filled).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_removed_expert_is_refused_and_never_another(model):
    prompts = random_prompts(1)
    with torch.no_grad():
        filled = model(input_ids=prompts, use_cache=True, expert_weights="math").past_key_values
        with model.use_experts("math"):
            model.remove_expert("math")
            with pytest.raises(RoutingError, match="removed"):
                model(input_ids=prompts)
            with pytest.raises(RoutingError, match="removed"):
                model.generate(prompts, **SETTINGS)
        with pytest.raises(RoutingError, match="removed"):
            model(input_ids=prompts, past_key_values=filled)
    assert not model.board.has_requests


def replaced(model, saved, tmp_path):
    model.remove_expert("math")
    model.add_expert("math", extra_expert(tmp_path), reset_router=True)


def other_adapter(model, saved, tmp_path):
    model.load_adapter(saved, "other", is_trainable=False)
    model.set_adapter("other")


def same_adapter_again(model, saved, tmp_path):
    other_adapter(model, saved, tmp_path)
    model.delete_adapter("default")
    model.load_adapter(saved, "default", is_trainable=False)
    model.set_adapter("default")


@torch.no_grad()
@pytest.mark.parametrize("change", [replaced, other_adapter, same_adapter_again])
def test_a_cache_does_not_go_on_with_another_expert_of_the_same_name(change, tmp_path, model):
    prompts = random_prompts(1)
    model.save_pretrained(tmp_path / "saved")
    filled = model(input_ids=prompts, use_cache=True, expert_weights="math")[CACHE]
    kept = pickle.loads(pickle.dumps(filled))
    change(model, str(tmp_path / "saved"), tmp_path)
    for cache in (filled, kept):
        with pytest.raises(RoutingError, match="replaced since"):
            model(input_ids=prompts, **{CACHE: cache})
        with pytest.raises(RoutingError, match="replaced since"):
            model.generate(torch.cat([prompts, prompts], 1), **{CACHE: cache}, **SETTINGS)
    assert not model.board.has_requests


@torch.no_grad()
def test_a_block_does_not_go_on_with_another_expert_of_the_same_name(tmp_path, model):
    prompts = random_prompts(1)
    with model.use_experts("code"):
        kept = model(input_ids=prompts).logits
        with model.use_experts("math"):
            replaced(model, None, tmp_path)
            for _ in range(2):
                with pytest.raises(RoutingError, match="replaced since"):
                    model(input_ids=prompts)
        torch.testing.assert_close(model(input_ids=prompts).logits, kept, rtol=1e-4, atol=1e-4)


def with_names(model, ids, cache, **settings):
    return model(input_ids=ids, **{CACHE: cache}, **settings)


def by_position(model, ids, cache, **settings):
    return model.base_model(ids, None, None, cache, **settings)  # PEFT gives the places other names


def as_tuple(model, ids, cache, **settings):
    return model(input_ids=ids, **{CACHE: cache}, return_dict=False, **settings)


def under_the_former_name(model, ids, cache, **settings):
    return model(input_ids=ids, past_key_values=cache, **settings)


@torch.no_grad()
@pytest.mark.parametrize("ask", [with_names, by_position, as_tuple, under_the_former_name])
def test_a_cache_keeps_its_route_however_it_is_given(ask, model):
    """The experts go by the prompt: the last token alone would be routed elsewhere, and a random router refuses."""
    prompts, token = random_prompts(1), torch.tensor([[60]])
    cache = DynamicCache(config=model.config)
    ask(model, prompts, cache, expert_weights="code")
    found = ask(model, token, cache)[0][:, -1:]
    expected = model(input_ids=torch.cat([prompts, token], 1), expert_weights="code").logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_the_plain_backbone_is_not_continued_by_routing(model):
    prompts, token = random_prompts(1), torch.tensor([[60]])
    with model.disable_adapter():
        cache = model(input_ids=prompts, use_cache=True)[CACHE]
    for ask in (lambda: model(input_ids=token, **{CACHE: cache}), lambda: model.generate(
        torch.cat([prompts, token], 1), **{CACHE: cache}, **SETTINGS
    )):  # fmt: skip
        with pytest.raises(RoutingError, match="plain backbone"):
            ask()
    assert cache.get_seq_length() == prompts.shape[1]
    model(input_ids=token, **{CACHE: cache}, expert_weights="code")


@torch.no_grad()
def test_a_mask_by_position_counts(model):
    row = random_prompts(1)
    padded = torch.cat([row, torch.full((1, 40), 7)], dim=1)
    mask = (torch.arange(padded.shape[1]) < row.shape[1]).long()[None]
    torch.testing.assert_close(model(padded, mask).logits, model(input_ids=padded, attention_mask=mask).logits)


@pytest.mark.slow
def test_edits_beside_requests_give_the_right_expert_or_our_error(tmp_path, model):
    """Threads ask by name and by route while an expert comes and goes."""
    prompts, path = random_prompts(1), extra_expert(tmp_path)
    expected = {name: model.generate(prompts, expert_weights=name, **SETTINGS) for name in ("math", "code")}
    stop, faults, wrong, counts = threading.Event(), [], [], [0, 0]

    def ask(number):
        name = ("math", "code")[number % 2]
        while not stop.is_set():
            try:
                tokens = model.generate(prompts, expert_weights=name, **SETTINGS)
                counts[0] += 1
                if not torch.equal(tokens, expected[name]):
                    wrong.append(name)
                model.route(prompts)
                with torch.no_grad():
                    model(input_ids=prompts)
            except (RoutingError, RouterNotFittedError):
                counts[1] += 1
            except Exception as fault:
                faults.append(fault)
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        model.add_expert("extra", path, reset_router=True)
        model.remove_expert("math")
        model.add_expert("math", str(tmp_path / "checkpoints" / "math"), reset_router=True)
        model.remove_expert("extra")
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert "code" not in wrong
    assert counts[0] > 0


def test_features_that_are_not_finite_go_to_the_base_and_requests_close(model):
    prompts = random_prompts(2)
    weight = model.get_input_embeddings().weight
    whole = weight.detach().clone()
    token = int(prompts[0, 3])
    assert token not in prompts[1]
    with torch.no_grad():
        expected = model.route(prompts[1:]).expert_weights
        weight[token] = torch.nan
        with pytest.warns(UserWarning, match="NaN or infinity"):
            route = model.route(prompts)
    assert route.is_ood[0]
    assert route.expert_weights[0].tolist() == [0.0, 0.0, 1.0]
    assert route.uncertainty[0] == 1
    torch.testing.assert_close(route.expert_weights[1:], expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        model.generate(prompts, **SETTINGS)
    weight.data.copy_(whole)
    assert not model.board._open
    with torch.no_grad(), model.use_experts("math"):
        model(input_ids=prompts)
        assert any(layer.merged_bytes for layer in model.routed_layers().values()), "nothing merges any more"


def test_a_request_with_weights_that_are_not_finite_is_closed(model):
    with model.board.open_request(torch.tensor([[torch.nan, 0.0, 0.0]]), ["math", "code", "base"]):
        pass
    assert not model.board._open


def test_a_prompt_of_padding_only_goes_to_the_base(model):
    ids = torch.tensor([[0, 0, 0, 0], [0, 7, 9, 12]])
    route = model.route(ids, (ids != 0).long())
    assert route.expert_weights[0].tolist() == [0.0, 0.0, 1.0]
    assert route.is_ood[0]
    alone = model.route(ids[1:, 1:])
    torch.testing.assert_close(route.expert_weights[1:], alone.expert_weights, rtol=1e-4, atol=1e-4)


def test_who_routes_while_the_router_is_fitted_anew_has_the_old_or_the_new_one(model, topics, tokenizer):
    prompts = random_prompts(3)
    swapped = {"math": topics["code"], "code": topics["math"]}
    options = dict(augmented=False, hard_negatives=False)
    expected = []
    for texts in (topics, swapped):
        model.fit_router(texts, tokenizer, **options)
        expected.append(model.route(prompts).expert_weights)
    assert not torch.allclose(*expected)
    stop, strange, num_routes = threading.Event(), [], [0]

    def ask():
        while not stop.is_set():
            weights = model.route(prompts).expert_weights
            num_routes[0] += 1
            if not any(torch.allclose(weights, one, atol=1e-5) for one in expected):
                strange.append(weights)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(3):
        model.fit_router(topics, tokenizer, **options)
        model.fit_router(swapped, tokenizer, **options)
    stop.set()
    thread.join()
    assert num_routes[0] > 0
    assert not strange, f"{len(strange)} of {num_routes[0]} routes belong to neither router"


def test_a_failed_fit_leaves_the_old_router(model, topics, tokenizer, monkeypatch):
    prompts = random_prompts(3)
    expected = model.route(prompts).expert_weights

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(type(model.router), "set_known", fail)
    with pytest.raises(ZeroDivisionError):
        model.fit_router({"math": topics["code"], "code": topics["math"]}, tokenizer)
    assert torch.equal(model.route(prompts).expert_weights, expected)


def test_a_changed_backbone_gives_new_features(tmp_path, model, topics, tokenizer):
    options = dict(augmented=False, hard_negatives=False, cache_folder=tmp_path / "features")
    prompts = random_prompts(3)
    model.fit_router(topics, tokenizer, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] *= -0.5
    model.fit_router(topics, tokenizer, **options)
    found = model.route(prompts).expert_weights
    model.prompt_router.feature_caches.clear()
    model.fit_router(topics, tokenizer, **{**options, "cache_folder": None})
    torch.testing.assert_close(found, model.route(prompts).expert_weights)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_while_threads_answer_does_not_hang(tmp_path, model):
    prompts = random_prompts(1)
    expected = model.generate(prompts, expert_weights="code", **SETTINGS)
    found = []
    with Answering(model, num_threads=3):
        for _ in range(8):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    right = torch.equal(model.generate(prompts, expert_weights="code", **SETTINGS), expected)
                    with model.use_experts("math"), torch.no_grad():
                        model(input_ids=prompts)
                        merges = any(layer.merged_bytes for layer in model.routed_layers().values())
                    code = 0 if right and merges else 2
                finally:
                    os._exit(code)
            found.append(ending(child))
    assert found == [0] * len(found), "-1: hung, 1: an exception, 2: wrong tokens or nothing merged"


def ending(child):
    """Exit code of a child; -1 where it had to be killed."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def test_continuous_batching_is_refused_by_name(model):
    with pytest.raises(UnsupportedError, match="generate_batch"):
        model.generate_batch([[7, 9, 12]])
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model.continuous_batching_context_manager()


@torch.no_grad()
def test_packed_batches_and_masks_of_four_dimensions_are_refused_by_name(model):
    prompts = random_prompts(1, length=8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(UnsupportedError, match="packed"):
        model(input_ids=prompts, position_ids=packed)
    square = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedError, match="attention mask"):
        model(input_ids=prompts, attention_mask=square)
    with pytest.raises(UnsupportedError, match="attention mask"):
        model(input_ids=prompts, attention_mask={"full_attention": square})
    for ask in (model.generate, model.route):
        with pytest.raises(UnsupportedError, match="attention mask"):
            ask(prompts, attention_mask=square)
    with pytest.raises(RoutingError, match="one entry a token"):
        model.generate(prompts, attention_mask=torch.ones(1, 5, dtype=torch.long))
    singles = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    for packing in ({"position_ids": singles}, {"seq_idx": numbers}):
        with pytest.raises(UnsupportedError, match="packed"):
            model(input_ids=prompts, **packing)
    model(input_ids=prompts, position_ids=packed, expert_weights="math")
    model(input_ids=prompts, attention_mask=square, expert_weights="math")
    model(input_ids=prompts, position_ids=torch.arange(8)[None])


@torch.no_grad()
def test_a_forward_pass_without_a_mask_is_not_routed_on_padding(model, tokenizer):
    row = torch.tensor(tokenizer(topic_texts(5, 45, 1, seed=3))["input_ids"])
    padded = torch.cat([row, torch.zeros(1, 40, dtype=torch.long)], dim=1)
    weights = model.route(row).expert_weights
    expected = model(input_ids=padded, expert_weights=weights).logits
    found = model(input_ids=padded).logits
    torch.testing.assert_close(found[:, : row.shape[1]], expected[:, : row.shape[1]], rtol=1e-4, atol=1e-4)


def test_a_returned_cache_carries_its_route(model, tokenizer):
    """``generate(3)`` and ``generate(1)`` on its cache give the four tokens of ``generate(4)``."""
    row = torch.tensor(tokenizer(topic_texts(5, 45, 1, seed=3))["input_ids"])
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    routes = []
    judge = model.prompt_router.judged_table
    model.prompt_router.judged_table = lambda *args: routes.append(1) or judge(*args)
    first = model.generate(row, max_new_tokens=3, return_dict_in_generate=True, **settings)
    assert len(routes) == 1
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=1, **settings)
    assert len(routes) == 1, "the prompt was routed again, with the answer in view"
    assert torch.equal(second, model.generate(row, max_new_tokens=4, **settings))


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long), torch.tensor([7, 9]), [[7, 9]]],
    ids=["no token", "no row", "no batch", "list"],
)
def test_ids_without_a_prompt_are_refused_by_name(model, ids):
    for ask in (model.route, model.generate):
        with pytest.raises(RoutingError, match="at least one token"):
            ask(ids)
    assert not model.board.has_requests


@torch.no_grad()
def test_rows_of_a_cache_take_their_experts_along(model):
    prompts, token = random_prompts(2), torch.tensor([[60], [61]])
    filled = model(input_ids=prompts, use_cache=True, expert_weights=["math", "code"]).past_key_values
    kept = pickle.loads(pickle.dumps(filled))
    expected = [
        model(input_ids=torch.cat([prompts[[1 - row]], token[[row]]], 1), expert_weights=[name]).logits[:, -1:]
        for row, name in enumerate(["code", "math"])
    ]
    for cache in (filled, copy.deepcopy(filled)):
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        cache.reorder_cache(torch.tensor([1, 0]))
    kept.batch_select_indices(torch.tensor([1]))
    kept.batch_repeat_interleave(2)
    found = model(input_ids=token[[0, 0]], past_key_values=kept).logits
    torch.testing.assert_close(found, expected[0].expand_as(found), rtol=1e-4, atol=1e-4)


def test_a_thread_that_does_not_see_the_block_it_was_started_in_says_so_once(model):
    prompts = random_prompts(1)
    with model.use_experts("code"), ThreadPoolExecutor(1) as pool:
        with pytest.warns(UserWarning, match="does not see it"):
            pool.submit(model, input_ids=prompts).result()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pool.submit(model, input_ids=prompts).result()
            pool.submit(model, input_ids=prompts, expert_weights="math").result()


def test_generators_whose_blocks_overlap_are_told_so(model):
    first, second = overlapping_blocks(model)
    with pytest.warns(UserWarning, match="overlapped"):
        first.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        second.close()


def test_a_refused_wrap_leaves_the_model_as_it_was(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, arch="gemma")
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    prompts = random_prompts(1)
    with torch.no_grad():
        expected = base(input_ids=prompts).logits
    refused = MediatorConfig(experts=experts, target_modules=["embed_tokens", "q_proj"])
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="does more than look rows up"):
            get_mediator_model(base, refused)
    assert list(before) == list(base.state_dict())
    assert_same(base.state_dict(), before)
    with torch.no_grad():
        assert torch.equal(base(input_ids=prompts).logits, expected)
    model = get_mediator_model(base, MediatorConfig(experts=experts, target_modules=["q_proj"]))
    with torch.no_grad(), model.use_experts("math"):
        model(input_ids=prompts)


@pytest.mark.slow
def test_the_short_form_of_the_stress_script_finds_nothing_wrong(tmp_path):
    from stress.concurrent_steps import run

    counts = run(100, tmp_path)
    assert counts["right"] > 50
    assert not [outcome for outcome in counts if outcome.startswith(("wrong", "other"))], counts


OTHER_FIT = dict(
    fitted_router_layer=3, turn_markers=[[7], [9]], prompt_form={"prefix": [], "special": [8], "blank": []}
)


def test_a_request_that_was_read_before_a_fit_is_judged_by_the_router_it_was_read_for(model, topics, tokenizer):
    """Depth, template and router change while a prompt is read: its route is the old fit's, in all of its parts."""
    prompts, reader, names = random_prompts(), model.prompt_router, model.expert_names[:2]
    expected, logits = model.route(prompts), model(input_ids=prompts).logits
    other = copy.deepcopy(model)
    other.fit_router({"math": topics["code"], "code": topics["math"]}, tokenizer)
    read, start = reader.features_at, reader.block_hook.start

    def and_fit(work):
        def work_and_fit(*arguments):
            found = work(*arguments)
            reader.active.put_fit(other.router, names, FitSettings(**OTHER_FIT))
            return found

        return work_and_fit

    old = (model.router, FitSettings.of(model.active.config))
    reader.features_at = and_fit(read)
    for was, found in zip(expected, model.route(prompts), strict=True):
        assert torch.equal(was, found)
    reader.active.put_fit(old[0], names, old[1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts).logits, logits)
    reader.active.put_fit(old[0], names, old[1])
    reader.block_hook.start = and_fit(start)
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts).logits, logits)
    del reader.features_at, reader.block_hook.start
    assert not torch.equal(model.route(prompts).scores, expected.scores), "the other fit would give the same"


def test_a_fit_that_ends_while_an_expert_is_added_is_not_mixed_with_it(tmp_path, model, topics, tokenizer):
    other = copy.deepcopy(model.router)
    extra = write_tiny_checkpoints(tmp_path / "more", ("base", "law"))["law"]
    read = model.prompt_router.features_at

    def read_while_fitted(*arguments):
        names, settings = model.expert_names[:2], FitSettings.of(model.active.config)
        model.active.put_fit(other, names, settings)
        return read(*arguments)

    model.prompt_router.features_at = read_while_fitted
    with pytest.raises(RoutingError, match="fitted or edited while"):
        model.add_expert("law", str(extra), topic_texts(5, 90, 20, seed=4), tokenizer)
    assert model.active.config.expert_names == ["math", "code"]
    assert model.router is other
    assert all("law" not in layer.bank("default").names for layer in model.routed_layers().values())


def test_weights_are_not_loaded_nor_the_model_taken_apart_beside_requests(model):
    prompts, state = random_prompts(1), {name: value.clone() for name, value in model.state_dict().items()}
    asks = {
        "load_state_dict": lambda: model.load_state_dict(state),
        "unload": model.unload,
        "merge_and_unload": lambda: model.merge_and_unload(expert_weights="math"),
    }
    with Answering(model, num_threads=1):
        for name, ask in asks.items():
            with pytest.raises(UnsupportedError, match=name):
                ask()
    with model.use_experts("math"), torch.no_grad():
        model(input_ids=prompts)
        with pytest.raises(UnsupportedError, match="load_state_dict"):
            model.load_state_dict(state)
    model.merge_adapter(expert_weights="math")
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(input_ids=prompts, expert_weights="math").logits
        model.cache_merged_experts(["math"])
        is_doubled = [name for name in state if name.endswith("up_proj.base_layer.weight")]
        model.load_state_dict({**state, **{name: state[name] * 2 for name in is_doubled}})
        assert not torch.equal(model(input_ids=prompts, expert_weights="math").logits, expected)
        with model.use_experts("math"):
            merged = model.merge_and_unload()
    assert merged(input_ids=prompts).logits.shape == expected.shape


def test_nobody_asks_a_model_that_is_being_unloaded(model):
    def ask():
        return model.generate(random_prompts(1), expert_weights=["math"], **SETTINGS)

    with ThreadPoolExecutor() as pool, model.board.alone("unload"), pytest.raises(UnsupportedError, match="in unload"):
        pool.submit(ask).result()
    assert ask().shape[1] == 12


def test_adapter_tensors_in_memory_carry_how_their_router_reads(tmp_path, model, tokenizer, topics):
    """``set_peft_model_state_dict`` into a fresh model gives the same routes; files hold no more than before."""
    fresh, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    reader, prompts = model.prompt_router, random_prompts()
    reader.active.put_settings("default", FitSettings(**{**OTHER_FIT, "fitted_router_layer": 2}))
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert fresh.router_layer == model.router_layer == 2
    for ours, theirs in zip(model.route(prompts), fresh.route(prompts), strict=True):
        assert torch.equal(ours, theirs)
    model.save_pretrained(tmp_path / "saved")
    assert not any("fit_settings" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


def test_a_save_beside_a_fit_has_settings_and_router_of_one_fit(tmp_path, model, monkeypatch):
    """A fit that ends between the tensors and the configuration of a save waits for the end of it."""
    router, settings = copy.deepcopy(model.router), FitSettings(**OTHER_FIT)
    write, ended = MediatorConfig.save_pretrained, threading.Event()

    def fit():
        model.active.put_fit(router, model.expert_names[:2], settings)
        ended.set()

    def write_late(*arguments, **options):
        thread = threading.Thread(target=fit)
        thread.start()
        assert not ended.wait(0.05)
        write(*arguments, **options)

    monkeypatch.setattr(MediatorConfig, "save_pretrained", write_late)
    layer = model.active.config.fitted_router_layer
    model.save_pretrained(tmp_path / "saved")
    assert ended.wait(30)
    assert model.active.config.fitted_router_layer == 3
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["fitted_router_layer"] == layer


def test_a_copy_beside_a_fit_has_settings_and_router_of_one_fit(model, monkeypatch):
    """A fit that ends while a model is copied waits for the end of it, and so does the first look at another block."""
    router, settings = copy.deepcopy(model.router), FitSettings(**OTHER_FIT)
    router.weight.data.zero_()
    reader, ended, hooked = model.prompt_router, threading.Event(), threading.Event()
    depth = next(layer for layer in range(3) if layer not in reader.block_hook.__getstate__()["handles"])
    threads = []

    def fit():
        model.active.put_fit(router, model.expert_names[:2], settings)
        ended.set()

    def look():
        reader.block_hook.start(reader.blocks, depth, lambda hidden: None)
        hooked.set()

    def copy_late(config, memo):
        threads.extend(threading.Thread(target=work) for work in (fit, look))
        for thread in threads:
            thread.start()
        assert not ended.wait(0.05)
        assert not hooked.is_set()
        found = memo[id(config)] = type(config).__new__(type(config))
        found.__dict__.update(copy.deepcopy(config.__getstate__(), memo))
        return found

    layer = model.active.config.fitted_router_layer
    monkeypatch.setattr(MediatorConfig, "__deepcopy__", copy_late, raising=False)
    copied = copy.deepcopy(model)
    assert ended.wait(30)
    assert hooked.wait(30)
    assert copied.active.config.fitted_router_layer == layer
    assert copied.router.weight.any()
    assert not model.router.weight.any()
    assert not copied.prompt_router.feature_caches
