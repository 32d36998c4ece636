"""What PEFT's users do with a model, for eleven architectures: our own counterparts of PEFT's common tests."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, get_mediator_model
from mediator_peft.errors import AdapterError, RoutingError, UnsupportedError

from .models import ARCHITECTURES, fitted_model, settings_for, write_models

LIKE_LLAMA = ("mistral", "olmo2", "phi", "qwen2", "qwen3")
SOME = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_LLAMA else name for name in ARCHITECTURES]
"""All architectures; those whose layers are Llama's by slow tests."""

INPUTS = {"input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def base(architecture):
        if architecture not in made:
            made[architecture] = str(write_models(folder, architecture))
        return made[architecture]

    return base


@pytest.mark.parametrize("architecture", SOME)
@torch.no_grad()
def test_merge_unmerge_disable_generate_unload(bases, architecture):
    base = bases(architecture)
    model = fitted_model(base).eval()
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = model(**INPUTS, expert_weights="math").logits
    assert (expected - plain(**INPUTS).logits).abs().max() > 1e-3, "the adapter changes nothing"
    before = {name: tensor.clone() for name, tensor in get_base_model_state_dict(model).items()}
    assert before.keys() == plain.state_dict().keys()
    model.merge_adapter(expert_weights="math")
    torch.testing.assert_close(model(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    after = get_base_model_state_dict(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with model.disable_adapter():
        torch.testing.assert_close(model(**INPUTS).logits, plain(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    assert model.generate(**INPUTS, max_new_tokens=3, min_new_tokens=3).shape == (2, 6)
    merged = model.merge_and_unload(expert_weights="math", safe_merge=True)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(merged(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", SOME)
def test_training_with_either_gradient_checkpointing(bases, architecture):
    model = fitted_model(bases(architecture)).train()
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable
    assert all("mediator_router" in name for name in trainable)

    def gradients():
        for tensor in trainable.values():
            tensor.grad = None
        (model(**INPUTS).logits ** 2).sum().backward()
        return {name: tensor.grad.clone() for name, tensor in trainable.items()}

    expected = gradients()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", SOME)
@torch.no_grad()
def test_saved_and_loaded(bases, architecture, tmp_path):
    base = bases(architecture)
    model = fitted_model(base).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "saved")).eval()
    assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)
    fresh = get_mediator_model(AutoModelForCausalLM.from_pretrained(base), MediatorConfig(**settings_for(base))).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(**INPUTS).logits, model(**INPUTS).logits)


@torch.no_grad()
def test_a_fitted_state_goes_into_a_fresh_model_and_leaves_copies_alone(bases):
    base = bases("llama")
    fitted = fitted_model(base)
    fresh = get_mediator_model(AutoModelForCausalLM.from_pretrained(base), MediatorConfig(**settings_for(base)))
    duplicate = copy.deepcopy(fresh)
    changed = {key: tensor * 2 if ":scales" in key else tensor for key, tensor in fitted.state_dict().items()}
    expected = duplicate(**INPUTS, expert_weights="math").logits
    fresh.load_state_dict(changed)
    assert not torch.equal(fresh(**INPUTS, expert_weights="math").logits, expected)
    assert torch.equal(duplicate(**INPUTS, expert_weights="math").logits, expected)
    result = set_peft_model_state_dict(duplicate, get_peft_model_state_dict(fitted))
    assert not result.unexpected_keys
    # An adapter's tensors go without its configuration, in which fitting wrote, too.
    duplicate.base_model.set_extra_state(fitted.base_model.get_extra_state())
    assert torch.equal(duplicate(**INPUTS).logits, fitted(**INPUTS).logits)


@torch.no_grad()
def test_several_adapters_side_by_side(bases, tmp_path):
    base = bases("llama")
    model = fitted_model(base).eval()
    plain = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UnsupportedError, match="merge_method='base'"):
        model.add_adapter("average", MediatorConfig(**settings_for(base, merge_method="average")))
    model.add_adapter("dense", MediatorConfig(**settings_for(base, density=1.0, encoding="float")))
    first = model(**INPUTS, expert_weights="math").logits
    model.set_adapter("dense")
    second = model(**INPUTS, expert_weights="math").logits
    expert = copy.deepcopy(plain)
    tuned = AutoModelForCausalLM.from_pretrained(f"{base}-math").state_dict()
    expert.load_state_dict({key: tuned[key] for key in tuned if "_proj" in key}, strict=False)
    torch.testing.assert_close(second, expert(**INPUTS).logits, atol=1e-4, rtol=1e-4)
    assert (first - second).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "two", selected_adapters=["dense"])
    assert not (tmp_path / "two" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "two" / "dense"))
    assert torch.equal(loaded(**INPUTS, expert_weights="math").logits, second)
    both = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "dense"], expert_weights="math")
    weight = "model.layers.0.mlp.up_proj.weight"
    deltas = [
        model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_delta_weight(name, (("math", 1.0),))
        for name in ("default", "dense")
    ]
    torch.testing.assert_close(both.state_dict()[weight], get_base_model_state_dict(model)[weight] + sum(deltas))
    with pytest.raises(UnsupportedError, match="nonsense"):
        model.merge_and_unload(adapter_names=["nonsense"], expert_weights="math")


