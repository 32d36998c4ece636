"""Which tensors a model has and what they are for: from its class, or from ``config.json`` alone for common decoders.

A model's class gives the answer for every architecture, but importing transformers and the class takes seconds. The
short way knows a few architectures by heart and must say the same as the long one; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from ..deferred import torch
from ..errors import UnsupportedError
from ..structure import OUTSIDE, LinearLayer, Structure, find_structure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from .checkpoint import Checkpoint


_LISTED = 4


class Outline(NamedTuple):
    """A model without its weights."""

    class_name: str
    structure: Structure
    names: frozenset[str]
    """Every tensor of its state, tied ones included."""

    tied: frozenset[str]
    """Names that only repeat another tensor, e.g. ``lm_head.weight`` of tied embeddings."""

    buffers: frozenset[str] = frozenset()
    """Those of the names that are buffers, not parameters."""

    model: nn.Module | None = None
    """The model itself, on the meta device; None where it is known by heart and was not made."""


class _Decoder(NamedTuple):
    """What is particular to one architecture among decoders of the Llama family."""

    class_name: str
    attention_bias: bool | None
    """Whether q, k and v have a bias; None where the configuration says."""

    output_bias: bool | None
    mlp_bias: bool | None
    has_head_norms: bool = False


_DECODERS = {
    "llama": _Decoder("LlamaForCausalLM", None, None, None),
    "mistral": _Decoder("MistralForCausalLM", False, False, False),
    "qwen2": _Decoder("Qwen2ForCausalLM", True, False, False),
    "qwen3": _Decoder("Qwen3ForCausalLM", None, None, False, has_head_norms=True),
}
# Settings under which a class of another name, or of other layers, would be made.
_NOT_PLAIN = ("auto_map", "quantization_config", "pruned_heads")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def is_known(settings: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a model that is known by heart."""
    decoder = _DECODERS.get(str(settings.get("model_type")))
    if decoder is None or any(settings.get(key) for key in _NOT_PLAIN):
        return False
    if settings.get("architectures") not in ([decoder.class_name], None):
        return False
    number = settings.get("num_hidden_layers")
    flags = [settings.get(key, False) for key in ("attention_bias", "mlp_bias", "tie_word_embeddings")]
    kinds = settings.get("layer_types") or []
    if not isinstance(kinds, list):
        return False
    return (
        isinstance(number, int)
        and number > 0
        and all(isinstance(flag, bool) for flag in flags)
        and all(kind in _LAYER_TYPES for kind in kinds)
    )


def outline_of(checkpoint: Checkpoint) -> Outline:
    """The outline of a checkpoint's model.

    Raises:
        UnsupportedError: transformers has no causal language model for it, or it is of a kind that is not supported.
    """
    if is_known(checkpoint.raw_config):
        return known_outline(checkpoint.raw_config)
    model = skeleton(checkpoint.config)
    return outline_of_model(model, checkpoint.config)._replace(model=model)


def known_outline(settings: Mapping[str, Any]) -> Outline:
    """The outline of a model that is known by heart: see :func:`is_known`."""
    decoder = _DECODERS[settings["model_type"]]
    attention_bias, output_bias = (
        settings.get("attention_bias", False) if flag is None else flag
        for flag in (decoder.attention_bias, decoder.output_bias)
    )
    mlp_bias = settings.get("mlp_bias", False) if decoder.mlp_bias is None else decoder.mlp_bias
    linear = [(f"self_attn.{part}_proj", attention_bias) for part in ("q", "k", "v")]
    linear += [("self_attn.o_proj", output_bias)]
    linear += [(f"mlp.{part}_proj", mlp_bias) for part in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if decoder.has_head_norms else []
    num_blocks = settings["num_hidden_layers"]
    layers = [
        LinearLayer(f"model.layers.{block}.{part}", block, is_transposed=False, has_bias=has_bias)
        for block in range(num_blocks)
        for part, has_bias in linear
    ]
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"{layer.name}.weight" for layer in layers} | {f"{layer.name}.bias" for layer in layers if layer.has_bias}
    names |= {f"model.layers.{block}.{norm}.weight" for block in range(num_blocks) for norm in norms}
    tied = frozenset({"lm_head.weight"}) if settings.get("tie_word_embeddings", False) else frozenset[str]()
    outer = tuple(LinearLayer(name, OUTSIDE, False, False) for name in ("model.embed_tokens", "lm_head"))
    structure = Structure("model.layers", num_blocks, layers, *((outer[:1], "lm_head") if tied else (outer, None)))
    return Outline(decoder.class_name, structure, frozenset(names), tied)


