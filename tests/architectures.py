"""A tiny model of every causal architecture of the installed transformers, made from its own configuration class."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.errors import UnsupportedError
from mediator_peft.structure import LinearLayer, Structure, find_structure

CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

PROMPT = torch.tensor([[7, 9, 12, 30, 22, 8, 55, 60], [5, 44, 71, 13, 90, 6, 101, 33]])

# What a size is called → how large it is made; only what a configuration class knows is given to it.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("hidden_size_global", "word_embed_proj_dim", "embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "mlp_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "num_global_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "dim_head", "attention_head_dim", "kv_channels", "d_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "original_max_position_embeddings"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim", "laurel_rank", "d_rel"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "rotary_dim", "qk_pos_emb_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "sliding_window", "attention_chunk_size"), 16),
    **dict.fromkeys(("sliding_window_size", "attention_window_size", "local_attention_window_len"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
}

# Layers of several kinds, in the names of the present and of the former.
_HYBRID = ["linear_attention", "full_attention"] * 2
_MLA = {"num_key_value_heads": 4, "num_attention_heads": 4}
# What one configuration class needs beside or instead of these sizes.
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_MLA, "layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_MLA, "per_layer_config": None},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_MLA, "layer_types": _HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "moshi": {"audio_vocab_size": 64},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
              "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 4,
               "attention_hidden_size": 64, "head_dim": 16, "mamba_headdim": 16, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> PretrainedConfig:
    """A small configuration of one model type."""
    return _tiny(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def _tiny(kind: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    plain = kind()
    known = set(plain.to_dict()) | set(kind.attribute_map)
    settings = {name: size for name, size in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        settings.pop("head_dim", None)
        settings |= _MLA
    for name in kind.sub_configs:
        inner = getattr(plain, name, None)
        if isinstance(inner, PretrainedConfig) and getattr(type(inner), "model_type", ""):
            settings[name] = _tiny(type(inner), own.get(name, {})).to_dict()
    settings |= {name: value for name, value in own.items() if name not in kind.sub_configs}
    return kind(**settings)


def tiny_architecture(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of one type, with weights large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


class Outcome(NamedTuple):
    """What became of one architecture."""

    status: str
    """``works``; ``refused``, by this library and with its reason; ``failing``; or ``not tried``, since no tiny model
    of it runs in transformers itself."""

    detail: str = ""
    routed: float = 0.0
    """Share of the parameters of the blocks that get deltas."""

    notes: tuple[str, ...] = ()
    """What the build's report says of tensors without deltas."""


def round_trip(model_type: str, folder: Path) -> Outcome:
    """Build two experts of one architecture exactly, load them, and compare each named expert with the model itself.

    From files, around a model in memory, and as saved from memory.

    The experts differ from the base in the linear layers of the blocks.
    """
    try:
        base = tiny_architecture(model_type)
        with torch.no_grad():
            plain = base(PROMPT).logits
        base.save_pretrained(folder / "base")
        again = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        with torch.no_grad():
            is_same = torch.allclose(again(PROMPT).logits, plain, atol=1e-4)
    except Exception as fault:  # whatever a tiny model that makes no sense may raise
        return Outcome("not tried", _first_line(fault))
    if not is_same:
        return Outcome("not tried", "transformers' own save and load give other logits")
    try:
        structure = find_structure(base)
        experts = {"math": _tuned(base, structure, 1), "code": _tuned(base, structure, 2)}
        for name, expert in experts.items():
            expert.save_pretrained(folder / name)
        settings: dict[str, Any] = {"density": 1.0, "encoding": "float", "routed_layers": "all"}
        paths = {name: str(folder / name) for name in experts}
        report = build_mediator(folder / "base", paths, folder / "out", MediatorConfig(**settings))
        in_memory = get_mediator_model(again, MediatorConfig(experts=paths, **settings))
        in_memory.save_pretrained(folder / "adapter")
        built = load_mediator(folder / "out")[0]
        edited = load_mediator(folder / "out")[0]
        edited.remove_expert("code")
        edited.add_expert("code", paths["code"])
        models = {
            "built": built,
            "edited": edited,
            "in memory": in_memory.eval(),
            "saved from memory": load_mediator(folder / "adapter")[0],
        }
        with torch.no_grad():
            for (way, model), (name, expert) in product(models.items(), {**experts, "base": base}.items()):
                difference = (model(PROMPT, expert_weights=name).logits - expert(PROMPT).logits).abs().max()
                if not difference < 1e-3:
                    return Outcome("failing", f"{way}, {name}: logits differ by {difference:.1e}")
            fault = _fault_of_mixed_batch(built, experts)
            if fault is not None:
                return Outcome("failing", fault)
            if all(torch.allclose(expert(PROMPT).logits, plain, atol=1e-2) for expert in experts.values()):
                return Outcome("failing", "the experts give the base's logits: nothing was tried")
    except UnsupportedError as fault:
        return Outcome("refused", _first_line(fault))
    except Exception as fault:
        return Outcome("failing", f"{type(fault).__name__}: {_first_line(fault)}")
    blocks = base.get_submodule(structure.blocks)
    routed = sum(_tensors(base, layer)[0].numel() for layer in structure.layers)
    notes = tuple(note for note in report.notes if "mixture" in note or "outside of the language" in note)
    return Outcome("works", routed=routed / sum(value.numel() for value in blocks.parameters()), notes=notes)


