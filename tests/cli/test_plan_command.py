"""``plan`` and ``build`` take the same options, and a build of a saved plan is what the plan foretold."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from mediator_peft.cli.app import app
from mediator_peft.cli.build import build
from mediator_peft.cli.merge_options import HOW_TO_MERGE
from mediator_peft.cli.plan import plan
from mediator_peft.config import MediatorSettings
from mediator_peft.errors import ConfigError
from tests.merge.helpers import write_larger

ONLY_OF_BUILD = {"output", "hash_inputs", "dry_run", "router_from_deltas"}

# Option → what is typed → field of the configuration, and its value. Every merge option is here.
TYPED = {
    "merge_method": ("ties", "merge_method", "ties"),
    "merge_parameter": ("density=0.5", "merge_parameters", {"density": 0.5}),
    "merge_data": ("c.json", "merge_data", "c.json"),
    "depth_scaling": ("0.5,0.25", "depth_scaling", [0.5, 0.25]),
    "density": ("0.3", "density", 0.3),
    "density_scope": ("model", "density_scope", "model"),
    "budget": ("400MB", "budget", "400MB"),
    "encoding": ("nf4", "encoding", "nf4"),
    "rescale": ("norm", "rescale", "norm"),
    "sparsifier": ("svd", "sparsifier", "svd"),
    "rank": ("3", "rank", 3),
    "routed_layers": ("0,2", "routed_layers", [0, 2]),
    "target_module": ("q_proj", "target_modules", ["q_proj"]),
    "conflict_score": ("energy", "conflict_score", "energy"),
    "conflict_density": ("0.4", "conflict_density", 0.4),
    "conflict_threshold": ("0.5", "conflict_threshold", 0.5),
    "always": ("style=path:0.5", "always", {"style": "path:0.5"}),
    "always_rule": ("alpha", "always_rule", "alpha"),
    "router": ("mlp", "router", "mlp"),
    "router_layer": ("2", "router_layer", 2),
    "ood_alpha": ("0.05", "ood_alpha", 0.05),
    "ood_beta": ("0.1", "ood_beta", 0.1),
    "routing_top_p": ("0.9", "routing_top_p", 0.9),
    "fallback": ("backbone", "fallback", "backbone"),
    "families": ("0.25", "families", 0.25),
    "for_quantization": ("nf4", "for_quantization", "nf4"),
    "correction_density": ("0.25", "correction_density", 0.25),
    "seed": ("7", "seed", 7),
}
NEEDED = {
    "rank": ["--sparsifier", "svd"],
    "merge_parameter": ["--merge-method", "ties"],
    "merge_data": ["--merge-method", "weighted"],
    "always_rule": ["--always", "style=path:0.5"],
    "correction_density": ["--for-quantization", "nf4"],
}

# Option → fields that change with it.
FOLLOWS = {
    "rank": {"sparsifier", "encoding"},
    "sparsifier": {"sparsifier", "encoding"},
    "merge_parameter": {"merge_method"},
    "merge_data": {"merge_method"},
    "always_rule": {"always"},
    "correction_density": {"for_quantization"},
}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parameters(command):
    return inspect.signature(command, eval_str=True).parameters


def merge_options(command):
    return {
        name
        for name, parameter in parameters(command).items()
        for option in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(option, typer.models.OptionInfo) and option.rich_help_panel == HOW_TO_MERGE
    }


def test_plan_has_every_option_of_build():
    ours, theirs = parameters(plan), parameters(build)
    for name, option in theirs.items():
        if name not in ONLY_OF_BUILD:
            assert name in ours, f"plan lacks {name}"
            assert ours[name].annotation == option.annotation
            assert ours[name].default == option.default
    assert merge_options(plan) == merge_options(build) == set(TYPED)


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("command", ["plan", "build"])
def test_an_option_reaches_the_configuration(command, name, monkeypatch):
    typed, field, value = TYPED[name]
    seen = []

    class Caught(ConfigError):
        pass

    def catch(config, **_):
        seen.append(config)
        raise Caught("caught")

    monkeypatch.setattr("mediator_peft.merge.preflight.plan_mediator", catch)
    monkeypatch.setattr("mediator_peft.merge.offline.build_mediator", catch)
    option = [f"--{name.replace('_', '-')}", typed, *NEEDED.get(name, [])]
    shown = run(command, "--base", "b", "--expert", "a=x", "--output", "o", *option)
    assert "caught" in shown.stderr, shown.stderr
    (config,) = seen
    assert getattr(config, field) == value
    untouched = MediatorSettings()
    changed = {item.name for item in fields(config) if getattr(config, item.name) != getattr(untouched, item.name)}
    follows = FOLLOWS.get(name, set())
    assert changed - follows == {field} - follows


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A base and two experts whose matrices are large enough for headers to matter little."""
    folder = tmp_path_factory.mktemp("larger")
    write_larger(folder, {"e0": 0.05, "e1": 0.08}, vocab_size=500)
    return folder


