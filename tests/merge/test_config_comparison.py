"""Settings of experts against the base's: whatever changes what the weights compute is refused, the rest is not."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from mediator_peft import build_mediator, get_mediator_model, plan_mediator
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import CheckpointMismatchError
from mediator_peft.merge.config_comparison import is_harmless
from mediator_peft.tuner.config import MediatorConfig
from tests.architectures import CAUSAL, tiny_architecture

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2_SIZES = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Each changes the logits of the same weights.
MEANINGFUL = [
    *[(LlamaConfig, change) for change in (
        dict(rms_norm_eps=0.1), dict(hidden_act="gelu"), dict(rope_parameters={**ROPE, "rope_theta": 500.0}),
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), dict(head_dim=4),
        dict(tie_word_embeddings=True),
    )],
    *[(Gemma2Config, change) for change in (
        dict(attn_logit_softcapping=0.5), dict(final_logit_softcapping=0.5), dict(query_pre_attn_scalar=4),
        dict(sliding_window=2), dict(hidden_activation="relu"), dict(layer_types=["full_attention"] * 2),
    )],
    *[(GraniteConfig, change) for change in (
        dict(logits_scaling=4.0), dict(attention_multiplier=0.3), dict(residual_multiplier=2.0),
        dict(embedding_multiplier=3.0),
    )],
    (CohereConfig, dict(logit_scale=0.5)), (CohereConfig, dict(layer_norm_eps=0.1)),
    (MistralConfig, dict(sliding_window=2)),
    (Qwen2Config, dict(use_sliding_window=True, sliding_window=2, max_window_layers=0)),
    (GPT2Config, dict(scale_attn_by_inverse_layer_idx=True)), (GPT2Config, dict(activation_function="relu")),
    (GPT2Config, dict(layer_norm_epsilon=0.1)),
]  # fmt: skip


def write(tmp_path, kind, change):
    """A base, and an expert of its weights with other settings; says whether the logits differ."""
    sizes = GPT2_SIZES if kind is GPT2Config else SIZES
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(kind(**sizes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "expert")
    settings = json.loads((tmp_path / "expert" / "config.json").read_text())
    (tmp_path / "expert" / "config.json").write_text(json.dumps({**settings, **change}))
    return base


@pytest.mark.parametrize(("kind", "change"), MEANINGFUL, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_setting_that_changes_the_logits_is_refused(kind, change, tmp_path):
    write(tmp_path, kind, change)
    key = next(iter(change))
    with pytest.raises(CheckpointMismatchError, match=key):
        build_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, tmp_path / "out", MediatorSettings())
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    assert any(key in problem for problem in planned.problems)


def test_a_model_in_memory_is_compared_as_well(tmp_path):
    base = write(tmp_path, GraniteConfig, dict(logits_scaling=4.0))
    with pytest.raises(CheckpointMismatchError, match="logits_scaling"):
        get_mediator_model(base, MediatorConfig(experts={"a": str(tmp_path / "expert")}))


COUNTED = [("phimoe", "router_jitter_noise", 0.4), ("dory", "initializer_range", 0.4), ("roberta", "pad_token_id", 1)]


@pytest.mark.parametrize(("kind", "key", "value"), COUNTED)
def test_a_setting_that_some_models_compute_with_is_refused_there(kind, key, value, tmp_path):
    tiny_architecture(kind).save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "expert")
    settings = json.loads((tmp_path / "expert" / "config.json").read_text())
    (tmp_path / "expert" / "config.json").write_text(json.dumps({**settings, key: value}))
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    assert any(f"{key} = {value}" in text for text in planned.problems)


@pytest.mark.release
@pytest.mark.parametrize("kind", CAUSAL)
def test_no_model_computes_with_a_harmless_setting(kind):
    """Each number and switch that is called harmless is changed; the weights must give the same logits."""
    ids = torch.randint(5, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    try:
        model = tiny_architecture(kind)
        expected = model(input_ids=ids).logits
    except Exception as fault:
        pytest.skip(f"no tiny model of it runs in transformers: {fault}")
    told = ("bos_token_id", "eos_token_id", "return_dict", "output_hidden_states", "output_attentions", "num_labels")
    for key, value in model.config.to_dict().items():
        if type(value) not in (bool, int, float) or key in told or not is_harmless(key, kind):
            continue
        config = deepcopy(model.config)
        changed = not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else 0.37)
        setattr(config, key, changed)
        try:
            other = type(model)(config).eval()
        except ValueError:  # transformers does not allow it
            continue
        other.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            difference = (other(input_ids=ids).logits - expected).abs().max()
        assert difference < 1e-5, f"{key} = {changed}"


HARMLESS = [
    dict(_name_or_path="/home/x"), dict(transformers_version="4.1.0"), dict(use_cache=False), dict(eos_token_id=[2, 3]),
    dict(attention_dropout=0.1), dict(initializer_range=0.5), dict(torch_dtype="float16"), dict(pretraining_tp=2),
    dict(architectures=None), dict(unsloth_fixed=True), dict(num_labels=7), dict(temperature=0.3),
]  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS, ids=str)
@pytest.mark.parametrize("kind", [LlamaConfig, GraniteConfig])
def test_a_harmless_setting_is_not_spoken_of(kind, change, tmp_path):
    write(tmp_path, kind, change)
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    assert not planned.problems
    assert not [text for text in planned.warnings if next(iter(change)) in text and "token" not in text]


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (dict(max_position_embeddings=4096), False),
        (dict(some_new_trick=3), False),
        (dict(max_position_embeddings=4096, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}), True),
    ],
    ids=["longer", "unknown", "longer, and the rotary embedding knows"],
)
def test_what_may_matter_is_said(change, is_refused, tmp_path):
    write(tmp_path, LlamaConfig, change)
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    key = next(iter(change))
    assert any(key in text for text in (planned.problems if is_refused else planned.warnings))
    assert bool(planned.problems) == is_refused
    assert sum(f"{key} =" in text for text in planned.warnings) <= 1
    if not is_refused:
        report = build_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, tmp_path / "out", MediatorSettings())
        assert any(key in note for note in report.notes)


def test_defaults_that_are_written_out_are_the_same(tmp_path):
    write(tmp_path, LlamaConfig, {})
    settings = json.loads((tmp_path / "expert" / "config.json").read_text())
    for key in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "rope_parameters", "hidden_act"):
        if key != "num_key_value_heads":
            settings.pop(key)
    (tmp_path / "expert" / "config.json").write_text(json.dumps({**settings, "rope_theta": 10000.0}))
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    assert not planned.problems


def test_models_whose_layers_differ_are_compared_setting_by_setting(tmp_path):
    """Gemma 4 refuses to tell the width of a head, which differs by layer; its parts cannot be compared as wholes."""
    tiny_architecture("gemma4").save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "expert")
    settings = json.loads((tmp_path / "expert" / "config.json").read_text())
    settings["text_config"]["final_logit_softcapping"] = 3.0
    (tmp_path / "expert" / "config.json").write_text(json.dumps(settings))
    planned = plan_mediator(tmp_path / "base", {"a": tmp_path / "expert"}, config=MediatorSettings())
    assert [text for text in planned.problems if "text_config.final_logit_softcapping" in text]