def _tuned(base: PreTrainedModel, structure: Structure, seed: int) -> PreTrainedModel:
    """A copy with other weights in the linear layers of the blocks."""
    model, generator = deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in structure.layers:
            for value in _tensors(model, layer):
                value += torch.randn(value.shape, generator=generator) * 0.1
    return model


def _tensors(model: PreTrainedModel, layer: LinearLayer) -> list[torch.Tensor]:
    """Weight of a layer, and its bias if it has one."""
    if layer.part is not None:
        names = [name for name in (layer.part.tensor, layer.part.bias) if name is not None]
        return [model.get_parameter(name)[layer.part.number] for name in names]
    module = model.get_submodule(layer.name)
    return [value for value in (module.weight, module.bias) if value is not None]


def _fault_of_mixed_batch(model: Any, experts: Mapping[str, PreTrainedModel]) -> str | None:
    """What is wrong with a batch whose rows have different experts; None where nothing is, or where it is refused."""
    try:
        logits = model(PROMPT, expert_weights=["math", "code"]).logits
    except UnsupportedError:
        return None
    for row, name in enumerate(("math", "code")):
        difference = (logits[row] - experts[name](PROMPT).logits[row]).abs().max()
        if not difference < 1e-3:
            return f"two experts in a batch, {name}: logits differ by {difference:.1e}"
    return None


def _first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"

_HEAD = """# Architectures

Which causal language models of transformers {version} work. Written by `python -m tests.architectures`, which makes a
tiny random model of each type in the mapping of `AutoModelForCausalLM`, fine-tunes two experts of it at random, builds
them with density 1 and `encoding="float"`, loads the output, and compares the logits of each named expert, and of the
base, with the model's own (largest difference below 1e-3). The same is done with `get_mediator_model` around the loaded
base, with what that saves, and with a batch whose rows have different experts.

- **works**: as said. *Routed* is the share of the blocks' parameters that gets deltas; all others are averaged
  (convolutions, states, norms, and mixtures of experts whose module has an interface of its own).
- **refused**: `UnsupportedError`, with this reason.
- **not tried**: no tiny model of it runs in transformers itself, or its own saved file gives other logits.

{counts}

Beyond this table:

- **Mixtures of experts.** Each matrix of a fused tensor (E, O, I) is merged and routed as a linear layer (see the end).
  The gates that choose among them stay the base's, since averaged gates choose other experts; name them in
  `target_modules` to merge them. The build's report says so.
- **Hybrids and state-space models.** Some (Mamba) compute with a layer's weight past the layer: there all prompts
  of a batch must have the same expert weights, anything else is refused.
- **Models that read images or sound** (Gemma 3, Qwen-VL, ...): the language model is merged and routed. Encoders and
  projectors are carried over where they are equal in base and experts; an expert with another one is refused by name.
- **Encoder-decoders** (T5, BART), **classifiers**, **embedding models and encoders** are refused by name.
- Names in files that are not the model's (GPT-2 without `transformer.`, `embed_out`, one matrix for each expert) are
  translated by transformers' own conversion rules. The output has the model's names.

| type | class | outcome | routed | remarks |
|---|---|---|---|---|
"""