class Widths(NamedTuple):
    """Of one token in a model."""

    hidden: int
    """Of the residual stream."""

    head: int | None
    """Of one head; None where the configuration does not say it, or it differs from layer to layer."""


def widths_of(checkpoint: Checkpoint) -> Widths:
    """Width of the residual stream and of a head, from ``config.json`` alone for what is known by heart."""
    settings = checkpoint.raw_config
    if is_known(settings):
        hidden, heads, head = (settings.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
        is_said = type(head) is int or (head is None and settings["model_type"] != "qwen3")  # 128 by default there
        if is_said and type(hidden) is int and type(heads) is int and heads > 0:
            return Widths(hidden, head or hidden // heads)
    text = checkpoint.config.get_text_config()
    try:
        size = getattr(text, "head_dim", None)
    except RuntimeError:  # it differs from layer to layer
        return Widths(text.hidden_size, None)
    heads = getattr(text, "num_attention_heads", None)
    return Widths(text.hidden_size, size or (text.hidden_size // heads if heads else None))


def outline_like(model: Any) -> Outline:
    """The outline of a model in memory, whatever wraps its layers: that of a fresh one of its class."""
    with torch.device("meta"):
        fresh = type(model)._from_config(deepcopy(model.config))
    return outline_of_model(fresh, model.config)._replace(model=fresh)


def outline_of_model(model: nn.Module, config: PretrainedConfig) -> Outline:
    """The outline of a model, which may lie on the meta device.

    Raises:
        UnsupportedError: it is of a kind that is not supported.
    """
    tied, state = tied_names(model), model.state_dict()
    integers = sorted(name for name, tensor in state.items() if not tensor.is_floating_point())
    if integers:
        raise UnsupportedError(
            f"{type(model).__name__} has tensors of integers ({', '.join(integers[:_LISTED])}), which cannot be merged."
        )
    names = frozenset(state) & loading_faults(model, state, ())[0]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Outline(type(model).__name__, find_structure(model, tied), names, tied, names - parameters)


def tied_names(model: nn.Module) -> frozenset[str]:
    """Tensors of a model that only repeat another, as far as its configuration ties them."""
    return frozenset(model.get_expanded_tied_weights_keys(all_submodels=True))  # type: ignore[operator]


def loading_faults(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[set[str], set[str]]:
    """Those of the missing and unexpected tensors that transformers would speak of when it loads a checkpoint.

    The others are buffers that it makes anew, and leftovers of former versions.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(missing), unexpected_keys=set(unexpected), mismatched_keys=set(), error_msgs=[],
        conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model without weights, on the meta device.

    Raises:
        UnsupportedError: transformers has no causal language model for this configuration.
    """
    kind = auto_class(config)
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except Exception as fault:  # whatever a configuration that makes no sense may raise
        reason = (str(fault) or type(fault).__name__).splitlines()[0]
        raise UnsupportedError(f"no causal language model for model type {config.model_type!r}: {reason}") from fault


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes and loads the model of a configuration: one that continues text.

    ``AutoModelForCausalLM`` wherever it gives the class that the configuration names; for what also reads images or
    sound, ``AutoModelForImageTextToText`` or ``AutoModelForMultimodalLM``.

    Raises:
        UnsupportedError: the configuration names a class that does not continue text, or an encoder-decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    named = config.architectures[0] if config.architectures else None
    kinds: dict[Any, Any] = {
        transformers.AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    fitting = {kind: mapping[type(config)].__name__ for kind, mapping in kinds.items() if type(config) in mapping}
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if not is_encoder_decoder:
        for kind, name in fitting.items():
            if named in (name, None):
                return kind
        if getattr(transformers, str(named), None) is None or getattr(config, "auto_map", None):
            return transformers.AutoModelForCausalLM  # a class that transformers does not know
    what = named or f"model type {config.model_type!r}"
    why = "is an encoder-decoder" if is_encoder_decoder else "does not continue text: it is no causal language model"
    hint = f" The language model of this type is {next(iter(fitting.values()))}." if fitting else ""
    raise UnsupportedError(
        f"{what} {why}, which is not supported.{hint} Decoder-only language models of transformers are, alone or "
        "within a model that also reads images or sound."
    )
