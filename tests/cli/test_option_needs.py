"""Options that have an effect beside others only: without these they are refused, and no option is forgotten."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mediator_peft.cli.app import app
from mediator_peft.cli.option_needs import NEEDS, SETTING_NEEDS

SOURCES = ["--base=nowhere", "--expert=a=nowhere"]
BUILD = ["build", *SOURCES, "--output=new"]
EVAL = ["eval", "out", "--data=a=a.jsonl"]
HARNESS = ["eval", "out", "--lm-eval=arc_easy"]
ROUTES = ["bench", "--routes=routes.jsonl"]
SHARING = ["condense", "out", "--no-families"]
PLANNED = [*BUILD, "--plan=plan.json"]

# A command line, the option of it that has no effect, and what it needs.
IDLE = [
    (["fit-router", "out", "--data=a=a.jsonl", "--match=exact"], "--match", "--answered"),
    (["calibrate", "out", "--data=a=a.jsonl", "--match=exact"], "--match", "--answered"),
    *((["fit-router", "out", "--from-deltas", f"--{name}=a=x"], f"--{name}", "beside --from-deltas") for name in (
        "data", "text-column", "answered")),
    ([*EVAL, "--include-path=x"], "--include-path", "--lm-eval"),
    ([*EVAL, "--limit=3"], "--limit", "--lm-eval"),
    ([*EVAL, "--num-fewshot=0"], "--num-fewshot", "--lm-eval"),
    ([*HARNESS, "--match=exact"], "--match", "beside --lm-eval"),
    ([*HARNESS, "--max-new-tokens=5"], "--max-new-tokens", "beside --lm-eval"),
    (["verify", "out", "--base=base"], "--base", "--against"),
    (["verify", "out", "--no-logits"], "--logits", "--against"),
    *(([*ROUTES, f"--{name}=1"], f"--{name}", "beside --routes") for name in (
        "prompt-tokens", "context", "batch-size", "experts", "rounds", "threads", "dtype", "device")),
    ([*ROUTES, "--plot=x.png"], "--plot", "beside --routes"),
    ([*SHARING, "--min-cosine=0.5"], "--min-cosine", "without --families"),
    ([*SHARING, "--residual-density=0.5"], "--residual-density", "without --families"),
    (["measure", "math", "--prompts=a.jsonl", "-o", "x.safetensors", "--seed=1"], "--seed", "--statistic fisher"),
    ([*BUILD, "--always-rule=alpha"], "--always-rule", "without --always"),
    (["plan", *SOURCES, "--always-rule=alpha"], "--always-rule", "without --always"),
    ([*BUILD, "--correction-density=0.5"], "--correction-density", "without --for-quantization"),
    ([*BUILD, "--routed-layers=all", "--conflict-threshold=0.5"], "--conflict-threshold", "--routed-layers auto"),
    ([*BUILD, "--density=0.5", "--budget=1.5x"], "--density", "beside --budget"),
    ([*BUILD, "--density=0.5", "--sparsifier=svd", "--rank=3"], "--density", "beside --rank"),
    ([*BUILD, "--rescale=norm", "--sparsifier=svd"], "--rescale", "low-rank"),
    ([*PLANNED, "--routed-layers=all"], "--routed-layers", "beside --plan"),
    ([*PLANNED, "--conflict-threshold=0.5"], "--conflict-threshold", "beside --plan"),
]  # fmt: skip

# Options that always have an effect, or say where something is or how the work is done.
EVERYWHERE = {"as_json", "output", "dry_run", "show_version", "show_traceback", "help", "hash_inputs"}
WORK = {"workers", "max_memory", "allow_pickle", "dequantize", "allow_distant"}
LOADING = {"dtype", "device", "raw", "batch_size"}
SETTINGS = {
    *(
        "preset",
        "merge_method",
        "merge_parameter",
        "merge_data",
        "depth_scaling",
        "density_scope",
        "budget",
        "encoding",
    ),
    *("sparsifier", "rank", "target_module", "conflict_score", "conflict_density", "always", "router", "router_layer"),
    *("ood_alpha", "ood_beta", "routing_top_p", "fallback", "families", "for_quantization", "seed", "plan_file"),
}
EFFECTIVE = {
    "plan": {"base", "expert", "save", *SETTINGS, *WORK},
    "build": {"base", "expert", "router_from_deltas", *SETTINGS, *WORK},
    "merge": {"base", "expert", "method", "merge_parameter", "merge_data", "depth_scaling", "seed", *WORK},
    "measure": {"prompts", "statistic", "text_column", "answer_column", "raw", "max_sequences", "max_tokens", "memory"},
    "search": {"base", "expert", "data", "with_answers", "max_prompts", "option", "figure"},
    "run": {"setting", "only"},
    "fit-router": {"data", "from_deltas", "background", "quantize", *LOADING},
    "calibrate": {"data", "from_deltas", "background", "quantize", *LOADING},
    "fit-scales": {"expert", "data", "base", "steps", "batch_size", "seed", "raw"},
    "generate": {"file", "expert", "max_new_tokens", "quantize", *LOADING},
    "eval": {"data", "report", "only_routed", "baseline", "lm_eval", "quantize", *LOADING},
    "inspect": set(),
    "condense": {"families"},
    "verify": {"against", "accept"},
    "bench": {"routes"},
    "demo": {"quick", "device", "seed"},
    "methods": set(),
    "env": set(),
}


@pytest.mark.parametrize(("arguments", "option", "reason"), IDLE, ids=lambda value: "".join(value)[-40:])
def test_an_option_without_effect_is_refused(arguments, option, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "plan.json").write_text(json.dumps({"plan_version": 1, "blocks": [], "settings": {}}))
    shown = CliRunner().invoke(app, arguments)
    said = " ".join(shown.stderr.replace("│", " ").split())
    assert shown.exit_code == 2, said
    assert f"Invalid value for {option}" in said
    assert reason in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize("command", EFFECTIVE)
def test_of_every_option_it_is_said_whether_it_needs_another(command):
    options = {
        parameter.name
        for parameter in get_command(app).commands[command].params
        if parameter.param_type_name == "option"
    }
    needing = {need.option for need in NEEDS.get(command, ())}
    if command in ("plan", "build"):
        needing |= {need.option for need in SETTING_NEEDS}
    assert needing <= options
    assert options - needing - EVERYWHERE == EFFECTIVE[command] - needing
    assert set(EFFECTIVE) == set(get_command(app).commands)


PIPELINE = """
build: {base: base, experts: {a: a}, output: new, config: CONFIG}
calibrate: {data: {a: a.jsonl}CALIBRATE}
eval: {data: {a: a.jsonl}EVAL}
"""


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"CALIBRATE": ", match: exact"}, "calibrate.match has no effect without answered"),
        ({"EVAL": ", limit: 3"}, "eval.limit has no effect without lm_eval"),
        ({"CONFIG": "{always_rule: alpha}"}, "always_rule"),
        ({"CONFIG": "{density: 0.5, budget: 1.5x}"}, "build.config.density has no effect beside budget"),
    ],
    ids=str,
)
def test_a_key_without_effect_is_refused(parts, message, tmp_path):
    text = PIPELINE
    for name in ("CONFIG", "CALIBRATE", "EVAL"):
        text = text.replace(name, parts.get(name, "{}" if name == "CONFIG" else ""))
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    (tmp_path / "all.yaml").write_text(text)
    shown = CliRunner().invoke(app, ["run", str(tmp_path / "all.yaml")])
    assert shown.exit_code == 3
    assert message in shown.stderr
    assert not (tmp_path / "new").exists()
