"""What is loaded is what was written; what is written is whole."""

import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import random_prompts, write_tiny_checkpoints
from tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model, load_mediator, verify_mediator
from mediator_peft.checkpoints import replacing
from mediator_peft.checkpoints.checksums import CHECKSUM_FILE, read_checksums
from mediator_peft.checkpoints.replacing import finish_replacing, replaced_together
from mediator_peft.errors import AdapterError, BackboneMismatchError, UnsupportedError
from mediator_peft.evaluation.fit_and_save import save_router
from mediator_peft.merge.model_card import model_card
from mediator_peft.merge.verify import accept_output

from .conftest import build_and_fit, two_topics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole output and its checkpoints, to be copied: tokenizer, template and a fitted router in it."""
    tmp_path = tmp_path_factory.mktemp("whole")
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    saved = tiny_tokenizer()
    saved.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    saved.save_pretrained(paths["base"])
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(density=0.3))
    model, tokenizer = load_mediator(tmp_path / "out")
    model.fit_router(two_topics(), tokenizer)
    model.save_pretrained(tmp_path / "out" / "mediator")
    return tmp_path


@pytest.fixture
def out(whole, tmp_path):
    """A copy of the whole output."""
    shutil.copytree(whole, tmp_path, copy_function=shutil.copy, dirs_exist_ok=True)
    return tmp_path / "out"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip_bit(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def forget_checksums(out):
    (out / "mediator" / CHECKSUM_FILE).unlink()


# --- weights that are not in the files ------------------------------------------------------------------------------


def drop(name):
    return lambda out: edit_tensors(out / "model.safetensors", lambda tensors: tensors.pop(name))


def layers(change):
    return lambda out: edit_json(out / "config.json", change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), r"lacks tensors: model\.layers\.1\.mlp\.up_proj\.weight"),
        (drop("model.norm.weight"), "lacks tensors"),
        (layers(lambda config: config.update(num_hidden_layers=4)), "lacks tensors"),
        (layers(lambda config: config.pop("num_hidden_layers")), "lacks tensors"),
        (layers(lambda config: config.update(num_hidden_layers=2)), "no place for"),
        (layers(lambda config: config.update(num_hidden_layers=2**64)), "num_hidden_layers"),
        (layers(lambda config: config.update(intermediate_size=40)), "shapes"),
        (lambda out: edit_tensors(out / "model.safetensors", lambda t: t.update(more=torch.ones(2))), "no place for"),
    ],
)
def test_a_backbone_that_does_not_fill_its_model_is_refused(out, damage, message):
    damage(out)
    with pytest.raises(AdapterError, match=message):
        load_mediator(out, verify_files=False)
    with pytest.raises(AdapterError):
        load_mediator(out)


def test_weights_at_odd_addresses_are_read(out):
    expected = load_mediator(out)[0](random_prompts(), expert_weights="math").logits
    path = out / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    text += b" " * ((1 - len(text)) % 4)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    accept_output(out)
    model, _ = load_mediator(out)
    assert torch.equal(model(random_prompts(), expert_weights="math").logits, expected)


# --- checksums --------------------------------------------------------------------------------------------------------

FILES = (
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "mediator/adapter_config.json", "mediator/adapter_model.safetensors"),
)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_of_any_file_is_refused(out, name):
    assert (out / name).is_file()
    flip_bit(out / name)
    with pytest.raises(AdapterError, match=Path(name).name):
        load_mediator(out)
    assert Path(name).name in "\n".join(verify_mediator(out).problems)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("adapter_config.json")])
def test_a_missing_file_is_refused(out, name):
    (out / name).unlink()
    with pytest.raises(AdapterError, match=Path(name).name):
        load_mediator(out)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "special_tokens_map.json", "vocab.json"])
def test_a_file_that_was_added_is_refused(out, name):
    (out / name).write_text("{}")
    with pytest.raises(AdapterError, match=f"{name} was added"):
        load_mediator(out)


def test_a_large_file_is_compared_while_weights_load(out, monkeypatch):
    monkeypatch.setattr("mediator_peft.checkpoints.checksums._SMALL", 0)
    load_mediator(out)
    flip_bit(out / "model.safetensors")
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        load_mediator(out)


def test_files_can_be_left_unverified(out):
    whole, _ = load_mediator(out)
    edit_tensors(
        out / "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][1, 1].add_(0.25)
    )
    model, _ = load_mediator(out, verify_files=False)
    assert not torch.equal(model(random_prompts()).logits, whole(random_prompts()).logits)


def test_an_edit_on_purpose_can_be_accepted(out):
    edit_json(out / "generation_config.json", lambda config: config.update(temperature=0.5, do_sample=True))
    with pytest.raises(AdapterError, match=r"verify .* --accept"):
        load_mediator(out)
    assert accept_output(out).is_ok
    model, _ = load_mediator(out)
    assert model.generation_config.temperature == 0.5


def test_the_card_may_be_edited(out):
    (out / "mediator" / "README.md").write_text("my own words")
    load_mediator(out)
    assert verify_mediator(out).is_ok


def test_an_output_of_a_former_version_loads_with_one_warning(out):
    path = out / "mediator" / CHECKSUM_FILE
    edit_json(path, lambda known: [known.pop(name) for name in ("adapter", "records", "expert_names", "quick")])
    with pytest.warns(UserWarning, match="--accept"):
        load_mediator(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checksums.*")
        load_mediator(out)
    flip_bit(out / "model.safetensors")
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        load_mediator(out)


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"backbone": 3}', "[" * 100_000, '{"backbone": {"../x": "1"}}', "9" * 5000]
)
def test_damaged_checksums_are_refused(out, content):
    (out / "mediator" / CHECKSUM_FILE).write_text(content)
    with pytest.raises(AdapterError, match=r"checksums\.json"):
        load_mediator(out)
    assert not verify_mediator(out).is_ok


def test_checksums_that_lost_an_entry_are_refused(out):
    path = out / "mediator" / CHECKSUM_FILE
    whole = json.loads(path.read_text())
    tables = [("adapter",), ("quick", "adapter"), ("quick", "backbone"), ("backbone",), ("other",)]
    for *outer, table in tables:
        for name in (whole[outer[0]] if outer else whole)[table]:
            edit_json(path, lambda known: (known[outer[0]] if outer else known)[table].pop(name))  # noqa: B023
            with pytest.raises(AdapterError, match="entries are missing"):
                load_mediator(out)
            path.write_text(json.dumps(whole))
    edit_json(path, lambda known: known.pop("quick"))
    edit_json(out / "mediator" / "adapter_config.json", lambda config: config.update(ood_alpha=0.5))
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not what was written"):
        load_mediator(out)


def test_peft_compares_the_adapters_files(out):
    flip_bit(out / "mediator" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="adapter_model"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), str(out / "mediator"))


def swap_experts(config):
    config["expert_names"] = config["expert_names"][::-1]


def test_experts_keep_the_order_of_the_routers_tensors(out):
    edit_json(out / "mediator" / "adapter_config.json", swap_experts)
    for load in (
        lambda: load_mediator(out),
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), str(out / "mediator")),
        lambda: accept_output(out),
    ):
        with pytest.raises(AdapterError, match="in this order"):
            load()
    assert "in this order" in "\n".join(verify_mediator(out).problems)


def first_named(tensors, part):
    return next(name for name in tensors if part in name)


def put(part, change):
    def damage(tensors):
        name = first_named(tensors, part)
        tensors[name] = change(tensors[name])

    return damage


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (":scales", lambda tensor: tensor * float("nan"), "NaN"),
        (":scales", lambda tensor: tensor.float() * float("inf"), "infinite"),
        (":scales", lambda tensor: tensor.to(torch.uint8), "wrong type"),
        (":signs", lambda tensor: tensor.to(torch.int8), "bytes were expected"),
        ("router.means", lambda tensor: tensor * float("nan"), "NaN"),
        ("router.temperature", lambda tensor: tensor.long(), "wrong type"),
    ],
)
def test_numbers_that_cannot_be_are_refused_without_checksums_too(out, part, change, message):
    edit_tensors(out / "mediator" / "adapter_model.safetensors", put(part, change))
    with pytest.raises(AdapterError, match=message):
        load_mediator(out, verify_files=False)


@pytest.mark.filterwarnings("ignore:not all files of")
@pytest.mark.parametrize("part", ["layers.2.mlp.up_proj", "norm", "lm_head"])
def test_nan_in_a_backbone_without_checksums_is_refused(part, out):
    def damage(tensors):
        tensors[next(name for name in tensors if part in name)].view(-1)[-1] = float("nan")

    edit_tensors(out / "model.safetensors", damage)
    forget_checksums(out)
    with pytest.raises(AdapterError, match=rf"{part}.*of the backbone holds NaN"):
        load_mediator(out)


@pytest.mark.parametrize(
    "change",
    [
        dict(router_layer=17),
        dict(expert_names=5),
        dict(expert_names=["math", "math"]),
        dict(expert_names=None),
        dict(routed_modules={"a": 1}),
        dict(num_blocks="3"),
        dict(num_blocks=10**400),
        dict(turn_markers=[[1], "x"]),
        dict(backbone_fingerprint={"a": {"shape": [1], "values": ["x"]}}),
        dict(provenance=[1]),
        dict(base_model_name_or_path=7),
        dict(experts=["a"]),
        dict(conflict_threshold=10**400),
        dict(format_version=True),
        dict(task_type="NONSENSE"),
        dict(seed=-(10**400)),
    ],
    ids=str,
)
def test_a_configuration_of_wrong_types_is_refused_by_name(out, change):
    edit_json(out / "mediator" / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(AdapterError, match=r"adapter_config\.json|expert"):
        load_mediator(out, verify_files=False)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "[]", '{"peft_type": "MEDIATOR", "density": NaN}'])
def test_an_unreadable_configuration_is_refused(out, content):
    (out / "mediator" / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_mediator(out, verify_files=False)
    assert "adapter_config.json" in "\n".join(verify_mediator(out).problems)


def test_fields_of_a_newer_peft_are_ignored_with_a_warning(out):
    path = out / "mediator" / "adapter_config.json"
    edit_json(path, lambda config: config.update(newfangled_thing={"a": 1}))
    with pytest.warns(UserWarning, match="newfangled_thing"):
        accept_output(out)
    with pytest.warns(UserWarning, match="newfangled_thing"):
        load_mediator(out)
    edit_json(path, lambda config: config.update(routng_top_p=0.5))
    with pytest.raises(AdapterError, match="Did you mean 'routing_top_p'"):
        load_mediator(out)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": 3}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 7}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", "9" * 5000),
    ],
)
def test_unreadable_files_of_the_backbone_are_adapter_errors_without_checksums_too(out, name, content):
    (out / name).write_text(content)
    forget_checksums(out)
    with pytest.raises(AdapterError):
        load_mediator(out)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saving_elsewhere_keeps_the_backbones_checksums(tmp_path, out):
    model, _ = load_mediator(out)
    model.save_pretrained(tmp_path / "saved")
    known = read_checksums(tmp_path / "saved")
    assert known.quick_backbone == read_checksums(out / "mediator").quick_backbone
    load_mediator(tmp_path / "saved")
    flip_bit(out / "model.safetensors")
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        load_mediator(tmp_path / "saved")


def test_pickles_are_refused_before_anything_is_written(tmp_path, out):
    model, _ = load_mediator(out)
    with pytest.raises(UnsupportedError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()


def test_notes_in_a_card_are_kept(tmp_path, out):
    model, _ = load_mediator(out)
    model.save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    card.write_text(card.read_text() + "\nmy notes\n")
    model.save_pretrained(tmp_path / "saved")
    assert "my notes" in card.read_text()


@pytest.mark.parametrize("what", ["resized", "trained"])
def test_a_backbone_that_changed_is_saved_with_the_adapter(tmp_path, out, what):
    model, _ = load_mediator(out)
    if what == "resized":
        model.resize_token_embeddings(110)
    else:
        model.get_base_model().model.layers[1].input_layernorm.weight.data[5] += 0.5
    prompts = random_prompts()
    expected = model(prompts, expert_weights="math").logits
    with pytest.warns(UserWarning, match="saved with the adapter"):
        model.save_pretrained(tmp_path / "saved")
    shutil.move(out, tmp_path / "gone")
    again, tokenizer = load_mediator(tmp_path / "saved")
    assert torch.equal(again(prompts, expert_weights="math").logits, expected)
    assert tokenizer is not None
    model.save_pretrained(tmp_path / "saved")  # known to lie there now
    load_mediator(tmp_path / "saved")


def test_an_in_memory_model_that_was_trained_on_is_saved_as_it_is(tmp_path, checkpoints):
    base = AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    model = get_mediator_model(base, MediatorConfig(experts={"math": str(checkpoints["math"])}, density=0.3))
    model.get_base_model().model.norm.weight.data[3] = 0.25
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="not all files")  # of the base, which is not ours
        again, _ = load_mediator(tmp_path / "saved")
    logits = [one(random_prompts(), expert_weights="math").logits for one in (again, model)]
    assert torch.equal(*logits)


def test_a_backbone_that_is_the_base_is_not_written(tmp_path, checkpoints):
    base = AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    config = MediatorConfig(experts={"math": str(checkpoints["math"])}, density=0.3, merge_method="base")
    model = get_mediator_model(base, config)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "backbone").exists()
    again, _ = load_mediator(tmp_path / "saved")
    logits = [one(random_prompts(), expert_weights="math").logits for one in (again, model)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("where", ["out", "out/mediator", "saved", "subfolder"])
def test_auto_peft_model_finds_the_backbone(tmp_path, out, where, monkeypatch):
    model, _ = load_mediator(out)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir("/")
    options = {"subfolder": "mediator"} if where == "subfolder" else {}
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / where.replace("subfolder", "out")), **options)
    assert torch.equal(again(random_prompts()).logits, model(random_prompts()).logits)


def test_peft_config_says_where_the_backbone_is(out, monkeypatch):
    monkeypatch.chdir("/")
    config = PeftConfig.from_pretrained(str(out / "mediator"))
    assert Path(config.base_model_name_or_path) == out.resolve()


# --- all or nothing ---------------------------------------------------------------------------------------------------


def write_pair(folder, content):
    with replaced_together(folder) as fresh:
        for name in ("a", "b"):
            (fresh / name).write_text(content)
        (fresh / "backbone").mkdir()
        (fresh / "backbone" / content).write_text(content)


def pair(folder):
    return (folder / "a").read_text(), (folder / "b").read_text(), os.listdir(folder / "backbone")


@pytest.mark.parametrize("step", range(40))
def test_a_save_that_stops_anywhere_leaves_all_old_or_all_new(tmp_path, monkeypatch, step):
    """Every call that changes the disk may be the last one."""
    folder = tmp_path / "x"
    write_pair(folder, "old")
    (folder / "other").write_text("stays")
    count = 0

    class Killed(BaseException):
        pass

    def killing(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "rename"), (os, "fsync"), (Path, "rmdir"), (shutil, "rmtree")):
            patch.setattr(owner, name, killing(getattr(owner, name)))
        patch.setattr(replacing.os, "close", lambda descriptor: None)
        with suppress(Killed):
            write_pair(folder, "new")
    finish_replacing(folder)
    assert pair(folder) in (("old", "old", ["old"]), ("new", "new", ["new"]))
    assert (folder / "other").read_text() == "stays"
    write_pair(folder, "newer")
    assert pair(folder) == ("newer", "newer", ["newer"])


def test_a_router_and_its_report_are_saved_together(tmp_path, topics, tokenizer):
    model = build_and_fit(tmp_path, topics, tokenizer)
    adapter = tmp_path / "out" / "mediator"
    stale = tmp_path / "out" / ".mediator.partial-999999999"
    stale.mkdir()
    (adapter / "README.md").write_text("notes")

    def write_report(folder):
        folder.mkdir()
        (folder / "routing.json").write_text("{}")
        return {}

    def fail(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_router(model, adapter, fail)
    assert not load_mediator(tmp_path / "out")[0].router.is_fitted
    assert save_router(model, adapter, write_report) == {}
    assert load_mediator(tmp_path / "out")[0].router.is_fitted
    assert verify_mediator(tmp_path / "out").is_ok
    assert (adapter / "README.md").read_text() == "notes"
    assert {entry.name for entry in (adapter / "report").iterdir()} >= {"routing.json", "report.json"}
    assert not list(tmp_path.rglob(".mediator*"))


def test_the_cards_name_base_licence_and_merge(tmp_path):
    paths = write_tiny_checkpoints(tmp_path / "checkpoints")
    (paths["base"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, tmp_path / "out", MediatorConfig(density=0.3))
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "mediator" / "README.md"):
        header = card.read_text().split("---")[1]
        assert "license: apache-2.0" in header
        assert "merge," in header
        # A folder of this machine is nothing that the hub could link to.
        assert "base_model" not in header
    hub = MediatorConfig(density=0.3)
    hub.provenance = {"base": "org/base@abc", "experts": {"a": "org/a"}}
    assert "base_model:\n- org/base\n- org/a\n" in model_card(hub, None)


def test_what_is_pushed_takes_its_backbone_along(tmp_path, out):
    model, _ = load_mediator(out)
    with model.base_model.adapter_files.taking_backbone_along():
        model.save_pretrained(tmp_path / "pushed")
    expected = model(random_prompts(), expert_weights="math").logits
    shutil.move(out, tmp_path / "gone")
    again, tokenizer = load_mediator(tmp_path / "pushed")
    assert torch.equal(again(random_prompts(), expert_weights="math").logits, expected)
    assert tokenizer is not None
    assert model.base_model.adapter_files.backbone_path == str(out)


def test_an_adapter_of_another_backbone_leaves_the_model_as_it_was(out, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "base")
    before = [(name, type(module)) for name, module in base.named_modules()]
    expected = base(random_prompts()).logits
    with pytest.raises(BackboneMismatchError):
        PeftModel.from_pretrained(base, out / "mediator")
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert torch.equal(base(random_prompts()).logits, expected)
