"""Statistics of a model on prompts, and the merges that read them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorSettings, merge_models
from mediator_peft.checkpoints.fingerprint import fingerprint_of
from mediator_peft.errors import ConfigError, MediatorError, OutputError, OutputExistsError
from mediator_peft.evaluation import measuring
from mediator_peft.evaluation.measuring import measure_statistics
from mediator_peft.evaluation.model_statistics import Fisher, TokenSequence
from mediator_peft.structure import find_structure
from tests.tiny import fine_tuned, tiny_model

TEXTS = topic_texts(5, 90, 6)


@pytest.fixture
def models(tmp_path):
    """A base and two experts with tokenizers, and a file of prompts."""
    return written(tmp_path, "llama")


def written(folder, arch):
    base = tiny_model(arch)
    for number, name in enumerate(("base", "a", "b")):
        model = base if number == 0 else fine_tuned(base, number)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    lines = [json.dumps({"prompt": text, "answer": "w7 w8 w9"}) for text in TEXTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def measured(folder, statistic, expert="a", name=None, **options):
    output = folder / (name or f"{statistic}/{expert}.safetensors")
    report = measure_statistics(folder / expert, folder / "prompts.jsonl", output, statistic, **options)
    return output, report


def inputs_of(model, layer, sequences):
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, given, __: seen.append(given[0][0].numpy()))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    return np.concatenate(seen).astype(np.float64)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gram_matrices_and_norms_are_those_of_all_inputs(tmp_path, arch):
    folder = written(tmp_path, arch)
    model = fine_tuned(tiny_model(arch), 1)
    ids = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    gram, report = measured(folder, "gram")
    norms, _ = measured(folder, "norms")
    with safe_open(str(gram), framework="pt") as file:
        shared = json.loads(file.metadata()["shared"])
    found = {"gram": load_file(gram), "norms": load_file(norms)}
    layers = find_structure(model).layers
    assert report.num_tensors == len(layers) == len(found["gram"]) + len(shared)
    assert report.num_tokens == sum(map(len, ids))
    assert ("model.layers.1.self_attn.k_proj.weight" in shared) == (arch == "llama")
    for layer in layers:
        name = f"{layer.name}.weight"
        inputs = inputs_of(model, layer.name, ids)
        values = found["gram"][shared.get(name, name)].numpy()
        np.testing.assert_allclose(values, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
        values = found["norms"][shared.get(name, name)].numpy()
        np.testing.assert_allclose(values, np.sqrt((inputs**2).mean(axis=0)), rtol=1e-4, atol=1e-6)


def test_fisher_information_is_the_expectation_over_labels():
    model = tiny_model("llama").eval()
    statistic = Fisher(model, find_structure(model), seed=0)
    names = ["model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
    sums = {name: torch.zeros(shape) for name, shape in statistic.shapes().items() if name in names}
    sequence, count = TokenSequence((7, 30, 12), 2), 500
    for number in range(count):
        statistic.add(sums, sequence, number)
    # Every label, weighted by its probability: the definition.
    parameters = [model.get_parameter(name) for name in sums]
    logs = model(input_ids=torch.tensor([sequence.ids])).logits[0, -1].log_softmax(dim=-1)
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for log in logs:
        gradients = torch.autograd.grad(log, parameters, retain_graph=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total += log.exp().detach() * gradient**2
    for name, exact in zip(sums, expected, strict=True):
        found = statistic.finish(sums[name], count, 3 * count)
        assert float(found.sum() / exact.sum()) == pytest.approx(1.0, abs=0.15)
        assert float(torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)) > 0.95


@pytest.mark.parametrize("statistic", ["gram", "fisher"])
def test_a_killed_measurement_goes_on_and_gives_the_same_bytes_in_any_number_of_passes(models, statistic, monkeypatch):
    options = {"answer_column": "answer"} if statistic == "fisher" else {}
    whole, report = measured(models, statistic, **options)
    assert report.num_passes == 1
    small = 120_000
    monkeypatch.setattr(measuring, "_SECONDS_BETWEEN_SAVES", -1.0)
    calls = []

    def killed(advance_at):
        def progress(phase, total):
            from contextlib import nullcontext

            def advance():
                calls.append(phase)
                if len(calls) == advance_at:
                    raise KeyboardInterrupt

            return nullcontext(advance)

        return progress

    again = {"name": "again.safetensors", "memory_of_sums": small, **options}
    for stop in (4, 12):
        with pytest.raises(KeyboardInterrupt):
            measured(models, statistic, progress=killed(stop), **again)
    assert not (models / "again.safetensors").exists()
    output, report = measured(models, statistic, progress=killed(-1), **again)
    assert report.num_passes > 1
    # What was done before is not done again; the last sequence before a kill was not saved.
    assert len(calls) == report.num_passes * len(TEXTS) + 2
    assert output.read_bytes() == whole.read_bytes()
    assert not list(models.glob(".*partial"))


def test_two_processes_do_not_measure_into_one_file(models):
    target = models / "x.safetensors"
    refused = pytest.raises(OutputExistsError, match="another process")
    with measuring._partial_folder(target, {"a": "1"}), refused, measuring._partial_folder(target, {"a": "1"}):
        pass
    (models / ".x.safetensors.partial" / "notes.txt").write_text("mine")
    with pytest.raises(MediatorError, match="in the way"), measuring._partial_folder(target, {"a": "2"}):
        pass


@pytest.mark.parametrize(
    ("statistic", "options", "part"),
    [
        ("grams", {}, "Did you mean 'gram'"),
        ("gram", {"max_tokens": 1}, "max_tokens"),
        ("gram", {"name": "x.bin"}, "must end in .safetensors"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(tmp_path, statistic, options, part):
    with pytest.raises(ConfigError, match=part):
        measured(tmp_path, statistic, **options)


@pytest.mark.parametrize(("method", "statistic"), [("regmean", "gram"), ("fisher", "fisher"), ("ota", "fisher")])
def test_a_merge_reads_what_was_measured_and_refuses_another_model(models, method, statistic):
    for expert in "ab":
        measured(models, statistic, expert)
    settings = MediatorSettings(merge_method=method, merge_data=str(models / statistic))
    experts = {name: models / name for name in "ab"}
    found = {}
    for workers in (1, 2):
        merge_models(models / "base", experts, models / f"out{workers}", settings, workers=workers)
        found[workers] = (models / f"out{workers}" / "model.safetensors").read_bytes()
    assert found[1] == found[2]
    merged, base = load_file(models / "out1" / "model.safetensors"), load_file(models / "base" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    mean = sum(load_file(models / expert / "model.safetensors")[name] for expert in "ab") / 2
    # Nearer to the mean than the base is, and not the mean.
    distance = (merged[name] - mean).norm()
    assert 0.02 < distance / (base[name] - mean).norm() < 2
    with pytest.raises(ConfigError, match=r"expert 'a' was measured on another model(?s:.)*expert 'b'"):
        swapped = {"a": models / "b", "b": models / "a"}
        merge_models(models / "base", swapped, models / "out3", settings)


def test_a_file_measured_on_the_base_is_accepted_for_any_expert(models):
    for expert in "ab":
        measured(models, "gram", "base", name=f"gram/{expert}.safetensors")
    settings = MediatorSettings(merge_method="regmean", merge_data=str(models / "gram"))
    merge_models(models / "base", {name: models / name for name in "ab"}, models / "out", settings)
    with safe_open(str(models / "gram" / "a.safetensors"), framework="pt") as file:
        known = json.loads(file.metadata()["fingerprint"])
    assert known == fingerprint_of(dict(tiny_model("llama").named_parameters()))


def folder_of_links(folder, precious):
    folder.mkdir()
    (folder / "key.json").write_text("{}")
    (folder / "sums-0.safetensors").hardlink_to(precious / "sums-0.safetensors")


@pytest.mark.parametrize(
    "in_the_way",
    [
        lambda folder, precious: folder.symlink_to(precious),
        lambda folder, precious: precious.rename(folder),
        folder_of_links,
        lambda folder, precious: [folder.mkdir(), (folder / "whole.new").symlink_to(precious / "sums-0.safetensors")],
    ],
    ids=["link", "no key", "hard link", "inner link"],
)
def test_nobody_elses_files_are_taken_for_a_killed_measurement(tmp_path, in_the_way):
    precious, partial = tmp_path / "precious", tmp_path / ".x.safetensors.partial"
    precious.mkdir()
    for name in ("sums-0.safetensors", "group-photo.jpg", "wholesale.txt"):
        (precious / name).write_text("years of work")
    in_the_way(partial, precious)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with (
        pytest.raises(OutputError, match="in the way"),
        measuring._partial_folder(tmp_path / "x.safetensors", {"a": "1"}),
    ):
        pass
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
