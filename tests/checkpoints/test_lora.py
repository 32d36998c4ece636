"""LoRA adapters as experts, against PEFT's own merge."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mediator_peft import (
    MediatorConfig,
    build_mediator,
    get_mediator_model,
    load_mediator,
    plan_mediator,
    verify_mediator,
)
from mediator_peft.checkpoints import patterns
from mediator_peft.checkpoints.fused_parts import transposed_tensors
from mediator_peft.checkpoints.name_mapping import named_as_in_model
from mediator_peft.checkpoints.opening import Reading, open_checkpoint
from mediator_peft.checkpoints.tensor_inventory import outline_of
from mediator_peft.errors import AdapterError, CheckpointError, MediatorError
from mediator_peft.storage import to_tensor
from tests.architectures import tiny_config
from tests.tiny import tiny_model, write_tiny_checkpoints


def write_lora(base, folder, seed=0, **settings):
    """A LoRA with factors that do something."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged(base, adapter):
    """What PEFT makes of it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


KINDS = {
    "plain": {},
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3, "q_proj": 9}},
    "regex": {"rank_pattern": {r"layers\.[02]\.mlp\.down_proj": 3}},
    "all": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_are_those_of_peft(kind, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora", **KINDS[kind])
    expected = merged(base, adapter)
    build_mediator(base, {"one": adapter}, tmp_path / "out", MediatorConfig())
    found = load_file(tmp_path / "out" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [name for name in expected if not torch.equal(expected[name], plain[name])]
    assert changed
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_transposed_layers_and_biases(arch, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch=arch)["base"]
    targets = ["c_attn", "c_proj"] if arch == "gpt2" else ["q_proj", "gate_proj"]
    adapter = write_lora(
        base, tmp_path / "lora", target_modules=targets, bias="lora_only", fan_in_fan_out=arch == "gpt2"
    )
    expected = merged(base, adapter)
    build_mediator(base, {"one": adapter}, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        key = name if name in expected else f"transformer.{name}"
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


def test_full_and_lora_experts_mix(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, ("base", "full"))
    adapter = write_lora(paths["base"], tmp_path / "lora")
    settings = {"density": 1.0, "encoding": "float", "routed_layers": "all"}
    experts = {"full": str(paths["full"]), "lora": str(adapter)}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(**settings))
    found = load_file(tmp_path / "out" / "model.safetensors")
    full, lora = load_file(paths["full"] / "model.safetensors"), merged(paths["base"], adapter)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (full[name] + lora[name]) / 2, rtol=1e-5, atol=1e-6)
    report = verify_mediator(tmp_path / "out", against={"lora": adapter}, base=paths["base"])
    assert report.is_ok
    model = get_mediator_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]), MediatorConfig(experts=experts, **settings)
    )
    offline, _ = load_mediator(tmp_path / "out")
    ids = torch.arange(5, 25).reshape(2, 10)
    torch.testing.assert_close(model(ids, expert_weights="lora").logits, offline(ids, expert_weights="lora").logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_low_rank_expert_keeps_its_own_factors(arch, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch=arch)["base"]
    target = ["c_attn"] if arch == "gpt2" else ["q_proj", "down_proj"]
    # A scale that is no power of two, and another rank than the density's.
    kind = {"target_modules": target, "r": 3, "lora_alpha": 5}
    experts = {"lora": str(write_lora(base, tmp_path / "lora", **kind))}
    config = MediatorConfig(sparsifier="svd", merge_method="base", routed_layers="all")
    plan = plan_mediator(base, experts, config=config)
    build_mediator(base, experts, tmp_path / "out", config)
    weights = (tmp_path / "out" / "mediator" / "adapter_model.safetensors").stat().st_size
    assert plan.bytes["adapter"] == pytest.approx(weights, rel=0.05)
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    expected = merged(base, tmp_path / "lora")
    for name, layer in model.base_model.routed_layers().items():
        delta = layer.mediator_bank["default"].get("lora")
        change = expected[f"{name}.weight"] - load_file(base / "model.safetensors")[f"{name}.weight"]
        torch.testing.assert_close(delta.dense().T if arch == "gpt2" else delta.dense(), change, rtol=1e-4, atol=1e-6)
        is_targeted = any(name.endswith(part) for part in target)
        assert len(delta.parts["left"]) == (3 if is_targeted else 1) * delta.shape[0]
    ids = torch.arange(5, 25).reshape(2, 10)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(expected)
    torch.testing.assert_close(model(ids, expert_weights="lora").logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.base_model.add_expert("again", experts["lora"])
    for layer in model.base_model.routed_layers().values():
        bank = layer.mediator_bank["default"]
        for part in ("left", "right"):
            assert len(bank.get("again").parts[part]) == len(bank.get("lora").parts[part])
        torch.testing.assert_close(bank.get("again").dense(), bank.get("lora").dense(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def frozen(tmp_path):
    """An output of three LoRAs of which ``b`` and ``a`` have one A, as LoRA-FA and FlyLoRA train them, and no B."""
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    experts = {}
    for seed, name in enumerate(("c", "b", "a")):
        kind = {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 5}
        experts[name] = write_lora(base, tmp_path / name, seed=seed, **kind)
    weights = {name: load_file(experts[name] / "adapter_model.safetensors") for name in ("a", "b")}
    shared = {key: value for key, value in weights["a"].items() if "lora_A" in key}
    save_file(weights["b"] | shared, experts["b"] / "adapter_model.safetensors")
    config = MediatorConfig(sparsifier="svd", merge_method="base", routed_layers="all")
    build_mediator(base, experts, tmp_path / "out", config)
    return tmp_path / "out", base, experts


def stored_factors(out):
    """(layer, part) → column → what the file holds, of the matrices that LoRAs changed."""
    found = {}
    for key, value in load_file(out / "adapter_model.safetensors").items():
        layer, _, buffer = key.partition(".mediator_bank.")
        column, _, part = buffer.partition(":")
        if part in ("left", "right") and layer.endswith(("q_proj", "down_proj")):
            found.setdefault((layer, part), {})[column] = value
    return found


def test_equal_factors_of_several_experts_are_stored_once(frozen, tmp_path):
    out, base, experts = frozen
    factors = stored_factors(out / "mediator")
    assert len(factors) == 2 * 2 * 3
    for (_, part), columns in factors.items():
        # In place of the factor stands the name of the first expert that has it.
        assert (columns["b"].tolist() == [ord("a")]) == (part == "right")
        assert columns["a"].is_floating_point()
        assert columns["c"].is_floating_point()
    ids = torch.arange(5, 25).reshape(2, 10)
    for settings in ({}, {"max_resident_experts": 2}):
        model, _ = load_mediator(out, dtype=torch.float32, **settings)
        for name, path in experts.items():
            plain = AutoModelForCausalLM.from_pretrained(base)
            plain.load_state_dict(merged(base, path))
            torch.testing.assert_close(model(ids, expert_weights=name).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert verify_mediator(out, against=experts, base=base).is_ok
    model, _ = load_mediator(out)
    bank = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"].mediator_bank["default"]
    right = {name: bank.get(name).parts["right"].data_ptr() for name in experts}
    assert right["a"] == right["b"] != right["c"]
    model.save_pretrained(tmp_path / "again")
    again = stored_factors(tmp_path / "again")
    for place, columns in factors.items():
        assert all(torch.equal(again[place][column], value) for column, value in columns.items())
    # The other one keeps its factor when the first goes.
    model.base_model.remove_expert("a")
    model.save_pretrained(tmp_path / "without")
    assert all(columns["b"].is_floating_point() for columns in stored_factors(tmp_path / "without").values())


def test_a_reference_to_no_factor_is_damage(frozen):
    out, *_ = frozen
    path = out / "mediator" / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if key.endswith("q_proj.mediator_bank.b:right"))
    for name in (b"nobody", b"b", b"\xff"):
        save_file(weights | {key: torch.tensor(list(name), dtype=torch.uint8)}, path)
        with pytest.raises(AdapterError, match="is damaged"):
            load_mediator(out, verify_files=False)


REFUSED = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "layers replicated": ({"layer_replication": [[0, 2]]}, "replicated"),
    "another method": ({"peft_type": "IA3"}, "IA3"),
    "single tokens": ({"trainable_token_indices": [1]}, "tokens"),
    "bare parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "gate_up_proj', which the base has not"),
    "parameters without factors": ({"target_parameters": ["k_proj.weight"]}, r"factors are missing: 'model\.layers\.0"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "a variant of tomorrow": ({"use_nonesuch": True, "nonesuch_config": {"a": 1}}, "nonesuch_config: not known"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(kind, tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora")
    changes, message = REFUSED[kind]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(CheckpointError, match=message):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_a_lora_of_another_base_is_refused(tmp_path):
    base = write_tiny_checkpoints(tmp_path / "a", ("base",))["base"]
    other = write_tiny_checkpoints(tmp_path / "b", ("base",), arch="gpt2")["base"]
    adapter = write_lora(other, tmp_path / "lora", target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match="no such layer"):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_tied_embeddings_are_not_changed_on_one_side(tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",), arch="llama_tied")["base"]
    adapter = write_lora(base, tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(MediatorError, match="ties together"):
        build_mediator(base, {"one": adapter}, tmp_path / "out")


def test_a_damaged_adapter_file_is_named(tmp_path):
    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = write_lora(base, tmp_path / "lora")
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing or damaged"):
        open_checkpoint(str(adapter), "expert")


def test_rows_in_parts_are_the_rows_of_the_whole(tmp_path):
    from mediator_peft.merge.compatibility import check_job

    base = write_tiny_checkpoints(tmp_path, ("base",))["base"]
    adapter = open_checkpoint(str(write_lora(base, tmp_path / "lora")), "expert")
    check_job(open_checkpoint(str(base), "base"), {"one": adapter})
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = adapter.tensor(name).clone()
    for start in range(0, 32, 5):
        stop = min(32, start + 5)
        torch.testing.assert_close(
            to_tensor(adapter.read_rows(name, start, stop)), whole[start:stop], rtol=1e-6, atol=1e-7
        )


def saved_lora(base, folder, **options):
    """A LoRA with factors that are not zero, saved by PEFT, and the model that it makes of the base."""
    from copy import deepcopy

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    name = options.pop("name", "default")
    save = options.pop("save", {})
    model = get_peft_model(deepcopy(base), LoraConfig(**{**settings, **options}), adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, **save)
    return model.merge_and_unload()


def as_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def with_names_of_the_state(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    return folder


def beside_a_config(folder):
    tiny_model().config.save_pretrained(folder)
    return folder


READ = {
    "a .bin file": (as_pickle, {}),
    "names of the state": (with_names_of_the_state, {}),
    "beside a config.json": (beside_a_config, {}),
    "in a folder of its name": (lambda folder: folder, {"name": "poet"}),
    "beside a config.json, in a folder of its name": (beside_a_config, {"name": "poet"}),
    "patterns with repetitions": (
        lambda folder: folder,
        {"alpha_pattern": {r".*\.[0-1]\.self_attn\.q_pro+j": 64}, "rank_pattern": {r"layers\.\d+\.mlp\.down_proj": 2}},
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_adapters_are_found_and_read_however_they_were_saved(kind, tmp_path):
    change, options = READ[kind]
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    merged = saved_lora(base, tmp_path / "lora", **options).state_dict()
    change(tmp_path / "lora")
    expert = open_checkpoint(str(tmp_path / "lora"), "expert 'a'", Reading(allow_pickle=True))
    assert expert.bind(open_checkpoint(str(tmp_path / "base"), "base"), {}) == []
    for name, tensor in merged.items():
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=1e-5, atol=1e-5)


def test_a_pickled_adapter_is_read_on_request_only(tmp_path):
    base = tiny_model()
    saved_lora(base, tmp_path / "lora")
    as_pickle(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        open_checkpoint(str(tmp_path / "lora"), "expert 'a'")


def test_several_adapters_in_one_folder_must_be_told_apart(tmp_path):
    for name in ("poet", "cook"):
        saved_lora(tiny_model(), tmp_path / "lora", name=name)
    with pytest.raises(CheckpointError, match=r"several adapters \(cook, poet\)"):
        open_checkpoint(str(tmp_path / "lora"), "expert 'a'")


def test_a_whole_model_and_an_adapter_in_one_folder_must_be_told_apart(tmp_path):
    saved_lora(tiny_model(), tmp_path / "lora")
    tiny_model().save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="both"):
        open_checkpoint(str(tmp_path / "lora"), "expert 'a'")


def test_an_adapter_as_base_is_named(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    saved_lora(base, tmp_path / "lora")
    saved_lora(base, tmp_path / "other")
    for experts in ({"a": tmp_path / "base"}, {"a": tmp_path / "other"}):
        with pytest.raises(CheckpointError, match="it is a LoRA adapter, no whole model"):
            build_mediator(tmp_path / "lora", experts, tmp_path / "out")
        planned = plan_mediator(tmp_path / "lora", experts)
        assert sum("is a LoRA adapter" in problem for problem in planned.problems) == 1


@pytest.mark.parametrize("saved", ["both", "embedding", "head"])
def test_embeddings_of_a_tied_model_that_were_saved_unchanged_do_not_hinder(saved, tmp_path):
    base = tiny_model("llama_tied")
    base.save_pretrained(tmp_path / "base")
    merged = saved_lora(base, tmp_path / "lora", save={"save_embedding_layers": True}).state_dict()
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    names = {"embedding": "embed_tokens.weight", "head": "lm_head.weight"}
    assert any(name.endswith("embed_tokens.weight") for name in tensors)
    prefix = "base_model.model."
    tensors.setdefault(f"{prefix}lm_head.weight", tensors[f"{prefix}model.embed_tokens.weight"].clone())
    if saved != "both":
        tensors = {name: value for name, value in tensors.items() if "lora" in name or name.endswith(names[saved])}
    save_file(tensors, path)
    build_mediator(tmp_path / "base", {"a": tmp_path / "lora"}, tmp_path / "out", MediatorConfig(density=0.2))
    changed = {
        **tensors,
        f"{prefix}{'lm_head' if saved == 'head' else 'model.embed_tokens'}.weight": torch.ones(96, 32),
    }
    save_file(changed, path)
    with pytest.raises(CheckpointError, match=r"lm_head|embed_tokens"):
        build_mediator(tmp_path / "base", {"a": tmp_path / "lora"}, tmp_path / "out2", MediatorConfig(density=0.2))
    assert merged


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*.*)*x", "(?:o|o|_|l|a|y)*!", ".*.*.*.*.*.*.*.*.*!"])
def test_a_pattern_without_end_is_refused_in_time(key, pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    saved_lora(base, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings[key] = {pattern: 4}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    # Names that these patterns are slow on.
    path = tmp_path / "lora" / "adapter_model.safetensors"
    long = "a" * 200 + "_layo" * 40
    save_file({name.replace("q_proj", long): value for name, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=f"{key}|no such layer"):
        build_mediator(tmp_path / "base", {"a": tmp_path / "lora"}, tmp_path / "out")


def test_a_pointer_in_the_place_of_an_adapter_is_named(tmp_path):
    saved_lora(tiny_model(), tmp_path / "lora")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 4932307584\n"
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(str(tmp_path / "lora"), "expert 'a'")


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def mixture(request, tmp_path_factory):
    """A base with fused experts (E, O, I), or (E, I, O) with square matrices, whose layout no shape tells."""
    folder = tmp_path_factory.mktemp("mixture")
    config = tiny_config(request.param)
    config.intermediate_size = config.hidden_size
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    settings = {"target_parameters": FUSED, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    patterns_of_parameters = {
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}
    }  # fmt: skip
    write_lora(folder / "base", folder / "expert", **settings, **patterns_of_parameters)
    return folder


def bound(folder):
    base = open_checkpoint(str(folder / "base"), "base")
    outline = outline_of(base)
    expert = open_checkpoint(str(folder / "expert"), "expert 'math'")
    transposed = transposed_tensors(outline.structure.layers)
    return expert, expert.bind(named_as_in_model(base, outline), {}, transposed)


@torch.no_grad()
def test_factors_of_fused_experts_are_folded_as_by_peft(mixture):
    expert, faults = bound(mixture)
    assert faults == []
    expected = merged(mixture / "base", mixture / "expert")
    plain = AutoModelForCausalLM.from_pretrained(mixture / "base").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], expected[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "gate_up_proj", "down_proj"}
    for name in changed:
        torch.testing.assert_close(expert.tensor(name), expected[name])
        torch.testing.assert_close(to_tensor(expert.read_rows(name, 1, 3)), expected[name][1:3])
        torch.testing.assert_close(to_tensor(expert.read_rows(name, 3, 4)), expected[name][3:4])


def test_a_mixture_is_built_with_a_lora_of_its_experts(mixture, tmp_path):
    settings = MediatorConfig(density=1.0, encoding="float", routed_layers="all")
    build_mediator(mixture / "base", {"math": mixture / "expert"}, tmp_path / "out", settings)
    model, _ = load_mediator(tmp_path / "out")
    expert = AutoModelForCausalLM.from_pretrained(mixture / "base")
    expert.load_state_dict(merged(mixture / "base", mixture / "expert"))
    prompts = torch.tensor([[7, 9, 12, 30, 22, 8]])
    with torch.no_grad():
        expected = expert(prompts).logits
        torch.testing.assert_close(model(prompts, expert_weights="math").logits, expected, atol=1e-4, rtol=1e-4)


def test_factors_that_fit_no_targeted_parameter_are_refused(mixture, tmp_path):
    for name in ("base", "expert"):
        copytree(mixture / name, tmp_path / name)
    path = tmp_path / "expert" / "adapter_model.safetensors"
    factors = load_file(path)
    name = next(name for name in factors if name.endswith("experts.lora_A.weight"))
    save_file({**factors, name: factors[name][:, :-1].contiguous()}, path)
    _, faults = bound(tmp_path)
    assert len(faults) == 1
    assert "do not fit" in faults[0]
    assert "down_proj" in faults[0]