def inputs(folder):
    return ["--base", folder / "base", "--expert", f"e0={folder / 'e0'}", "--expert", f"e1={folder / 'e1'}"]


def planned(folder, *more):
    shown = run("plan", *inputs(folder), *more, "--json")
    assert shown.exit_code == 0, shown.stderr
    return json.loads(shown.stdout)


SETTINGS = {
    "some modules": ["--target-module", "q_proj", "--target-module", "down_proj"],
    "the embedding": ["--target-module", "all-linear", "--target-module", "embed_tokens", "--density", "0.1"],
    "numbers": ["--encoding", "float", "--merge-method", "ties", "--routed-layers", "0,2"],
    "a budget": ["--budget", "1.25x", "--density-scope", "model"],
    "low rank": ["--sparsifier", "svd", "--rank", "5"],
    "no fallback": ["--fallback", "backbone"],
}


def test_a_preset_gives_its_settings_and_typed_options_take_precedence(larger, monkeypatch):
    seen = []

    def catch(config, **_):
        seen.append(config)
        raise ConfigError("caught")

    monkeypatch.setattr("mediator_peft.merge.preflight.plan_mediator", catch)
    for more in (["--preset", "twin"], ["--preset", "t-switch", "--density", "0.4"]):
        run("plan", *inputs(larger), *more)
    twin, switch = seen
    assert (twin.merge_method, twin.merge_parameters, twin.router) == ("task_arithmetic", {"scale": 0.3}, "mlp")
    assert twin.rank == round(0.1 * json.loads((larger / "base" / "config.json").read_text())["hidden_size"])
    assert (switch.merge_method, switch.rescale, switch.router, switch.density) == ("base", "norm", "knn", 0.4)
    assert "Did you mean 'twin'" in run("plan", *inputs(larger), "--preset", "twi").stderr


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_build_of_a_saved_plan_is_as_large_as_foretold(kind, larger, tmp_path):
    found = planned(larger, *SETTINGS[kind], "--save", tmp_path / "plan.json")
    assert found["bytes"]["adapter"] != planned(larger)["bytes"]["adapter"]
    built = run("build", *inputs(larger), "--output", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert built.exit_code == 0, built.stderr
    adapter = (tmp_path / "out" / "mediator" / "adapter_model.safetensors").stat().st_size
    assert found["bytes"]["adapter"] == pytest.approx(adapter, rel=0.05)


def test_a_plan_with_fewer_modules_foretells_fewer_bytes(larger):
    all_linear, some = planned(larger), planned(larger, "--target-module", "q_proj")
    # 256 * 256 of 4 * 256 * 256 + 3 * 256 * 640 entries a block.
    share = 256 / (4 * 256 + 3 * 640)
    assert some["bytes"]["adapter"] / all_linear["bytes"]["adapter"] == pytest.approx(share, rel=0.1)
    assert some["bytes"]["backbone"] == all_linear["bytes"]["backbone"]


def test_an_option_goes_before_the_plan(larger, tmp_path):
    planned(larger, "--target-module", "q_proj", "--seed", "5", "--save", tmp_path / "plan.json")
    built = run(
        "build", *inputs(larger), "--output", tmp_path / "out", "--plan", tmp_path / "plan.json",
        "--target-module", "k_proj",
    )  # fmt: skip
    assert built.exit_code == 0, built.stderr
    config = json.loads((tmp_path / "out" / "mediator" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["routed_modules"]} == {"k_proj"}
    assert config["seed"] == 5


def test_a_pipeline_with_a_plan_takes_its_settings(larger, tmp_path):
    planned(larger, "--target-module", "q_proj", "--seed", "5", "--save", tmp_path / "plan.json")
    lines = [f"  base: {larger / 'base'}", f"  experts: {{e0: {larger / 'e0'}}}", "  output: out", "  plan: plan.json"]
    (tmp_path / "all.yaml").write_text("\n".join(["build:", *lines, "  config: {seed: 6}"]))
    done = run("run", tmp_path / "all.yaml")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "mediator" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["routed_modules"]} == {"q_proj"}
    assert config["seed"] == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"densty": 0.1}, "Did you mean 'density'"), ({"density": 2}, "density must"), ([], "must be an object")],
)
def test_wrong_settings_of_a_plan_are_refused(settings, message, larger, tmp_path):
    planned(larger, "--save", tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**content, "settings": settings}))
    refused = run("build", *inputs(larger), "--output", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert refused.exit_code == 3
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()
