"""What is saved comes back bit for bit, and what does not fit is refused."""

import copy
import json
import os
import pickle
import stat

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import fine_tuned, random_prompts, tiny_model, write_tiny_checkpoints
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator
from mediator_peft.checkpoints.adapter_files import give_usual_mode
from mediator_peft.errors import AdapterError, BackboneMismatchError, ConfigError, MediatorError
from mediator_peft.routing.feature_cache import FeatureCache

from .conftest import build_and_fit


def same_state(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def same_routes(one, other, prompts):
    return all(torch.equal(a, b) for a, b in zip(one.route(prompts), other.route(prompts), strict=True))


@pytest.mark.parametrize("encoding", ["sign", "float"])
@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2", "qwen2"])
def test_save_and_load_are_bit_equal_router_included(tmp_path, topics, tokenizer, arch, encoding):
    model = build_and_fit(tmp_path, topics, tokenizer, arch, encoding=encoding)
    model.save_pretrained(tmp_path / "out" / "mediator")
    again, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    assert same_state(model, again)
    prompts = random_prompts()
    assert same_routes(model, again, prompts)
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompts).logits, again(input_ids=prompts).logits)


def test_an_in_memory_model_is_saved_with_its_backbone(tmp_path, checkpoints, topics, tokenizer):
    experts = {name: str(checkpoints[name]) for name in ("math", "code")}
    model = get_mediator_model(tiny_model(), MediatorConfig(experts=experts, density=0.3))
    model.fit_router(topics, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_mediator(tmp_path / "adapter", dtype=torch.float32)
    assert same_state(model, again)
    assert same_routes(model, again, random_prompts())
    (tmp_path / "adapter").rename(tmp_path / "moved")
    moved, _ = load_mediator(tmp_path / "moved", dtype=torch.float32)
    assert same_state(model, moved)
    assert not (tmp_path / "second" / "backbone").exists()


def multimodal_checkpoints(folder):
    """Base and experts of a model whose names on disk are not those in memory; name → folder."""
    text = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(
        text_config={**text, "num_key_value_heads": 2, "head_dim": 8}, mm_tokens_per_image=4,
        vision_config={**vision, "patch_size": 14}, boi_token_index=90, eoi_token_index=91, image_token_index=92,
    )  # fmt: skip
    base = Gemma3ForConditionalGeneration(config).eval()
    tuned = {name: fine_tuned(base, seed, only=["gate_proj"]) for seed, name in enumerate(("math", "code"))}
    models = {"base": base, **tuned}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    assert not load_file(folder / "base" / "model.safetensors").keys() & dict(base.named_parameters()).keys()
    return {name: str(folder / name) for name in models}, models


def test_a_changed_backbone_is_saved_where_its_files_have_other_names(tmp_path):
    paths, models = multimodal_checkpoints(tmp_path)
    experts = {name: paths[name] for name in ("math", "code")}
    config = MediatorConfig(experts=experts, density=1.0, encoding="float", routed_layers="all")
    base = Gemma3ForConditionalGeneration.from_pretrained(paths["base"])
    get_mediator_model(base, config).save_pretrained(tmp_path / "adapter")
    again, _ = load_mediator(tmp_path / "adapter")
    prompts = random_prompts()
    with torch.no_grad():
        for name, model in models.items():
            expected = model(input_ids=prompts).logits
            torch.testing.assert_close(again(input_ids=prompts, expert_weights=name).logits, expected)
    again.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "backbone").exists()  # unchanged, under other names


def test_a_backbone_that_lies_somewhere_is_not_written_again(tmp_path, model):
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "backbone").exists()
    again, _ = load_mediator(tmp_path / "adapter", dtype=torch.float32)
    assert same_state(model, again)


def test_peft_loads_it(tmp_path, model):
    model.save_pretrained(tmp_path / "out" / "mediator")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = backbone(random_prompts()).logits
    for kwargs in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        again = PeftModel.from_pretrained(backbone, str(tmp_path / "out"), subfolder="mediator", **kwargs)
        with torch.no_grad():
            assert torch.equal(model(input_ids=random_prompts()).logits, again(input_ids=random_prompts()).logits)
            with again.disable_adapter():
                assert torch.equal(plain, again(input_ids=random_prompts()).logits)


