"""Aliases and families: equal answers, fewer bytes, and every other expert's bytes untouched."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from typer.testing import CliRunner

from mediator_peft import MediatorConfig, build_mediator, load_mediator, verify_mediator
from mediator_peft.checkpoints.adapter_sizes import read_adapter_info
from mediator_peft.cli.app import app
from mediator_peft.errors import ConfigError, RoutingError, UnsupportedError
from tests.tiny import fine_tuned, random_prompts, tiny_model

PROMPTS = random_prompts(4)
MIXES = ["a", "c", {"a": 0.7, "b": 0.3}, {"a": 0.2, "b": 0.3, "c": 0.5}]


def write(folder, arch="llama"):
    """``a``, ``b`` and ``d`` have most of their task vectors in common; ``copy`` is ``c``."""
    base = tiny_model(arch)
    base.save_pretrained(folder / "base")
    common = fine_tuned(base, 1, 0.03)
    models = {name: fine_tuned(common, seed, 0.02) for seed, name in enumerate("abd", start=2)}
    models["c"] = models["copy"] = fine_tuned(base, 9, 0.03)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("a", "b", "c", "copy", "d")}


def build(folder, paths, exact, names=("a", "b", "c", "copy"), **settings):
    settings = {"routed_layers": "all", "merge_method": "base", **settings}
    if exact:
        settings |= {"density": 1.0, "encoding": "float"}
    build_mediator(folder / "base", {name: paths[name] for name in names}, folder / "out", MediatorConfig(**settings))
    return folder / "out"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    paths = write(folder, request.param)
    return build(folder, paths, exact=True)


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    return build(folder, write(folder), exact=False)


@torch.no_grad()
def logits(model, spec):
    return model(PROMPTS, expert_weights=spec).logits


def buffers(model, column):
    return {
        (name, key): buffer
        for name, layer in model.base_model.routed_layers().items()
        for key, buffer in layer.bank("default").named_buffers()
        if key.startswith(f"{column}:")
    }


def test_at_density_1_every_mix_stays_the_same(exact, tmp_path):
    model, _ = load_mediator(exact)
    before = [logits(model, spec) for spec in (*MIXES, MIXES, [None] * 4)]
    report = model.condense()
    assert report.families == {"_family 1": ["a", "b"]}
    assert report.aliases == {"copy": "c"}
    assert min(report.fidelity.values()) > 0.99999
    after = [logits(model, spec) for spec in (*MIXES, MIXES, [None] * 4)]
    for ours, theirs in zip(before, after, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, "c"), before[1])
    assert torch.equal(logits(model, "copy"), before[1])
    # Saved and loaded, whole and with few experts in memory.
    model.save_pretrained(tmp_path / "saved")
    for settings in ({}, {"max_resident_experts": 2, "expert_folder": tmp_path / "maps"}):
        again, _ = load_mediator(tmp_path / "saved", **settings)
        for spec, expected in zip((*MIXES, MIXES, [None] * 4), after, strict=True):
            torch.testing.assert_close(logits(again, spec), expected, rtol=1e-5, atol=1e-5)


def test_all_ways_of_applying_a_mix_agree(signed):
    model, _ = load_mediator(signed)
    model.condense()
    expected = logits(model, MIXES)
    for way in ("sparse", "dense"):
        model.set_execution(way)
        torch.testing.assert_close(logits(model, MIXES), expected, rtol=1e-4, atol=1e-4)
    backbone = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    for row, spec in enumerate(MIXES):
        with model.use_experts(spec), torch.no_grad():
            torch.testing.assert_close(model(PROMPTS).logits[row], expected[row], rtol=1e-4, atol=1e-4)
        model.merge_adapter(expert_weights=spec)
        with torch.no_grad():
            torch.testing.assert_close(model(PROMPTS).logits[row], expected[row], rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        assert torch.equal(tensor, backbone[name])
    model.cache_merged_experts(["a", "c"])
    torch.testing.assert_close(logits(model, MIXES), expected, rtol=1e-4, atol=1e-4)


def test_a_family_answers_as_its_parts_say(signed):
    """Against a dense weight of the stored deltas, by hand."""
    model, _ = load_mediator(signed)
    model.condense()
    layer = model.base_model.routed_layers()["model.layers.1.mlp.up_proj"]
    bank = layer.bank("default")
    weights = {"_family 1": 1.0, "a": 0.7, "b": 0.3}
    expected = sum(weight * bank.get(name).dense() for name, weight in weights.items())
    model.merge_adapter(expert_weights={"a": 0.7, "b": 0.3})
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_experts_outside_of_families_keep_their_bytes(signed):
    model, _ = load_mediator(signed)
    before = buffers(model, "c")
    report = model.condense()
    assert report.families
    after = buffers(model, "c")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not buffers(model, "copy")


def test_copies_are_stored_once_and_strangers_apart(signed):
    model, _ = load_mediator(signed)
    report = model.condense(with_families=False)
    assert (report.aliases, report.families) == ({"copy": "c"}, {})
    again = model.condense(with_families=False)
    assert (again.aliases, again.families) == ({}, {})
    assert model.condense(min_cosine=0.95).families == {}


def test_removing_members_and_aliases(signed, tmp_path):
    model, _ = load_mediator(signed)
    model.condense()
    expected = {name: logits(model, name) for name in ("b", "c", "copy")}
    model.remove_expert("a")
    model.remove_expert("c")
    assert not buffers(model, "a")
    for name in ("b", "copy"):
        assert torch.equal(logits(model, name), expected[name])
    model.save_pretrained(tmp_path / "saved")
    again, _ = load_mediator(tmp_path / "saved")
    for name in ("b", "copy"):
        torch.testing.assert_close(logits(again, name), expected[name], rtol=1e-5, atol=1e-5)
    model.remove_expert("copy")
    assert not buffers(model, "c")


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_new_expert_joins_its_family(is_exact, tmp_path):
    paths = write(tmp_path)
    out = build(tmp_path, paths, exact=is_exact, names=("a", "b", "c"))
    model, _ = load_mediator(out)
    model.condense()
    others = {name: buffers(model, name) for name in ("_family 1", "a", "b", "c")}
    model.add_expert("d", paths["d"])
    rows = model.base_model.active.config.column_map
    assert rows["_family 1"] == {"a": 1.0, "b": 1.0, "d": 1.0}
    assert rows["d"] == {"d": 1.0}
    for name, before in others.items():
        after = buffers(model, name)
        assert all(after[key] is before[key] or torch.equal(after[key], before[key]) for key in before)
    if is_exact:
        plain, _ = load_mediator(out)
        plain.add_expert("d", paths["d"])
        torch.testing.assert_close(logits(model, "d"), logits(plain, "d"), rtol=1e-4, atol=1e-4)
    model.add_expert("copy", paths["c"])
    assert model.base_model.active.config.column_map["c"] == {"c": 1.0, "copy": 1.0}
    assert not buffers(model, "copy")
    assert torch.equal(logits(model, "copy"), logits(model, "c"))


def test_the_router_learns_through_a_map(signed):
    model, _ = load_mediator(signed)
    gradients = []
    for step in range(2):
        if step:
            model.condense(with_families=False)
        weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4, requires_grad=True)
        model(PROMPTS, expert_weights=weights, labels=PROMPTS).loss.backward()
        gradients.append(weights.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_the_command_condenses_an_output(signed, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(signed, out)
    before = read_adapter_info(out)
    dry = CliRunner().invoke(app, ["condense", str(out), "--dry-run", "--json"])
    assert json.loads(dry.stdout)["families"] == {"_family 1": ["a", "b"]}
    assert read_adapter_info(out).adapter_bytes == before.adapter_bytes
    done = CliRunner().invoke(app, ["condense", str(out)])
    assert done.exit_code == 0, done.output
    info = read_adapter_info(out)
    sizes = [sum(sum(parts.values()) for parts in found.column_bytes.values()) for found in (before, info)]
    assert sizes[1] < 0.8 * sizes[0]
    assert info.bytes_per_parameter < before.bytes_per_parameter
    assert not verify_mediator(out).problems
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert "shared by a, b" in shown
    assert "delta of c, copy" in shown
    model, _ = load_mediator(out)
    assert model.expert_names == ["a", "b", "c", "copy", "base"]
    assert CliRunner().invoke(app, ["condense", str(out), "--min-cosine", "3"]).exit_code == 2
    with pytest.raises(ConfigError, match="min_cosine"):
        model.condense(min_cosine=float("nan"))


def in_a_thread(work):
    """What ``work`` raised in another thread, or None."""
    faults = []

    def run():
        try:
            work()
        except Exception as fault:
            faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return faults[0] if faults else None


def test_an_expert_that_is_added_while_others_are_condensed_is_refused(signed, tmp_path, monkeypatch):
    from mediator_peft.tuner import editing

    model, _ = load_mediator(signed)
    model.condense(with_families=False)
    find = editing.find_equal

    def find_late(*arguments):
        found = find(*arguments)
        assert in_a_thread(model.condense) is None
        return found

    monkeypatch.setattr(editing, "find_equal", find_late)
    extra = signed.parent / "d"
    with pytest.raises(RoutingError, match="condensed while 'd'"):
        model.add_expert("d", str(extra))
    assert "d" not in model.expert_names
    expected = logits(model, "a")
    monkeypatch.undo()
    model.add_expert("d", str(extra))
    assert torch.equal(logits(model, "a"), expected)


@torch.no_grad()
def test_nobody_gets_an_answer_half_before_and_half_after_condensing(signed):
    model, _ = load_mediator(signed)
    layer = list(model.base_model.routed_layers().values())[4]

    def condense_once(*arguments):
        handle.remove()
        assert in_a_thread(model.condense) is None

    handle = layer.register_forward_hook(condense_once)
    with pytest.raises(RoutingError, match="condensed during"):
        model(PROMPTS, expert_weights="a")
    assert model.active.config.column_map
    logits(model, "a")
    with model.use_experts("a"):
        assert isinstance(in_a_thread(model.condense), UnsupportedError)
    with model.board.alone("condense"):
        for ask in (lambda: logits(model, "a"), lambda: model.generate(PROMPTS, expert_weights="a", max_new_tokens=1)):
            assert "condense()" in str(in_a_thread(ask))
