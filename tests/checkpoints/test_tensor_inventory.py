"""The short way to a model's outline says the same as the model's class."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mediator_peft.checkpoints.tensor_inventory import is_known, known_outline, outline_of_model, skeleton, widths_of
from tests.tiny import _COMMON

KINDS = {
    "llama": LlamaConfig(**_COMMON),
    "llama, tied": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen2, tied": Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON),
    "qwen3 with biases": Qwen3Config(**_COMMON, attention_bias=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_say_the_same(kind, tmp_path):
    model = skeleton(KINDS[kind])
    KINDS[kind].architectures = [type(model).__name__]
    KINDS[kind].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert is_known(settings)
    short, long = known_outline(settings), outline_of_model(model, KINDS[kind])
    assert short._replace(structure=None) == long._replace(structure=None)
    assert short.structure._replace(layers=None) == long.structure._replace(layers=None)
    assert sorted(short.structure.layers) == sorted(long.structure.layers)
    assert [layer.name for layer in short.structure.layers] == [layer.name for layer in long.structure.layers]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_file_that_leaves_defaults_out_means_them(kind):
    """Old files name only what differs; what the short way takes for granted must be the class's own default."""
    config = KINDS[kind]
    settings = {"model_type": kind, **{key: value for key, value in _COMMON.items() if key != "pad_token_id"}}
    assert is_known(settings)
    assert known_outline(settings).names == outline_of_model(skeleton(config), config).names


@pytest.mark.parametrize("left_out", [(), ("head_dim",), ("hidden_size",), ("num_attention_heads",)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_ways_find_the_same_widths(kind, left_out):
    given = {key: value for key, value in _COMMON.items() if key not in left_out}
    config = type(KINDS[kind])(**given)
    short = widths_of(SimpleNamespace(raw_config={"model_type": kind, **given}, config=config))
    assert short == widths_of(SimpleNamespace(raw_config={}, config=config))


STRANGE = {
    "another type": {"model_type": "gpt2"},
    "a class of its own": {"architectures": ["LlamaForSequenceClassification"]},
    "code of its own": {"auto_map": {"AutoConfig": "x.y"}},
    "quantised": {"quantization_config": {"bits": 4}},
    "no number of layers": {"num_hidden_layers": None},
    "a word for a flag": {"tie_word_embeddings": "yes"},
    "layers of a new kind": {"layer_types": ["mamba"]},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_whatever_is_unusual_goes_the_long_way(kind):
    assert not is_known({"model_type": "llama", "num_hidden_layers": 2, **STRANGE[kind]})