def test_auto_peft_model_loads_an_adapter_with_an_absolute_reference(tmp_path, model):
    model.save_pretrained(tmp_path / "elsewhere" / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "elsewhere" / "adapter"), dtype=torch.float32)
    assert same_state(model, again)


def test_get_peft_model_is_get_mediator_model(checkpoints):
    settings = dict(experts={name: str(checkpoints[name]) for name in ("math", "code")}, density=0.3)
    assert same_state(
        get_peft_model(tiny_model(), MediatorConfig(**settings)),
        get_mediator_model(tiny_model(), MediatorConfig(**settings)),
    )


def test_plain_automodel_gives_the_average(tmp_path, model):
    experts = [AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / name) for name in ("math", "code")]
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in average.state_dict().items():
        expected = (experts[0].state_dict()[name] + experts[1].state_dict()[name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_copies_and_pickles_work_and_are_independent(model):
    prompts = random_prompts()
    with torch.no_grad(), model.use_experts("math"):
        expected = model(input_ids=prompts).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(input_ids=prompts, expert_weights="math").logits, expected)
            with model.disable_adapter():
                assert torch.equal(twin(input_ids=prompts, expert_weights="math").logits, expected)
            assert twin.base_model.board is not model.base_model.board
            assert next(iter(twin.routed_layers().values())).board is twin.base_model.board


def test_merge_and_unload_gives_a_plain_model_of_the_mix(tmp_path, model):
    prompts = random_prompts()
    mix = {"math": 0.6, "base": 0.4}
    with torch.no_grad():
        expected = model(input_ids=prompts, expert_weights=mix).logits
        with copy.deepcopy(model).use_experts(mix) as inner:
            inside = inner.merge_and_unload()
        merged = model.merge_and_unload(expert_weights=mix, safe_merge=True)
        for plain in (inside, merged):
            assert not any("ediator" in type(module).__name__ for module in plain.modules())
            torch.testing.assert_close(plain(prompts).logits, expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(prompts).logits, merged(prompts).logits)


def test_merging_without_a_mix_is_refused(model):
    with pytest.raises(MediatorError, match="which mix"):
        model.merge_and_unload()
    with pytest.raises(MediatorError, match="rows"):
        model.merge_and_unload(expert_weights=["math", "code"])


def test_unload_gives_the_backbone_back(tmp_path, model):
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.generate(random_prompts(1), max_new_tokens=2, expert_weights="math")
    bare = model.unload()
    assert type(bare) is type(plain)
    assert same_state(bare, plain)
    assert torch.equal(bare(random_prompts()).logits, plain(random_prompts()).logits)


def test_only_the_router_trains(tmp_path, model):
    model.save_pretrained(tmp_path / "out" / "mediator")
    trainable, _ = load_mediator(tmp_path / "out", is_trainable=True)
    names = [name for name, parameter in trainable.named_parameters() if parameter.requires_grad]
    assert names
    assert all("mediator_router" in name for name in names)
    trainable.set_adapter("default")
    with trainable.disable_adapter():
        pass
    assert [name for name, parameter in trainable.named_parameters() if parameter.requires_grad] == names
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_leaves_the_bank_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "mediator_bank" in name}
    model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if "mediator_bank" in name:
            assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        assert model(input_ids=random_prompts(), expert_weights="math").logits.dtype == torch.bfloat16


def test_the_adapter_file_holds_flat_tensors_only(tmp_path, model):
    model.save_pretrained(tmp_path / "out" / "mediator")
    for name, tensor in load_file(tmp_path / "out" / "mediator" / "adapter_model.safetensors").items():
        assert tensor.ndim == 1, name


