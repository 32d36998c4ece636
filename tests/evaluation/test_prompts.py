"""Reading, rendering and encoding prompts."""

import json
from types import SimpleNamespace

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import tiny_model

from mediator_peft.context_length import context_length, table_of_positions
from mediator_peft.errors import MediatorError
from mediator_peft.evaluation import prompts
from mediator_peft.evaluation.prompts import (
    DataFileError,
    PromptLengthError,
    TaskItem,
    encode,
    prompt_rows,
    read_prompts,
    read_task,
    render,
    token_ids,
)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_reads_items_and_takes_the_match_of_a_line_first(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1", "answer": "2", "match": "last_number"},
        "",
        {"prompt": "ü", "answer": "ue", "other": 3},
    )
    assert read_task(path, "contains") == [TaskItem("1+1", "2", "last_number"), TaskItem("ü", "ue", "contains")]
    assert read_prompts(path) == ["1+1", "ü"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert read_prompts(path) == ["a", "b"]


def test_all_faults_are_told_with_their_lines(tmp_path):
    path = write(
        tmp_path / "bad.jsonl",
        {"prompt": "a", "answer": "b"},
        "{not json",
        ["a list"],
        {"promt": "a", "answer": "b"},
        {"prompt": "a", "answer": 3},
        {"prompt": "a", "answer": "b", "match": "exat"},
        {"prompt": "a", "answer": "none", "match": "last_number"},
    )
    with pytest.raises(DataFileError) as caught:
        read_task(path)
    message = str(caught.value)
    assert "bad.jsonl" in message
    for part in ("line 2: not JSON", "line 3: a JSON object", "line 4", "Did you mean 'promt'?", "line 5: 'answer'"):
        assert part in message
    for part in ("line 6", "Did you mean 'exact'?", "line 7"):
        assert part in message
    assert "line 1" not in message


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataFileError, match="holds no items"):
        read_task(path)


def test_a_missing_file_a_folder_and_binary_data_are_our_errors(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.jsonl", "", "binary.jsonl"):
        with pytest.raises(MediatorError):
            read_prompts(tmp_path / name)


def test_a_template_is_used_and_its_special_tokens_do_not_come_twice():
    tokenizer = character_tokenizer(CHAT_TEMPLATE, adds_bos=True)
    rendered = render(tokenizer, "hi")
    assert rendered.text == "<s>[user] hi\n[assistant] "
    assert token_ids(tokenizer, rendered).count(tokenizer.bos_token_id) == 1
    raw = render(tokenizer, "hi", use_template=False)
    assert raw.text == "hi"
    assert token_ids(tokenizer, raw).count(tokenizer.bos_token_id) == 1


def test_without_a_template_a_prompt_stays_raw():
    assert render(character_tokenizer(), "hi") == ("hi", True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoding_pads_on_the_left_and_leaves_the_tokenizer_alone(side):
    tokenizer = character_tokenizer()
    tokenizer.padding_side = side
    inputs = encode(tokenizer, ["abc", "a"])
    assert tokenizer.padding_side == side
    first = tokenizer("abc")["input_ids"]
    expected = torch.tensor([first, [tokenizer.pad_token_id] * 2 + first[:1]])
    torch.testing.assert_close(inputs["input_ids"], expected)
    torch.testing.assert_close(inputs["attention_mask"], torch.tensor([[1, 1, 1], [0, 0, 1]]))


def test_a_tokenizer_without_a_padding_token_will_do():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    assert encode(tokenizer, ["abc", "a"])["input_ids"][1, 0] == tokenizer.eos_token_id


def test_prompts_beyond_the_model_are_refused_without_reading_them_whole(monkeypatch):
    tokenizer = character_tokenizer()
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    assert context_length(llama.config) == context_length(gpt2.config) == table_of_positions(gpt2) == 256
    assert table_of_positions(llama) is None
    read = []
    monkeypatch.setattr(prompts, "token_ids", lambda used, text: read.append(len(text.text)) or token_ids(used, text))
    with pytest.raises(PromptLengthError, match="prompt 2: more than 256 tokens") as fault:
        prompt_rows(llama, tokenizer, ["a", "b" * 1_000_000])
    assert fault.value.number == 1
    assert max(read) < 10_000
    # Rotary positions go on beyond; rows of a table do not.
    assert len(prompt_rows(llama, tokenizer, ["a" * 256], num_new=100)[0]) == 256
    assert len(prompt_rows(gpt2, tokenizer, ["a" * 156], num_new=100)[0]) == 156
    with pytest.raises(PromptLengthError, match="100 new ones"):
        prompt_rows(gpt2, tokenizer, ["a" * 157], num_new=100)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"full": {"rope_type": "linear", "factor": 2.0}, "sliding": {"rope_type": "default"}}, 200),
    ],
)
def test_rope_scaling_lengthens_the_context(rope, expected):
    assert context_length(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == expected