@torch.no_grad()
def test_after_the_last_adapter_the_backbone_is_left(bases):
    base = bases("llama")
    model = fitted_model(base).eval()
    model.delete_adapter("default")
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = plain(**INPUTS)
    assert torch.equal(model(**INPUTS).logits, expected.logits)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=2), plain.generate(**INPUTS, max_new_tokens=2))
    with model.disable_adapter():
        assert torch.equal(model(**INPUTS).logits, expected.logits)
    for ask in (model, model.generate):
        with pytest.raises(UnsupportedError, match="deleted"):
            ask(**INPUTS, expert_weights="math")
    model.add_adapter("new", MediatorConfig(**settings_for(base)))
    model.set_adapter("new")
    assert not torch.equal(model(**INPUTS, expert_weights="math").logits, plain(**INPUTS).logits)


@torch.no_grad()
def test_a_built_configuration_builds_again(bases):
    base, plain = bases("llama"), AutoModelForCausalLM.from_pretrained
    config = MediatorConfig(**settings_for(base))
    first = get_mediator_model(plain(base), config)(**INPUTS, expert_weights="code").logits
    for again in (config, copy.deepcopy(config)):
        assert torch.equal(get_mediator_model(plain(base), again)(**INPUTS, expert_weights="code").logits, first)


@torch.no_grad()
def test_a_saved_configuration_without_its_deltas_is_refused(bases, tmp_path):
    base = bases("llama")
    fitted_model(base).save_pretrained(tmp_path)
    empty = get_mediator_model(
        AutoModelForCausalLM.from_pretrained(base), MediatorConfig.from_pretrained(str(tmp_path))
    )
    with pytest.raises(UnsupportedError, match="has no deltas"):
        empty(**INPUTS, expert_weights="code")


@pytest.mark.parametrize("where", ["router", "bank"])
def test_safe_merge_finds_nan_before_it_writes(bases, where):
    model = fitted_model(bases("llama"))
    before = {name: tensor.clone() for name, tensor in get_base_model_state_dict(model).items()}
    if where == "router":
        model.router.weight.data[0] = torch.nan
    else:
        layer = model.get_submodule("base_model.model.model.layers.2.mlp.up_proj")
        layer.bank("default")._buffers["math:scales"][0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            merge(safe_merge=True, expert_weights="math")
    after = get_base_model_state_dict(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_a_merged_model_routes_nothing_and_says_so(bases):
    model = fitted_model(bases("llama")).eval()
    with pytest.raises(RoutingError, match="which mix"):
        model.merge_adapter()
    with pytest.raises(UnsupportedError, match="no mix is merged"):
        model.unmerge_adapter()
    model.merge_adapter(expert_weights="math")
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter(expert_weights="math")
    for use in (
        lambda: model(**INPUTS, expert_weights="code"),
        lambda: model.generate(**INPUTS, expert_weights="code"),
        lambda: model.use_experts("code").__enter__(),
        lambda: model.route(**INPUTS),
    ):
        with pytest.raises(UnsupportedError, match="merged"):
            use()
    with model.disable_adapter():
        pass
    expected = fitted_model(bases("llama")).eval()(**INPUTS).logits
    assert torch.equal(model(**INPUTS).logits, expected), "disabling takes the mix out"
    with model.use_experts("code"), pytest.raises(UnsupportedError, match="under way"):
        model.merge_adapter(expert_weights="math")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_routes_again_and_so_does_the_model(bases, copied):
    model = fitted_model(bases("llama"))
    with torch.no_grad():
        expected = model(**INPUTS, expert_weights="math").logits
        model.merge_adapter(expert_weights="code")
        with pytest.warns(UserWarning, match="taken out again"):
            other = copied(model)
        for routed in (other, model):
            torch.testing.assert_close(routed(**INPUTS, expert_weights="math").logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_a_merged_mix_compiles_into_one_graph_and_exports(bases, architecture):
    model = fitted_model(bases(architecture)).eval()
    expected = model(**INPUTS, expert_weights="math").logits
    model.merge_adapter(expert_weights="math")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)
    exported = torch.export.export(model, (), {**INPUTS, "use_cache": False}).module()
    torch.testing.assert_close(exported(**INPUTS, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_mix_becomes_a_lora(bases):
    base = bases("llama")
    model = fitted_model(base).eval()
    config, tensors = model.convert_to_lora(1.0, "math")
    from peft import get_peft_model

    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    expected = model(**INPUTS, expert_weights="math").logits
    torch.testing.assert_close(lora(**INPUTS).logits, expected, atol=1e-3, rtol=1e-3)
    assert not model.supports_lora_conversion()


@torch.no_grad()
def test_a_tied_head_keeps_its_name(bases):
    base = bases("gpt2")
    model = fitted_model(base, target_modules=["all-linear", "wte"])
    assert get_base_model_state_dict(model).keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["layers_to_transform", "bias"])
def test_fields_of_other_methods_are_explained(name):
    from mediator_peft.errors import ConfigError

    with pytest.raises(ConfigError, match="not a field of MediatorConfig: "):
        MediatorConfig(**{name: [0]})