_TAIL = """
## Fused mixtures of experts

A tensor `mlp.experts.gate_up_proj` (E, O, I) holds the matrices of E experts of a mixture. It is merged and routed as
E linear layers.

- **Which.** Modules that follow transformers' interface for experts (`use_experts_implementation`): they are called
  with all tokens (N, H), the ids of their experts (N, k) and weights (N, k), and note the layout of their tensors.
  (E, I, O) with biases (E, O), as in gpt-oss, is read as `Conv1D` is. Fused tensors of other modules (Llama 4, JetMoE,
  DBRX) are averaged, and so are all of them where the merge method reads `merge_data`, which has numbers for whole
  tensors. The build's report says which tensors have deltas, and why others have none.
- **Merging.** Matrix `e` of `mlp.experts.gate_up_proj` is the layer `mlp.experts.gate_up_proj.<e>`, with a threshold,
  sign consensus, density, conflict counts and size of its own. All of a tensor are meant by its name in
  `target_modules` (`gate_up_proj`), all of a module by that of the module (`experts`). Files of the backbone hold the
  fused tensor; the adapter has a delta for each matrix. Checkpoints with one matrix for each expert (Mixtral's
  `block_sparse_moe.experts.0.w1`) are fused by transformers' conversion rules, one tensor at a time; of fused ones only
  the rows at hand are read. Both give the same bytes.
- **Gates** stay the base's, unless they are named in `target_modules`: averaged gates choose other experts. A fine-tune
  that changed its gates is therefore not restored by naming it.
- **Running.** A wrapper takes the place of the `experts` module; the weight of each layer is a view of the fused
  tensor. Where all rows of a batch have one mix, it is written into the weights and taken out again, bit for bit.
  Otherwise the module runs once for each mix, over the tokens of its rows, with `D + sum_k w_k S_k` in the place of its
  tensors. Only matrices of experts that these tokens are sent to are formed. This is a dense path: it needs memory for
  one more copy of a block's fused tensors, and forms the matrices anew at every step of a generation;
  `cache_merged_experts` keeps them. It works under `eager`, `batched_mm` and `grouped_mm`; a test compares each with a
  dense formula.
- **PEFT.** LoRA experts that change fused tensors (`target_parameters`) are folded into them. Here another wrapper runs
  them: PEFT's is a parametrization, which gives one weight for a whole batch; rows could not have different mixes.
- **Refused:** fused tensors that are quantised, offloaded or sharded; inputs that are not one entry a token, where rows
  have different mixes; `convert_to_lora`.
- **Not done:** checks for locked checkpoints, unusual distances and hints look at other layers only. Measured
  statistics (`mediator-peft measure`) and searches treat a fused tensor as a whole.
"""


def table_rows(text: str) -> dict[str, str]:
    """Model type → its row in the document."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


def write_document(outcomes: Mapping[str, Outcome]) -> None:
    """Write ``docs/architectures.md``."""
    rows = []
    for kind, outcome in sorted(outcomes.items()):
        share = f"{outcome.routed:.0%}" if outcome.status == "works" else ""
        remarks = "; ".join([outcome.detail.replace("|", "\\|"), *map(_remark, outcome.notes)]).strip("; ")
        rows.append(
            f"| `{kind}` | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | {outcome.status} | {share} | {remarks} |"
        )
    DOCUMENT.write_text(document(rows), encoding="utf-8")


def document(rows: Sequence[str]) -> str:
    """The whole text around the rows of the table."""
    counts = Counter(row.split(" | ")[2].strip() for row in rows)
    said = ", ".join(f"{number} {status}" for status, number in sorted(counts.items(), reverse=True))
    head = _HEAD.format(version=transformers.__version__, counts=f"{len(rows)} types: {said}.")
    return head + "\n".join(rows) + "\n" + _TAIL


def _remark(note: str) -> str:
    if "fused" in note:
        return "fused experts averaged" if "averaged" in note else "fused experts: deltas"
    return "gates from the base" if "gates" in note else "towers carried over"


def main() -> None:
    """Try every architecture and write the document; or only those named, and write nothing."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = {}
    for kind in sys.argv[1:] or CAUSAL:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[kind] = round_trip(kind, Path(folder))
        print(kind, *outcomes[kind], flush=True)
    if len(outcomes) == len(CAUSAL):
        write_document(outcomes)


if __name__ == "__main__":
    main()
