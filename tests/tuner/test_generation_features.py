"""What ``generate`` of the plain merged model does, that of the wrapped model does: our own form of what transformers'
generation tests ask of a model. The reference has the expert's deltas in its weights, and none of our code.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import random_prompts
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mediator_peft import load_mediator
from mediator_peft.errors import RoutingError

from .conftest import build

pytestmark = pytest.mark.slow

SETTINGS = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
PROMPTS = random_prompts(2, length=7)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
EVERYTHING = dict(
    return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True,
    output_hidden_states=True,
)  # fmt: skip


class AddToLogits(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.arange(scores.shape[1]) * 0.05


class StopAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


class Collect:
    """A streamer."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    """The wrapped model, and the plain one with ``math`` in its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    build(folder, request.param, {"density": 0.3, "routed_layers": "all"})
    model, _ = load_mediator(folder / "out", dtype=torch.float32, attn_implementation="eager")
    merged = copy.deepcopy(model).merge_and_unload(expert_weights="math").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager").eval()
    assert not torch.equal(base.generate(PROMPTS, **SETTINGS), merged.generate(PROMPTS, **SETTINGS))
    return model, merged


def both(pair, **settings):
    """What each model generates, ``math`` named for the wrapped one."""
    made = settings.pop("fresh", dict)
    found = []
    for model, name in zip(pair, ({"expert_weights": "math"}, {}), strict=True):
        torch.manual_seed(0)
        found.append(model.generate(**{"input_ids": PROMPTS, **SETTINGS, **settings, **made(), **name}))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(do_sample=True),
        dict(do_sample=True, top_k=5, top_p=0.8, temperature=0.7, num_return_sequences=3),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
        dict(num_beams=2, do_sample=True),
        dict(use_cache=False),
        dict(cache_implementation="static", disable_compile=True),
        dict(attention_mask=LEFT),
        dict(attention_mask=LEFT, num_beams=2),
        dict(prefill_chunk_size=3),
        dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(bad_words_ids=[[7], [9, 12]], suppress_tokens=[8]),
        dict(prompt_lookup_num_tokens=2),
        dict(forced_eos_token_id=2, min_new_tokens=0),
        dict(fresh=lambda: dict(logits_processor=LogitsProcessorList([AddToLogits()]))),
        dict(fresh=lambda: dict(stopping_criteria=StoppingCriteriaList([StopAt(), MaxLengthCriteria(11)]))),
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_tokens_are_those_of_the_merged_model(pair, settings):
    if settings.get("prompt_lookup_num_tokens"):
        settings = {**settings, "input_ids": PROMPTS[:1]}
    found, expected = both(pair, **settings)
    assert torch.equal(found, expected)


def test_assisted_generation(pair):
    """The assistant is the merged model's own, so every candidate is taken."""
    assistant = copy.deepcopy(pair[1])
    found, expected = both(pair, input_ids=PROMPTS[:1], assistant_model=assistant)
    assert torch.equal(found, expected)
    assert torch.equal(found, both(pair, input_ids=PROMPTS[:1])[1])


@pytest.mark.parametrize("settings", [dict(), dict(num_beams=2), dict(use_cache=False)], ids=["greedy", "beam", "none"])
def test_scores_logits_attentions_and_hidden_states(pair, settings):
    found, expected = both(pair, **EVERYTHING, **settings)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()

    def compare(ours, theirs):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        elif isinstance(ours, tuple):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                compare(one, other)

    for key in found:
        compare(found[key], expected[key])


def test_a_streamer_gets_every_token(pair):
    streams = []
    found, expected = both(
        pair, input_ids=PROMPTS[:1], fresh=lambda: {"streamer": streams.append(Collect()) or streams[-1]}
    )
    assert torch.equal(found, expected)
    assert all(stream.ended for stream in streams)
    assert [stream.tokens for stream in streams] == [found[0].tolist()] * 2


def test_generation_goes_on_from_embeddings_and_from_a_cache(pair):
    model, merged = pair
    expected = merged.generate(PROMPTS, **SETTINGS)
    embedded = model.get_input_embeddings()(PROMPTS)
    for name in ({"expert_weights": "math"}, {}):
        asked = (model if name else merged).generate(inputs_embeds=embedded, **SETTINGS, **name)
        assert torch.equal(asked, expected[:, PROMPTS.shape[1] :])
    with pytest.raises(RoutingError, match="inputs_embeds"):
        model.generate(inputs_embeds=embedded, **SETTINGS)
    first = {**SETTINGS, "max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True}
    begun = model.generate(PROMPTS, expert_weights="math", **first)
    rest = {**SETTINGS, "max_new_tokens": 3, "min_new_tokens": 3, "past_key_values": begun.past_key_values}
    assert torch.equal(model.generate(begun.sequences, **rest), expected)


def test_a_configuration_object_and_searches_that_transformers_dropped(pair):
    model, merged = pair
    config = copy.deepcopy(merged.generation_config)
    config.update(max_length=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = merged.generate(PROMPTS, generation_config=config)
    assert expected.shape[1] == 10
    with model.use_experts("math"):
        assert torch.equal(model.generate(PROMPTS, config), expected)
    # Contrastive and group beam search went to repositories of their own: both models say the same of them.
    for settings in (dict(penalty_alpha=0.6, top_k=4), dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)):
        faults = []
        for asked, name in ((model, {"expert_weights": "math"}), (merged, {})):
            try:
                faults.append(asked.generate(PROMPTS, **SETTINGS, **settings, **name).tolist())
            except Exception as fault:
                faults.append(f"{type(fault).__name__}: {fault}")
        assert faults[0] == faults[1]
