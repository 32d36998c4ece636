"""What callers may hand over by mistake: an error of ours that says so, or what was meant."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_prompts
from transformers import GenerationConfig

from mediator_peft.errors import RoutingError, UnsupportedError
from mediator_peft.merge.preflight import plan_mediator

from .conftest import build_and_fit, two_topics

SETTINGS = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    from tokenizer import tiny_tokenizer

    return build_and_fit(tmp_path_factory.mktemp("odd"), two_topics(), tiny_tokenizer())


WEIGHTS = {
    "a tensor of two": {"math": torch.ones(2)},
    "a text": {"math": "1"},
    "a list": {"math": [1]},
    "none": {"math": None},
    "a huge integer": {"math": 10**400},
    "complex": torch.ones(3, dtype=torch.complex64),
    "nan": {"math": float("nan")},
    "bytes": b"math",
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_numbers_are_refused(kind, fitted):
    with pytest.raises(RoutingError, match=r"must be (a|real|finite) |a row of expert weights"):
        fitted(input_ids=random_prompts(1), expert_weights=WEIGHTS[kind])


def test_a_tensor_of_one_number_is_a_weight(fitted):
    prompts = random_prompts(1)
    with torch.no_grad():
        found = fitted(input_ids=prompts, expert_weights={"math": torch.tensor(1.0)}).logits
        torch.testing.assert_close(found, fitted(input_ids=prompts, expert_weights="math").logits)


@pytest.mark.parametrize("value", [-1.0, 2.0, float("nan"), float("-inf"), 0.5])
def test_a_mask_that_is_no_mask_is_refused(value, fitted):
    prompts = random_prompts(2)
    mask = torch.ones(prompts.shape)
    mask[0, 0] = value
    for ask in (fitted.route, lambda ids, mask: fitted.generate(ids, attention_mask=mask, **SETTINGS)):
        with pytest.raises(RoutingError, match="1 for the tokens of a prompt and 0 for padding"):
            ask(prompts, mask)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(None, "got None"), (3, "got 3"), ([3], "got 3"), ({"text": "a"}, "got {"), (["a\ud800"], "half of a character")],
    ids=str,
)
def test_what_is_no_prompt_is_not_explained(prompts, message, fitted, tokenizer):
    with pytest.raises(RoutingError, match=message):
        fitted.explain(prompts, tokenizer)


@pytest.mark.parametrize("odd", [None, "tokenizer", object()], ids=["none", "text", "object"])
def test_no_tokenizer_is_said(odd, fitted, topics):
    with pytest.raises(RoutingError, match="tokenizer"):
        fitted.fit_router(topics, odd)
    with pytest.raises(RoutingError, match="tokenizer"):
        fitted.explain("a", odd)


def test_a_chat_without_a_template_is_said(fitted, topics, tokenizer):
    chats = [[{"role": "user", "content": text}] for text in topics["math"]]
    with pytest.raises(RoutingError, match="row 0: the tokenizer's template cannot render"):
        fitted.fit_router({"math": chats, "code": topics["code"]}, tokenizer)


class Frame:
    """What of a pandas DataFrame is used: iterating over one gives the names of its columns."""

    def __init__(self, texts):
        self.texts, self.columns = texts, ["prompt"]

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, form):
        assert form == "records"
        return [{"prompt": text} for text in self.texts]


def test_a_data_frame_is_read_by_rows(fitted, topics, tokenizer):
    model = copy.deepcopy(fitted)
    options = dict(text_column="prompt", augmented=False, hard_negatives=False, background=[])
    found = model.fit_router({"math": Frame(topics["math"]), "code": topics["code"]}, tokenizer, **options)
    assert found.num_texts == {"math": 40, "code": 40}


def test_another_method_around_the_model_is_said(fitted):
    model = copy.deepcopy(fitted)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for ask in (lambda: model(input_ids=random_prompts(1)), lambda: model.generate(random_prompts(1), **SETTINGS)):
        with pytest.raises(UnsupportedError, match="another PEFT method"):
            ask()


def weights_of_generation(model, prompts, *settings, **named):
    """Expert weights that a generation finds, (B, C)."""
    found, judge = [], model.prompt_router.judged_table
    model.prompt_router.judged_table = lambda *asked: found.append(judge(*asked)[0]) or judge(*asked)
    model.generate(prompts, *settings, **named)
    del model.prompt_router.judged_table
    return found[0]


def test_a_model_in_training_mode_generates_under_the_same_route(fitted):
    prompts, model = random_prompts(8), copy.deepcopy(fitted).train()
    expected = fitted.route(prompts).expert_weights
    assert (expected == 0).any(), "all experts take part, as they do for a gradient"
    for asked in (((), SETTINGS), ((GenerationConfig(**SETTINGS),), {})):
        torch.testing.assert_close(weights_of_generation(model, prompts, *asked[0], **asked[1]), expected)


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_folder_of_now(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert any("the path is empty" in problem for problem in plan_mediator(path, {"a": path}).problems)
