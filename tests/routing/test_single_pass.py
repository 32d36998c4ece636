"""Where nothing routed lies below the router's layer, a prompt is judged inside its own forward pass: same answers."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fitting import fit_once

from mediator_peft.errors import RouterNotFittedError
from mediator_peft.routing.block_hook import BlockHook

ABOVE = {"router_layer": 1, "routed_layers": [1, 2], "routing_top_p": 1.0}  # so that a small change of features shows


@pytest.fixture
def two(topics):
    return {name: topics[name] for name in ("math", "code")}


def chats(tokenizer, *chats):
    texts = [
        tokenizer.apply_chat_template(
            [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(chat)],
            tokenize=False,
            add_generation_prompt=True,
        )
        for chat in chats
    ]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def count_passes(model):
    """How often the first block has run."""
    calls = []
    model.prompt_router.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def asked(chat_tokenizer, two):
    return chats(
        chat_tokenizer,
        [two["math"][0]],
        [two["code"][0] + " " + two["code"][1]],
        [two["math"][2], "w70 w71", two["code"][3]],
    )


@pytest.mark.parametrize("routing_turn", ["last", "first", "all"])
def test_one_pass_decides_as_two_do(build, chat_tokenizer, two, asked, routing_turn):
    model = build(**ABOVE, routing_turn=routing_turn)
    fit_once(model, two, chat_tokenizer)
    assert model.single_pass_routing
    weights = model.route(**asked).expert_weights
    assert len(weights.unique(dim=0)) > 1
    expected = model.generate(**asked, max_new_tokens=6, do_sample=False, expert_weights=weights)
    positions = (asked["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        named = model(**asked, position_ids=positions, expert_weights=weights).logits
    calls = count_passes(model)
    found = model.generate(**asked, max_new_tokens=6, do_sample=False)
    assert found.tolist() == expected.tolist()
    # Chats are read without their template first, so that it does not change the route: one pass more.
    second_passes = int(routing_turn != "all")
    assert len(calls) == second_passes + found.shape[1] - asked["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model(**asked, position_ids=positions).logits, named)


def test_routed_blocks_below_the_router_cost_a_second_look(build, chat_tokenizer, two, asked):
    model = build(router_layer=1, routed_layers="all")
    fit_once(model, two, chat_tokenizer)
    assert not model.single_pass_routing
    calls = count_passes(model)
    found = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert len(calls) == 1 + found.shape[1] - asked["input_ids"].shape[1]


def test_a_plain_prompt_is_routed_in_its_own_pass_as_in_a_second_one(build, chat_tokenizer, two):
    model = build(**ABOVE)
    fit_once(model, two, chat_tokenizer)
    plain = chat_tokenizer([two["math"][0], two["code"][1]], padding=True, padding_side="left", return_tensors="pt")
    plain.pop("token_type_ids", None)
    weights = model.route(**plain).expert_weights
    expected = model.generate(**plain, max_new_tokens=3, do_sample=False, expert_weights=weights)
    calls = count_passes(model)
    found = model.generate(**plain, max_new_tokens=3, do_sample=False)
    assert found.tolist() == expected.tolist()
    assert len(calls) == found.shape[1] - plain["input_ids"].shape[1]


def test_prompts_in_pieces_with_beams_and_with_a_cache(build, chat_tokenizer, two, asked):
    model = build(**ABOVE)
    fit_once(model, two, chat_tokenizer)
    weights = model.route(**asked).expert_weights
    for settings in ({"num_beams": 2}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        options = {"max_new_tokens": 4, "do_sample": False, **settings}
        expected = model.generate(**asked, **options, expert_weights=weights)
        assert model.generate(**asked, **options).tolist() == expected.tolist(), settings
    first = model.generate(**asked, max_new_tokens=2, return_dict_in_generate=True)
    longer = {"input_ids": torch.nn.functional.pad(first.sequences, (0, 2), value=7)}
    longer["attention_mask"] = torch.nn.functional.pad(asked["attention_mask"], (0, 4), value=1)
    whole = model.generate(**longer, max_new_tokens=3, do_sample=False)
    carried = model.generate(**longer, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert carried.tolist() == whole.tolist()


def test_an_unfitted_router_is_refused_and_leaves_no_request(build, asked):
    model = build(**ABOVE)
    with pytest.raises(RouterNotFittedError):
        model.generate(**asked, max_new_tokens=1)
    with pytest.raises(RouterNotFittedError), torch.no_grad():
        model(input_ids=asked["input_ids"])
    assert model.board.pending is None
    model.generate(**asked, max_new_tokens=1, expert_weights="math")


@pytest.fixture
def hasty():
    """Threads that take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ABOVE, id="single pass"),
        pytest.param(ABOVE | {"routed_layers": "all"}, id="two passes", marks=pytest.mark.slow),
    ],
)
def test_threads_decide_each_for_itself(build, chat_tokenizer, two, asked, hasty, settings):
    model = build(**settings)
    fit_once(model, two, chat_tokenizer)
    parts = [{key: value[row : row + 1] for key, value in asked.items()} for row in range(3)] * 4
    alone = copy.deepcopy(model)
    expected = [alone.generate(**part, max_new_tokens=4, do_sample=False).tolist() for part in parts]
    assert len({str(tokens) for tokens in expected}) == 3

    def ask(part):
        return model.generate(**part, max_new_tokens=4, do_sample=False).tolist()

    with ThreadPoolExecutor(len(parts)) as pool:
        assert list(pool.map(ask, parts)) == expected


class AddOne(torch.nn.Module):
    def forward(self, x):
        return x + torch.tensor([0, 1])


def test_threads_that_look_at_one_block_at_once_see_their_own_pass(hasty):
    # Hooks that came and went with each pass failed here: torch gave two threads the same number.
    blocks = torch.nn.ModuleList([AddOne() for _ in range(3)])
    block_hook, start, wrong = BlockHook(), threading.Barrier(8), []

    def look(number):
        start.wait()
        for step in range(300):
            mine, heard = torch.tensor([number, step]), []
            block_hook.start(blocks, step % 4, heard.append)
            hidden = mine
            for block in blocks:
                hidden = block(hidden)
            if block_hook.stop() or len(heard) != 1 or heard[0].tolist() != [number, step + step % 4]:
                wrong.append((number, step))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))
    assert wrong == []
    block_hook.remove()
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_route_the_same(build, chat_tokenizer, two, asked):
    model = build(**ABOVE)
    fit_once(model, two, chat_tokenizer)
    with torch.no_grad():
        expected = model(**asked).logits
        for block in model.prompt_router.blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(model(**asked).logits, expected)
        named = model(**asked, expert_weights="math").logits
    assert not torch.equal(named, expected)


def test_a_pass_that_never_reached_its_block_is_no_answer(build, chat_tokenizer, two, asked):
    model = build(**ABOVE)
    fit_once(model, two, chat_tokenizer)
    model.prompt_router.block_hook.remove()
    model.prompt_router.block_hook.start = lambda *args: setattr(
        model.prompt_router.block_hook._local, "listening", args
    )
    with torch.no_grad(), pytest.raises(RuntimeError, match="without reaching"):
        model(**asked)


def test_nothing_stays_on_an_unloaded_model(build, chat_tokenizer, two, asked):
    model = build(**ABOVE)
    fit_once(model, two, chat_tokenizer)
    model.generate(**asked, max_new_tokens=1)
    plain = model.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
