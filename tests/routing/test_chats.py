"""Which turn of a chat decides, and a cache that never mixes two routes."""

import pytest
import torch
from fitting import fit_once
from tokenizer import tiny_tokenizer, topic_texts
from transformers import DynamicCache

from mediator_peft.errors import ConfigError, RoutingError
from mediator_peft.tuner.chat_turns import routing_rows, turn_markers, user_turns


def chat(*contents):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def encoded(tokenizer, chats):
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in chats]
    return tokenizer(texts, return_tensors="pt", padding=True)


def chats_of(topics):
    return {name: [chat(text) for text in topics[name]] for name in ("math", "code")}


def test_turns_are_found_by_the_template(chat_tokenizer):
    markers = turn_markers(chat_tokenizer)
    assert markers == [[94, 90, 91], [94, 92, 93]] or markers == [[90, 91], [94, 92, 93]]
    ids = encoded(chat_tokenizer, [chat("w5 w6", "w40", "w7")])["input_ids"][0].tolist()
    assert [chat_tokenizer.decode(ids[slice(*turn)]).split()[-4:] for turn in user_turns(ids, markers)] == [
        ["w6", "w94", "w92", "w93"],
        ["w7", "w94", "w92", "w93"],
    ]
    assert turn_markers(tiny_tokenizer()) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_chosen_turn_reads_like_a_chat_of_its_own(chat_tokenizer, side):
    chat_tokenizer.padding_side = side
    markers = turn_markers(chat_tokenizer)
    inputs = encoded(chat_tokenizer, [chat("w5 w6", "w40", "w7"), chat("w8")])
    alone = encoded(chat_tokenizer, [chat("w7")])["input_ids"][0].tolist()
    rows, mask = routing_rows(inputs["input_ids"], inputs["attention_mask"], markers, "last")
    assert rows[0][mask[0] > 0].tolist()[-len(alone) :] == alone
    first, first_mask = routing_rows(inputs["input_ids"], inputs["attention_mask"], markers, "first")
    assert 5 in first[0].tolist()
    assert 7 not in first[0].tolist()
    assert first_mask.sum() > 0
    whole, _ = routing_rows(inputs["input_ids"], inputs["attention_mask"], markers, "all")
    assert whole is inputs["input_ids"]


@pytest.mark.parametrize(("routing_turn", "expected"), [("last", "code"), ("first", "math")])
def test_a_chat_goes_where_its_turn_points(build, topics, chat_tokenizer, routing_turn, expected):
    model = build(routing_turn=routing_turn)
    fit_once(model, chats_of(topics), chat_tokenizer)
    inputs = encoded(chat_tokenizer, [chat(topics["math"][0], "w70", topics["code"][0])])
    weights = model.route(**inputs).expert_weights[0]
    assert model.expert_names[int(weights.argmax())] == expected


def test_an_unknown_way_is_refused(build):
    with pytest.raises(ConfigError, match="routing_turn"):
        build(routing_turn="never")


@pytest.mark.parametrize("routing_turn", ["last", "first"])
@torch.no_grad()
def test_a_carried_cache_gives_what_no_cache_gives(build, topics, chat_tokenizer, routing_turn):
    model = build(routing_turn=routing_turn)
    fit_once(model, chats_of(topics), chat_tokenizer)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = DynamicCache()
    first = encoded(chat_tokenizer, [chat(topics["math"][0])])
    answer = model.generate(**first, past_key_values=cache, **settings)
    turn = chat_tokenizer(f"w94 w90 w91 {topics['code'][0]} w94 w92 w93", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([answer, turn["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    assert cache.get_seq_length() > 0
    carried = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)
    fresh = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(carried, fresh)
    routes = [model.route(input_ids=some).expert_weights.argmax().item() for some in (first["input_ids"], ids)]
    assert (routes[0] == routes[1]) == (routing_turn == "first")


def test_explanations_take_texts_chats_and_ids(build, topics, chat_tokenizer):
    model = build()
    fit_once(model, chats_of(topics), chat_tokenizer)
    text = topics["code"][0]
    inputs = encoded(chat_tokenizer, [chat(text)])
    (from_ids,) = model.explain(inputs)
    (from_text,) = model.explain(text, chat_tokenizer)
    from_list = model.explain([text, chat(text)], chat_tokenizer)
    assert from_text == from_ids
    assert [str(one) for one in from_list] == [str(from_ids)] * 2
    assert from_ids.nearest == "code"
    route = model.route(**inputs)
    assert from_ids.uncertainty == pytest.approx(route.uncertainty.item())
    with pytest.raises(RoutingError, match="tokenizer"):
        model.explain(text)


def test_features_are_computed_once(build, topics, tokenizer, tmp_path, monkeypatch):
    model = build()
    seen, read = [], model.prompt_router.features_at
    monkeypatch.setattr(
        model.prompt_router,
        "features_at",
        lambda ids, *rest: seen.append(len(ids)) or read(ids, *rest),
    )
    texts = {name: topics[name] for name in ("math", "code")}
    one = model.fit_router(texts, tokenizer, cache_folder=tmp_path / "cache", augmented=False)
    count = sum(seen)
    assert count == len({*topics["math"], *topics["code"]})
    assert model.fit_router(texts, tokenizer, cache_folder=tmp_path / "cache", augmented=False) == one
    assert sum(seen) == count
    assert list((tmp_path / "cache").iterdir())
    more = {**texts, "math": texts["math"] + topic_texts(5, 30, 3, seed=77)}
    model.fit_router(more, tokenizer, cache_folder=tmp_path / "cache", augmented=False)
    assert sum(seen) - count <= 3
