"""Whether the configurations of base and experts mean the same by the same weights: every setting counts but those that
are known to be harmless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tensor_inventory import is_known

# fmt: off
_ORIGIN_AND_STORAGE = (
    "_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "transformers_weights",
    "_commit_hash", "tokenizer_class", "dtype", "torch_dtype", "use_bfloat16", "quantization_config",
    "compression_config", "pruned_heads", "task_specific_params", "finetuning_task", "prefix",
)
_RUNNING_AND_TRAINING = (
    "use_cache", "torchscript", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing",
    "chunk_size_feed_forward", "pretraining_tp", "tie_encoder_decoder", "attn_implementation", "initializer_range",
    "init_std", "initializer_factor", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise",
    "output_router_logits", "aux_loss_alpha", "seq_aux",
)
_TOKENS_AND_SAMPLING = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "exponential_decay_length_penalty", "remove_invalid_values",
)
_OTHER_HEADS = (
    "problem_type", "id2label", "label2id", "num_labels", "classifier_activation", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
)
# fmt: on
_HARMLESS = frozenset((*_ORIGIN_AND_STORAGE, *_RUNNING_AND_TRAINING, *_TOKENS_AND_SAMPLING, *_OTHER_HEADS))
_HARMLESS_KINDS = re.compile(r"dropout|_pdrop$|layerdrop|drop_path|^unsloth|^axolotl|_implementation$")

# Harmless in general, but not in these models: they compute with it whenever they run. A test looks for others.
_COUNTED_BY = {
    "pad_token_id": frozenset(
        ("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
         "xmod")
    ),  # positions are counted from it
    "initializer_range": frozenset(("dory",)),
    "router_jitter_noise": frozenset(("phimoe",)),
}  # fmt: skip

# Read by some models that do not declare them; they count wherever they differ.
_ALWAYS = frozenset({"sliding_window", "rope_theta", "rope_scaling", "tie_word_embeddings"})
# How many tokens a model was made for: the weights mean the same, unless the rotary embedding depends on it.
_LENGTHS = frozenset({"max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx"})
_LENGTH_ROPES = frozenset({"dynamic", "yarn", "longrope"})
_SHOWN = 160


class Comparison(NamedTuple):
    """What was found between base and experts."""

    faults: list[str]
    """Settings that change what the same weights compute."""

    notes: list[str]
    """Settings that differ and may not matter: lengths, and names that the model's class does not know."""


def compare_configs(base: Checkpoint, experts: Iterable[Checkpoint]) -> Comparison:
    """Every setting of the experts against the base's.

    Defaults are filled in first and former names are read as today's, by transformers' own configuration classes;
    where two known configurations agree word for word, transformers is not asked.
    """
    faults: list[str] = []
    notes: list[str] = []
    for expert in experts:
        ours, theirs = base.raw_config, expert.raw_config
        if _say_the_same(ours, theirs) or (ours and ours == theirs):
            continue
        for key, there, here, is_declared in _differences(expert.config, base.config):
            said = f"{expert.label} has {key} = {_shown(there)} in config.json, the base has {_shown(here)}"
            name = key.rpartition(".")[2]
            if name in _LENGTHS and not _length_matters(base.config, expert.config):
                notes.append(f"{said}; the output takes the latter")
            elif is_declared or name in _ALWAYS:
                faults.append(said)
            else:
                notes.append(f"{said}; {type(base.config).__name__} does not know this setting")
    return Comparison(faults, notes)


def _say_the_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two ``config.json`` of known models agree word for word; where not, they may still mean it."""
    keys = {key for key in (*ours, *theirs) if not is_harmless(key, ours.get("model_type"))}
    return is_known(ours) and is_known(theirs) and all(ours.get(key) == theirs.get(key) for key in keys)


def is_harmless(key: str, model_type: object) -> bool:
    """Whether weights of a type of model compute the same whatever this setting says.

    Args:
        key: name of the setting, without those around it.
        model_type: of the configuration that holds it.
    """
    if key in _COUNTED_BY and model_type in _COUNTED_BY[key]:
        return False
    return key in _HARMLESS or _HARMLESS_KINDS.search(key) is not None


def _differences(theirs: Any, ours: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """Settings that differ: full name, the expert's and the base's value, and whether their class declares it."""
    settings, known = _settings(ours), _settings(theirs)
    declared = _declared(ours) | _declared(theirs)
    for key in sorted(settings.keys() | known.keys()):
        here, there = settings.get(key), known.get(key)
        if is_harmless(key, getattr(ours, "model_type", None)):
            continue
        if hasattr(here, "to_dict") and hasattr(there, "to_dict"):
            # Before any comparison of the two: configurations whose layers differ cannot be compared as wholes.
            yield from _differences(there, here, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", there, here, key in declared


def _settings(config: Any) -> dict[str, Any]:
    """Settings as the model reads them; what is computed from others where it is not given is filled in."""
    if not hasattr(config, "to_dict"):
        return dict(vars(config))
    plain = config.to_dict()
    settings = {"model_type": config.model_type, **{key: _value(config, key, plain[key]) for key in plain}}
    heads, width = (_value(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    if "head_dim" in settings and settings["head_dim"] is None and isinstance(heads, int) and isinstance(width, int):
        settings["head_dim"] = width // max(1, heads)
    if "num_key_value_heads" in settings and settings["num_key_value_heads"] is None:
        settings["num_key_value_heads"] = heads
    return settings


def _value(config: Any, key: str, plain: Any) -> Any:
    """A setting as an attribute; as the file has it where its layers differ, since such a class then refuses.

    Also where the attribute is a view of other settings, which is equal to itself alone.
    """
    try:
        value = getattr(config, key, None)
    except Exception:  # an error of transformers' own, known to its newest versions alone
        return plain
    return value if hasattr(value, "to_dict") or type(value).__eq__ is not object.__eq__ else plain


def _declared(config: Any) -> set[str]:
    try:
        return set(type(config)().to_dict())
    except Exception:  # a class that cannot be made without arguments: all that it holds counts
        return set(_settings(config))


def _length_matters(*configs: Any) -> bool:
    for config in configs:
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))] if isinstance(rope, dict) else []
        if any((kind.get("rope_type") or kind.get("type")) in _LENGTH_ROPES for kind in kinds):
            return True
    return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
