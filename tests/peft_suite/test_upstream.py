"""PEFT's own common tests for decoder models, with our configuration. None is copied: ``PEFT_SOURCE`` names an
unpacked source distribution of PEFT (``pip download peft --no-binary :all: --no-deps``); without it these are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, MediatorModel
from mediator_peft.errors import MediatorError
from mediator_peft.tuner.saving import writing_files

from .models import ARCHITECTURES, fit, settings_for, write_models

SOURCE = os.environ.get("PEFT_SOURCE")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="PEFT_SOURCE does not name PEFT's sources")


def _upstream():
    """PEFT's module of common tests, imported from its sources; image models are not wanted."""
    package = types.ModuleType("peft_source_tests")
    package.__path__ = [str(Path(SOURCE) / "tests")]
    sys.modules.setdefault("peft_source_tests", package)
    if importlib.util.find_spec("diffusers") is None:
        sys.modules["diffusers"] = types.SimpleNamespace(StableDiffusionPipeline=type(None))
    return importlib.import_module("peft_source_tests.testing_common")


REFUSED = {
    "_test_adding_multiple_adapters_with_bias_raises": "there is no field 'bias'",
    "_test_merge_layers_multi": "a second adapter has a router of its own, which is not fitted",
    "_test_training_layer_indexing": "there is no field 'layers_to_transform', but 'routed_layers'",
}
"""Tests that end in an error of ours, and why."""

LEFT_OUT = {
    "_test_add_adapter_no_autocast_adapter_dtype": "the router is in float32, whatever the backbone's dtype",
    "_test_passing_input_embeds_works": "has other arguments; embeddings without token ids are refused",
}
"""Tests that ask for what is not wanted here."""

BY_ROUNDING = {("_test_safe_merge", "olmo2")}
"""Tests with a tolerance of 1e-6 that is missed on some processors: sums of merged weights are taken in another order
(1.8e-6 there)."""

METHODS = {}
"""Name of a test → further arguments."""
if SOURCE is not None:
    common = _upstream()
    METHODS = {
        name: (False,) if name == "_test_generate_pos_args" else ()
        for name in dir(common.PeftCommonTester)
        if name.startswith("_test_")
        and name not in LEFT_OUT
        and not name.startswith("_test_weighted_combination_of_adapters_")
    }


def _tensors_of_files(model, *args, **kwargs):
    """What a file would hold: a state dict carries the router's settings as well, which a file has beside it."""
    with writing_files():
        return get_peft_model_state_dict(model, *args, **kwargs)


def _with_a_mix(merge):
    """PEFT's tests merge without a mix: the one that their prompts are routed to."""
    return lambda *args, **kwargs: merge(*args, **{"expert_weights": "math", **kwargs})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write_models(folder, name)) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_upstream(bases, method, architecture, request):
    class Tester(common.PeftCommonTester):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self):
            return {
                "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
                "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
            }

        def check_modelcard(self, tmp_dirname, model):
            # PEFT names one model; ours may name the experts beside it.
            card = ModelCard.load(Path(tmp_dirname) / "README.md").data
            named = card.base_model if isinstance(card.base_model, list) else [card.base_model]
            assert card.library_name == "peft"
            # A card is for others: it names hub ids, and no folder of this machine.
            assert named == [None] or model.config.name_or_path in named

    if method == "_test_safe_merge" and ARCHITECTURES[architecture].tie_word_embeddings:
        pytest.skip("the test writes tied tensors with safetensors, which refuses them")
    if (method, architecture) in BY_ROUNDING:
        request.applymarker(pytest.mark.xfail(raises=AssertionError, strict=False, reason="rounding"))
    base = bases[architecture]
    real = common.get_peft_model

    def wrap(model, config, *args, **kwargs):
        model = real(model, config, *args, **kwargs)
        return fit(model) if isinstance(config, MediatorConfig) else model

    with (
        mock.patch.object(common, "get_peft_model", wrap),
        mock.patch.object(common, "get_peft_model_state_dict", _tensors_of_files),
        mock.patch.object(common, "hub_online_once", return_value=nullcontext()),
        mock.patch.object(MediatorModel, "merge_adapter", _with_a_mix(MediatorModel.merge_adapter)),
        mock.patch.object(MediatorModel, "merge_and_unload", _with_a_mix(MediatorModel.merge_and_unload)),
    ):
        run = getattr(Tester(), method)
        arguments = (base, MediatorConfig, settings_for(base), *METHODS[method])
        if method in REFUSED:
            with pytest.raises(MediatorError):
                run(*arguments)
        else:
            run(*arguments)
