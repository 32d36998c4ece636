"""Bad input: a clear error of ours that says what and where, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mediator_peft import (
    MediatorConfig,
    build_mediator,
    get_mediator_model,
    load_mediator,
    merge_models,
    plan_mediator,
)
from mediator_peft.checkpoints import backbone_files as shards
from mediator_peft.checkpoints import output_folder as writing
from mediator_peft.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    UnsupportedError,
)
from mediator_peft.merge import offline
from tests.tiny import tiny_model

WEIGHTS = "model.safetensors"
MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def paths(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "in")
    return {name: tmp_path / "in" / name for name in ("base", "math", "code")}


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )


def edit_json(folder: Path, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text())
    content.update(changes)
    (folder / name).write_text(json.dumps(content))


def header(folder: Path, text: bytes, length: int | None = None) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 64)


def set_value(value: float, name: str = MATRIX):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return lambda folder: edit_tensors(folder, change)


def index(folder: Path, text: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({MATRIX: tensors[MATRIX][:-1]}))


def entry(**fields) -> bytes:
    return json.dumps({MATRIX: {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64], **fields}}).encode()


# What is done to the expert "math" → what the message must say.
BROKEN_EXPERTS = {
    "no folder": (shutil.rmtree, "no folder"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "unknown model type": (lambda folder: edit_json(folder, "config.json", model_type="nonesuch"), "config.json"),
    "empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged"),
    "cut short": (lambda folder: os.truncate(folder / WEIGHTS, 40_000), "damaged"),
    "cut short in the header": (lambda folder: os.truncate(folder / WEIGHTS, 100), "damaged"),
    "one byte too many": (lambda folder: (folder / WEIGHTS).open("ab").write(b"x"), "damaged"),
    "header length is absurd": (lambda folder: header(folder, b"{}", 1 << 60), "damaged"),
    "header is no JSON": (lambda folder: header(folder, b"{never"), "no JSON"),
    "header is a list": (lambda folder: header(folder, b"[1, 2]"), "no JSON object"),
    "entry without offsets": (lambda folder: header(folder, b'{"a": {"dtype": "F32"}}'), "malformed"),
    "offsets turn back": (lambda folder: header(folder, entry(data_offsets=[64, 0])), "offsets"),
    "offsets do not fit the shape": (lambda folder: header(folder, entry(shape=[4, 9])), "offsets"),
    "offsets beyond the file": (
        lambda folder: header(folder, entry(shape=[99, 8], data_offsets=[0, 1584])),
        "speaks of",
    ),
    "negative shape": (lambda folder: header(folder, entry(shape=[-4, -8])), "offsets"),
    "index is no JSON": (lambda folder: index(folder, "{"), "index.json is damaged"),
    "index without a map": (lambda folder: index(folder, "{}"), "index.json is damaged"),
    "index is a list": (lambda folder: index(folder, "[]"), "index.json is damaged"),
    "index names a missing shard": (lambda folder: index(folder, '{"weight_map": {"a": "x.safetensors"}}'), "missing"),
    "index leaves the folder": (lambda folder: index(folder, '{"weight_map": {"a": "../base/x"}}'), "outside"),
    "a tensor is missing": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(MATRIX)), "lacks tensors"),
    "a tensor too many": (lambda folder: edit_tensors(folder, lambda t: t.update(extra=torch.zeros(2))), "extra"),
    "another shape": (shape, "other shapes"),
    "integers": (lambda folder: edit_tensors(folder, lambda t: t.update({MATRIX: t[MATRIX].to(torch.int8)})), "plain"),
    "another vocabulary": (lambda folder: edit_json(folder, "config.json", vocab_size=95), "vocab_size"),
    "other heads": (lambda folder: edit_json(folder, "config.json", num_attention_heads=8), "num_attention_heads"),
    "another rope": (
        lambda folder: edit_json(folder, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
        "rope_parameters",
    ),
    "untied": (lambda folder: edit_json(folder, "config.json", tie_word_embeddings=True), "tie_word_embeddings"),
    "NaN in a matrix": (set_value(float("nan")), f"{MATRIX}.*NaN"),
    "infinity in a matrix": (set_value(float("inf")), f"{MATRIX}.*infinite"),
    "NaN in a norm": (set_value(float("nan"), "model.norm.weight"), "model.norm.weight.*NaN"),
    "NaN in the embedding": (set_value(float("-inf"), "model.embed_tokens.weight"), "embed_tokens.*NaN"),
}


@pytest.mark.parametrize("kind", BROKEN_EXPERTS)
def test_a_broken_expert_is_named_and_nothing_is_left(kind, paths, tmp_path):
    damage, message = BROKEN_EXPERTS[kind]
    damage(paths["math"])
    before = sorted(tmp_path.iterdir())
    experts = {name: paths[name] for name in ("math", "code")}
    with pytest.raises(CheckpointError, match=rf"(?s)math.*{message}|{message}.*math"):
        build_mediator(paths["base"], experts, tmp_path / "new" / "out")
    assert sorted(tmp_path.iterdir()) == before
    if not message.endswith(("NaN", "infinite")):  # those need the weights
        problems = "\n".join(plan_mediator(paths["base"], experts).problems)
        assert "math" in problems


# Where each of two builds computes: compiled loops without torch, or torch.
OTHER_WAYS = {
    "torch": lambda base, experts, out: build_mediator(base, experts, out, MediatorConfig(merge_method="ties")),
    "low rank": lambda base, experts, out: build_mediator(base, experts, out, MediatorConfig(sparsifier="svd")),
    "plain merge": lambda base, experts, out: merge_models(base, experts, out, MediatorConfig(merge_method="ties")),
}
FAULTS_OF_BOTH = [
    *("cut short", "header is no JSON", "a tensor is missing", "a tensor too many", "another shape", "integers"),
    *("NaN in a matrix", "infinity in a matrix", "NaN in a norm"),
]


@pytest.mark.parametrize("whose", ["base", "math"])
@pytest.mark.parametrize("kind", FAULTS_OF_BOTH)
def test_a_build_with_torch_and_one_without_say_the_same_of_a_fault(kind, whose, paths, tmp_path):
    BROKEN_EXPERTS[kind][0](paths[whose])
    experts = {name: paths[name] for name in ("math", "code")}
    with pytest.raises(CheckpointError) as expected:
        build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig())
    for way, build in OTHER_WAYS.items():
        with pytest.raises(CheckpointError) as found:
            build(paths["base"], experts, tmp_path / "out")
        assert (type(found.value), str(found.value)) == (type(expected.value), str(expected.value)), way


def test_nan_is_called_the_same_in_an_added_expert_and_an_always_on_delta(paths, tmp_path):
    BROKEN_EXPERTS["NaN in a matrix"][0](paths["math"])
    build_mediator(paths["base"], {"code": paths["code"]}, tmp_path / "out", MediatorConfig(routed_layers="all"))
    model, _ = load_mediator(tmp_path / "out")
    said = rf"tensor '{MATRIX}' holds NaN or infinite values, 1 of them in rows 0 to 47"
    with pytest.raises(CheckpointError, match=said):
        model.add_expert("math", str(paths["math"]), reset_router=True)
    assert model.expert_names == ["code", "base"]
    config = MediatorConfig(routed_layers="all", always={"style": f"{paths['math']}:0.5"})
    with pytest.raises(CheckpointError, match=said):
        build_mediator(paths["base"], {"code": paths["code"]}, tmp_path / "new", config)


def test_all_cheap_faults_are_listed_at_once(paths, tmp_path):
    shape(paths["math"])
    edit_tensors(paths["code"], lambda tensors: tensors.pop(MATRIX))
    edit_json(paths["code"], "config.json", num_attention_heads=8)
    with pytest.raises(CheckpointMismatchError) as caught:
        build_mediator(paths["base"], {"math": paths["math"], "code": paths["code"]}, tmp_path / "out")
    for part in ("other shapes", "lacks tensors", "num_attention_heads"):
        assert part in str(caught.value)


WRONG_ARGUMENTS = {
    "no experts": ({"experts": {}}, ConfigError, "no experts"),
    "a dot in a name": ({"experts": {"a.b": "x"}}, ConfigError, "expert name"),
    "a slash in a name": ({"experts": {"a/b": "x"}}, ConfigError, "expert name"),
    "a taken name": ({"experts": {"base": "x"}}, ConfigError, "taken"),
    "no workers": ({"workers": 0}, ConfigError, "workers"),
    "half a worker": ({"workers": 1.5}, ConfigError, "workers"),
    "size without a number": ({"max_memory": "much"}, ConfigError, "max_memory"),
    "unit unknown": ({"max_memory": "4 parsec"}, ConfigError, "max_memory"),
    "too little memory": ({"max_memory": "1MB"}, OutOfMemoryError, "max_memory"),
    "block beyond the model": ({"config": {"routed_layers": [7]}}, ConfigError, "beyond"),
    "unknown module": ({"config": {"target_modules": ["nonesuch"]}}, ConfigError, "nonesuch"),
    "no plan there": ({"plan": "nowhere.json"}, ConfigError, "plan"),
    "no base and a fallback to it": ({"base": None}, ConfigError, "fallback"),
    "base is nowhere": ({"base": "/nowhere"}, CheckpointError, "no folder"),
}


@pytest.mark.parametrize("kind", WRONG_ARGUMENTS)
def test_wrong_arguments(kind, paths, tmp_path):
    changes, error, message = WRONG_ARGUMENTS[kind]
    arguments = {"base": paths["base"], "experts": {"math": paths["math"]}, "output": tmp_path / "out", **changes}
    if "config" in changes:
        arguments["config"] = MediatorConfig(**changes["config"])
    with pytest.raises(error, match=message):
        build_mediator(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_left_alone(paths, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputExistsError, match="exists"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("code", [ENOSPC, EROFS, EACCES])
@pytest.mark.parametrize("place", ["mkdir", "allocate", "write"])
def test_an_output_that_cannot_be_written(place, code, paths, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    target, name = {
        "mkdir": (writing.Path, "mkdir"),
        "allocate": (shards, "_allocate"),
        "write": (shards, "_write_at"),
    }[place]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(OutputError, match=os.strerror(code)):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_seen_before_the_work(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "free_space", lambda _: 1000)
    monkeypatch.setattr(offline, "resumable_folder", lambda *_: pytest.fail("work was started"))
    with pytest.raises(OutputError, match="Make room"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs to mount a small disk")
def test_a_disk_that_fills_up(paths, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("cannot mount")
    try:
        monkeypatch.setattr(writing, "free_space", lambda _: 1 << 40)
        with pytest.raises(OutputError, match="No space left"):
            build_mediator(paths["base"], {"math": paths["math"]}, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_same_error(workers, paths, tmp_path):
    set_value(float("nan"))(paths["math"])
    with pytest.raises(CheckpointError, match=MATRIX):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_shrinks_while_it_is_read(paths, tmp_path, monkeypatch):
    original = offline.Build.prepare

    def shrink(build):
        os.truncate(paths["math"] / WEIGHTS, 20_000)
        return original(build)

    monkeypatch.setattr(offline.Build, "prepare", shrink)
    with pytest.raises(CheckpointError, match="cut short"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")


def test_a_killed_worker_is_reported(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.Build, "_merge_one", lambda *_: os._exit(9))
    with pytest.raises(OutOfMemoryError, match="worker"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", workers=2)


def test_fused_experts_are_averaged_and_the_report_says_so(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_experts=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    report = build_mediator(tmp_path / "moe", {"a": tmp_path / "moe"}, tmp_path / "out")
    assert any("mixture" in note and "averaged" in note for note in report.notes), report.notes


def test_pickles_are_read_on_request_only(paths, tmp_path):
    torch.save(load_file(paths["math"] / WEIGHTS), paths["math"] / "pytorch_model.bin")
    (paths["math"] / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="allow_pickle"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")
    build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", allow_pickle=True)
    merged = load_file(tmp_path / "out" / WEIGHTS)
    expected = torch.load(paths["math"] / "pytorch_model.bin", weights_only=True)
    torch.testing.assert_close(merged[MATRIX], expected[MATRIX], rtol=0, atol=0)


def test_a_pickle_with_code_is_refused(paths, tmp_path):
    torch.save({"weight": torch.zeros(1), "code": tiny_model}, paths["math"] / "pytorch_model.bin")
    (paths["math"] / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="more than tensors"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize("experts", [["math"], "math", {"math": 5}, {"math": None}, None], ids=str)
def test_experts_that_are_no_pairs_of_name_and_path(experts, paths, tmp_path):
    for call in (build_mediator, plan_mediator):
        with pytest.raises(ConfigError, match="expert"):
            call(paths["base"], experts, tmp_path / "out")


def test_a_plan_that_cannot_be_written(paths, tmp_path):
    planned = plan_mediator(paths["base"], {"math": paths["math"]})
    with pytest.raises(OutputError, match="cannot be written"):
        planned.save(tmp_path / "nowhere" / "plan.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "README.md"])
def test_a_side_file_that_may_not_be_read_is_not_taken_for_the_output(name, paths, tmp_path, monkeypatch):
    for folder in ("base", "math"):
        (paths[folder] / name).write_text("{}")
    real = open

    def denied(path, *arguments, **options):
        if Path(str(path)).name == name and "in" in Path(str(path)).parts:
            raise PermissionError(EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr("io.open", denied)
    assert not plan_mediator(paths["base"], {"math": paths["math"]}).problems
    if name == "README.md":
        return
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        build_mediator(paths["base"], {"math": paths["math"]}, tmp_path / "out")


def test_a_model_in_memory_that_carries_a_lora_is_named(paths):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(CheckpointError, match="carries a LoRA"):
        get_mediator_model(model, MediatorConfig(experts={"math": str(paths["math"])}))


@pytest.mark.parametrize("kind", ["sequence classification", "bare model"])
def test_another_kind_of_model_is_refused_by_its_class(kind, tmp_path):
    from transformers import LlamaForSequenceClassification, LlamaModel

    config = tiny_model().config
    made = LlamaModel(config) if kind == "bare model" else LlamaForSequenceClassification(config)
    made.save_pretrained(tmp_path / "model")
    name = type(made).__name__
    with pytest.raises(UnsupportedError, match=f"{name} does not continue text"):
        build_mediator(tmp_path / "model", {"a": tmp_path / "model"}, tmp_path / "out")
    assert any(name in problem for problem in plan_mediator(tmp_path / "model", {"a": tmp_path / "model"}).problems)
