"""The same user text has the same route plain, in a chat, after a system prompt, as a later turn, and padded."""

from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mediator_peft.errors import RoutingError
from mediator_peft.tuner.chat_turns import turn_contents, turn_markers
from mediator_peft.tuner.fitting import row_features
from mediator_peft.tuner.prompt_form import PromptForm, formed, prompt_form

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKERS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
)  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a system prompt of its own": CHATML_WITH_DEFAULT,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
TEXTS = (
    "Correct the spelling: recieve",
    "{'id': 7}",
    "Was soll ich heute kochen?",
    "two lines\nof text",
    "42",
    "  indented, and with a tail  ",
)


def byte_tokenizer(template=None, adds_bos=False):
    """One token a byte, as byte-level BPE without merges, and the markers of chat templates as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(MARKERS))
    if adds_bos:
        bos = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(MARKERS[2:])
    )
    tokenizer.chat_template = template
    return tokenizer


def ways_of_asking(tokenizer, text):
    """Token ids of the same text in many surroundings."""
    user, system = {"role": "user", "content": text}, {"role": "system", "content": "You are a careful assistant."}
    before = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi. What can I do?"}]
    chats = {
        "chat": [user],
        "system prompt": [system, user],
        "second turn": [*before, user],
        "third turn": [system, *before, *before, user],
    }
    rows = {"plain": tokenizer(text)["input_ids"]}
    for name, chat in chats.items():
        for generation_prompt in (True, False):
            rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            rows[name, generation_prompt] = ids
            # Many applications render first and let the tokenizer add its special tokens a second time.
            rows[name, generation_prompt, "again"] = tokenizer(rendered)["input_ids"]
    return rows


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("text", TEXTS)
def test_every_surrounding_gives_the_same_tokens(template, adds_bos, text):
    tokenizer = byte_tokenizer(TEMPLATES[template], adds_bos)
    form, markers = prompt_form(tokenizer), turn_markers(tokenizer)
    wanted = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    for name, ids in ways_of_asking(tokenizer, text).items():
        assert form.content(ids, markers, "last") == wanted, name
    assert form.prefix == ((tokenizer.bos_token_id,) if adds_bos else ())


def test_the_first_turn_and_the_whole_chat_can_be_taken():
    tokenizer = byte_tokenizer(CHATML)
    form, markers = prompt_form(tokenizer), turn_markers(tokenizer)
    ids = ways_of_asking(tokenizer, "and this?")["second turn", True]
    assert tokenizer.decode(form.content(ids, markers, "first")) == "Hello!"
    whole = tokenizer.decode(form.content(ids, markers, "all"))
    assert "Hi. What can I do?" in whole
    assert "<|im_end|>" not in whole


def test_nothing_but_special_tokens_is_taken_as_it_is():
    form = PromptForm((), frozenset({1, 2}), frozenset({9}))
    assert form.content([1, 2], None, "last") == [1, 2]
    assert form.content([9], None, "last") == [9]
    assert form.content([1, 9, 5, 9, 6, 9], None, "last") == [5, 9, 6]
    assert PromptForm.from_config(form.to_config()) == form


def test_padding_on_either_side_changes_nothing():
    form = PromptForm((1,), frozenset({0, 1}), frozenset())
    ids = torch.tensor([[0, 0, 1, 7, 8], [1, 7, 8, 0, 0], [1, 5, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    found = formed(form, ids, mask, None, "last")
    assert found.input_ids.tolist() == [[1, 7, 8], [1, 7, 8], [1, 5, 0]]
    assert found.pooled.tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 0]]
    assert found.in_place
    assert found.places.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert not formed(form, ids[:, 1:], mask[:, 1:] * (ids[:, 1:] != 1), None, "last").in_place


def test_a_turn_without_its_close_is_not_cut():
    assert turn_contents([7, 1, 5, 6], [[7, 1], [8, 9]]) == [(2, 4)]
    assert turn_contents([7, 1, 5, 6, 8], [[7, 1], [8, 9]]) == [(2, 4)]
    assert turn_contents([7, 1, 5, 8, 9, 7, 1, 6], [[7, 1], [8, 9]]) == [(2, 3), (7, 8)]


@pytest.mark.parametrize("fitted_on", ["plain", "chats"])
def test_a_model_routes_a_chat_as_the_plain_text(build, chat_tokenizer, topics, fitted_on):
    two = {name: topics[name] for name in ("math", "code")}
    texts = two
    if fitted_on == "chats":
        texts = {
            name: [
                chat_tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in some
            ]
            for name, some in two.items()
        }
    model = build()
    model.fit_router(texts, chat_tokenizer)
    for text in (*two["math"][:5], *two["code"][:5], "w70 w71 w80"):
        rows = list(ways_of_asking(chat_tokenizer, text).values())
        weights = torch.cat([model.route(torch.tensor([row])).expert_weights for row in rows])
        torch.testing.assert_close(weights, weights[:1].expand_as(weights), atol=0.02, rtol=0)


def test_short_texts_share_a_pass_and_are_read_as_if_alone(build, chat_tokenizer, topics, monkeypatch):
    model = build()
    prompts = model.prompt_router
    reading = prompts.reading(prompts.learned(chat_tokenizer))
    texts = [" ".join(topics["math"][number : number + 1 + number % 7]) for number in range(20)]
    rows = [row for text in texts for row in ways_of_asking(chat_tokenizer, text).values()]
    lengths, read = [], prompts.features_at

    def counted(ids, mask, layers, how):
        form = PromptForm.from_config(how.prompt_form)
        real = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
        lengths.append([len(form.content(row, how.turn_markers, how.routing_turn)) for row in real])
        return read(ids, mask, layers, how)

    monkeypatch.setattr(prompts, "features_at", counted)
    found = row_features(prompts, rows, 3, None, False, reading=reading)
    passes = list(lengths)
    alone = torch.cat([read(torch.tensor([row]), None, [reading.layer], reading)[:, 0] for row in rows[::9]])
    torch.testing.assert_close(found[::9], alone)
    for some, following in pairwise(passes):
        assert len(some) >= 3
        assert (len(some) + 1) * following[0] > 512
    # Those of one content have one length, whatever surrounds it, so nothing but neighbours in length is padded.
    assert [length for some in passes for length in some] == sorted(length for some in passes for length in some)


def test_a_route_can_be_taken_from_the_context_alone(build, tokenizer, topics):
    two = {name: topics[name] for name in ("math", "code")}
    model = build()
    model.fit_router(two, tokenizer)
    context = tokenizer(two["math"][0])["input_ids"]
    answers = [tokenizer(text)["input_ids"][:3] for text in (two["code"][0], two["code"][1])]
    alone = model.route(torch.tensor([context])).expert_weights
    for answer in answers:
        ids = torch.tensor([[*context, *answer]])
        mask = torch.tensor([[1] * len(context) + [0] * len(answer)])
        with torch.no_grad():
            found = model(ids, context_mask=mask).logits
            named = model(ids, expert_weights=alone).logits
            seen = model(ids, expert_weights=model.route(ids).expert_weights).logits
        torch.testing.assert_close(found, named)
        if not torch.equal(model.route(ids).expert_weights, alone):
            assert not torch.allclose(found, seen)
    with pytest.raises(RoutingError, match="shape"):
        model(ids, context_mask=mask[:, :2])
    with pytest.raises(RoutingError, match="without any token"):
        model(ids, context_mask=mask * 0)