def test_a_wrong_backbone_of_equal_shapes_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path / "out" / "mediator")
    for wrong in (tiny_model(seed=9), AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "base")):
        with pytest.raises(BackboneMismatchError, match="not the backbone"):
            PeftModel.from_pretrained(wrong, str(tmp_path / "out" / "mediator"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_right_backbone_in_another_dtype_is_accepted(tmp_path, model, dtype):
    model.save_pretrained(tmp_path / "out" / "mediator")
    again, _ = load_mediator(tmp_path / "out", dtype=dtype)
    assert again.dtype == dtype


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(change):
    def damage(path):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _first(tensors, part):
    return next(name for name in tensors if name.endswith(part))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged or cut short"),
        (lambda path: path.unlink(), "no adapter_model.safetensors"),
        (lambda path: path.write_bytes(b"nonsense"), "damaged"),
        (_edit(lambda tensors: tensors.pop(_first(tensors, "math:mask"))), "lacks tensors"),
        (_edit(lambda tensors: tensors.update(surprise=torch.zeros(2))), "unknown tensors surprise"),
        (
            _edit(lambda tensors: tensors.update({_first(tensors, ":mask"): torch.ones(9, dtype=torch.uint8)})),
            "damaged",
        ),
        (_edit(lambda tensors: tensors.update({_first(tensors, ":signs"): torch.ones(1, dtype=torch.uint8)})), "signs"),
        (_edit(lambda tensors: tensors.update({_first(tensors, ":scales"): torch.ones(3)})), "3 entries"),
        (_edit(lambda tensors: tensors.pop(_first(tensors, "router.means"))), "router"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path, model, damage, message):
    model.save_pretrained(tmp_path / "out" / "mediator")
    damage(tmp_path / "out" / "mediator" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_mediator(tmp_path / "out", verify_files=False)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_mediator(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format_version=99), "format version 99"),
        (dict(denssity=0.1), "Did you mean 'density'"),
        (dict(peft_type="LORA"), "does not describe"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, model, change, message):
    path = tmp_path / "out" / "mediator" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        load_mediator(tmp_path / "out")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(AdapterError, match="no folder"):
        load_mediator(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no Mediator adapter"):
        load_mediator(tmp_path / "empty")


def test_identical_experts_need_no_routed_layer(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints", names=["base", "math"])
    report = build_mediator(paths["base"], {"a": paths["math"], "b": paths["math"]}, tmp_path / "out", MediatorConfig())
    assert report.routed_blocks == []
    model, _ = load_mediator(tmp_path / "out", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(paths["math"], dtype=torch.float32)
    with torch.no_grad():
        got = model(input_ids=random_prompts(), expert_weights="a").logits
    torch.testing.assert_close(got, expected(random_prompts()).logits)


def test_a_second_adapter_can_be_added_set_and_deleted(tmp_path, model):
    model.save_pretrained(tmp_path / "out" / "mediator")
    prompts = random_prompts()
    with torch.no_grad():
        expected = model(input_ids=prompts).logits
        model.load_adapter(str(tmp_path / "out" / "mediator"), adapter_name="second")
        model.set_adapter("second")
        assert torch.equal(model(input_ids=prompts).logits, expected)
        model.delete_adapter("default")
        assert torch.equal(model(input_ids=prompts).logits, expected)
    assert model.get_model_status().available_adapters == ["second"]


def test_building_on_a_model_that_carries_an_adapter_is_refused(checkpoints, model):
    config = MediatorConfig(experts={"math": str(checkpoints["math"])})
    with pytest.raises(MediatorError):
        model.add_adapter("again", config)


def test_experts_are_needed():
    with pytest.raises(ConfigError, match="no experts"):
        get_mediator_model(tiny_model(), MediatorConfig())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read_what_was_written(tmp_path, checkpoints, umask):
    model = get_mediator_model(tiny_model(), MediatorConfig(experts={"math": str(checkpoints["math"])}, density=0.3))
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "adapter")
        model.get_base_model().save_pretrained(tmp_path / "whole")
        give_usual_mode(tmp_path / "whole")
        FeatureCache("origin", tmp_path / "features").put({"key": torch.zeros(3)})
    finally:
        os.umask(before)
    folders = [tmp_path / name for name in ("adapter", "whole", "features")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
