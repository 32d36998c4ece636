"""The command line, from checkpoints to a report, on tiny models."""

import errno
import json
import shutil

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import write_tiny_checkpoints
from typer.testing import CliRunner

from mediator_peft import load_mediator
from mediator_peft.cli.app import app
from mediator_peft.cli.common import exit_code, explain
from mediator_peft.cli.merge_options import parse_routed_layers
from mediator_peft.errors import ConfigError
from mediator_peft.evaluation.generation import answer_prompts, route_prompts
from mediator_peft.evaluation.runner import score_tasks

COMMANDS = ["plan", "build", "run", "fit-router", "calibrate", "generate", "eval", "inspect", "verify", "bench", "demo"]


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def prompts_of(expert, count=20):
    return [f"{number * 7} + {number} is" if expert == "math" else f"def f{'x' * number}(" for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, data files, and a built and calibrated model in ``out``."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_checkpoints(folder, ["base", "math", "code"])
    character_tokenizer(CHAT_TEMPLATE, adds_bos=True).save_pretrained(folder / "base")
    for expert in ("math", "code"):
        lines = [{"prompt": prompt, "answer": "7"} for prompt in prompts_of(expert)]
        (folder / f"{expert}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = build(folder, "out")
    assert built.exit_code == 0, built.stderr
    calibrated = calibrate(folder, "out")
    assert calibrated.exit_code == 0, calibrated.stderr
    return folder


def build(folder, output, *more):
    experts = [part for name in ("math", "code") for part in ("--expert", f"{name}={folder / name}")]
    return run("build", "--base", folder / "base", *experts, "--output", folder / output, *more)


def calibrate(folder, output, *more):
    data = [part for name in ("math", "code") for part in ("--data", f"{name}={folder / name}.jsonl")]
    return run("calibrate", folder / output, *data, *more)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"mediator-peft {command}" in shown.stdout
    assert "Example:" in shown.stdout
    assert "--json" in shown.stdout


def test_the_version_is_printed():
    shown = run("--version")
    assert shown.exit_code == 0
    assert shown.stdout.strip()[0].isdigit()


def test_it_runs_as_a_program(program):
    finished = program.run("inspect", "/nowhere")
    assert finished.returncode == 3
    assert b"Traceback" not in finished.stderr
    assert finished.stdout == b""


def test_build_prints_sizes_and_as_json_the_report(folder):
    shown = build(folder, "again")
    assert "adapter file" in shown.stdout
    as_json = build(folder, "as_json", "--density", "0.5", "--routed-layers", "0,2", "--json")
    report = json.loads(as_json.stdout)
    assert report["routed_blocks"] == [0, 2]
    assert as_json.exit_code == 0
    config = json.loads((folder / "as_json" / "mediator" / "adapter_config.json").read_text())
    assert config["density"] == 0.5


@pytest.mark.parametrize(
    ("text", "meant"),
    [("auto", "auto"), ("all", "all"), ("0.5", 0.5), ("1.0", 1.0), ("0,2,5", [0, 2, 5]), ("3", [3]), ("x", "x")],
)
def test_routed_layers_are_read(text, meant):
    assert parse_routed_layers(text) == meant


def test_calibration_changes_the_router_and_nothing_else(folder):
    build(folder, "fresh")
    adapter = folder / "fresh" / "mediator"
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    fitted = calibrate(folder, "fresh", "--json")
    report = json.loads(fitted.stdout)
    assert 0.9 <= report["accuracy"] <= 1.0
    assert "outcomes" not in report
    after = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"adapter_model.safetensors", "adapter_config.json", "checksums.json"}
    old, new = (json.loads(files["adapter_config.json"]) for files in (before, after))
    assert new["base_model_name_or_path"] == old["base_model_name_or_path"]
    assert not list((folder / "fresh").glob(".*"))


@pytest.mark.slow
def test_prompts_with_answers_go_to_whoever_answers_them_right(folder):
    shutil.copytree(folder / "out", folder / "answered-out")
    model, tokenizer = load_mediator(folder / "answered-out")
    # Near to the task: about half of their weight goes to an expert before.
    prompts = [f"{number} times {number} is what" for number in range(30)]
    nearest = [route.nearest for route in route_prompts(model, tokenizer, prompts)]
    by_base = answer_prompts(model, tokenizer, prompts, expert_weights="base")
    answers = {name: answer_prompts(model, tokenizer, prompts, expert_weights=name) for name in ("math", "code")}
    by_expert = [answers[name][number] for number, name in enumerate(nearest)]
    # Each is answered right by the base; by the expert too where both say the same.
    pairs = [(one, two) for one, two in zip(by_base, by_expert, strict=True) if one.strip()]
    lines = [{"prompt": prompt, "answer": one} for prompt, one in zip(prompts, by_base, strict=True) if one.strip()]
    (folder / "others.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    num_different = sum(one.strip() != two.strip() for one, two in pairs)
    assert num_different > 20
    done = calibrate(folder, "answered-out", "--answered", folder / "others.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["outcomes"] == {
        "experts": {"math": 0, "code": 0},
        "ordinary": num_different,
        "undecided": len(pairs) - num_different,
    }
    again, _ = load_mediator(folder / "answered-out")
    assert len(again.router.background_novelty) == len(model.router.background_novelty) + num_different
    before, after = (
        sum(route.expert_weights["base"] for route in route_prompts(one, tokenizer, prompts)) for one in (model, again)
    )
    assert after > before


def test_a_calibrated_folder_can_be_moved(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "moved")
    shown = run("generate", tmp_path / "moved", "1 + 1 is", "--max-new-tokens", 2)
    assert shown.exit_code == 0, shown.stderr


def test_a_build_routes_without_prompts_and_says_so(folder):
    out = folder / "from-deltas"
    built = build(folder, out.name, "--router-from-deltas")
    assert built.exit_code == 0, built.stderr
    assert "no prompts of theirs were used" in built.stderr
    assert "is not known without prompts" in built.stderr
    report = json.loads((out / "mediator" / "report" / "routing.json").read_text())
    assert report["made_from"] == "deltas"
    assert "spectral, made from deltas without texts" in run("inspect", out).stdout
    shown = run("generate", out, "7 + 7 is", "--max-new-tokens", 2)
    assert shown.exit_code == 0, shown.stderr
    assert "made from deltas, without prompts of the experts; one fitted on prompts is better" in shown.stderr
    again = run("fit-router", out, "--from-deltas", "--json")
    assert json.loads(again.stdout) == report
    assert "made from deltas" not in run("generate", folder / "out", "7 + 7 is", "--max-new-tokens", 2).stderr


def test_generate_says_who_answered(folder):
    shown = run("generate", folder / "out", prompts_of("code")[3], "--max-new-tokens", 4)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("[code ")
    assert "uncertainty" in shown.stdout


def test_generate_gives_what_the_model_generates(folder):
    prompts = prompts_of("math")[:3]
    (folder / "some.txt").write_text("\n".join(prompts))
    shown = run("generate", folder / "out", "--file", folder / "some.txt", "--max-new-tokens", 5, "--json")
    model, tokenizer = load_mediator(folder / "out", dtype=torch.float32)
    for record, prompt in zip(json.loads(shown.stdout), prompts, strict=True):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        expected = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        route = model.route(**inputs)
        assert record["answer"] == expected
        assert record["prompt"] == prompt
        assert list(record["expert_weights"].values()) == pytest.approx(route.expert_weights[0].tolist())
        assert record["uncertainty"] == pytest.approx(float(route.uncertainty[0]), abs=1e-5)


def test_generate_reads_the_standard_input_and_takes_an_expert(folder):
    routed = run("generate", folder / "out", "-", "--expert", "math", "--max-new-tokens", 3, "--json", stdin="hello")
    record = json.loads(routed.stdout)[0]
    assert (record["prompt"], record["expert"], record["routed"]) == ("hello", "math", False)


def test_eval_scores_tasks_and_writes_a_report(folder, tmp_path):
    pytest.importorskip("matplotlib")
    math = f"math={folder / 'math.jsonl'}"
    shown = run(
        "eval", folder / "out", "--data", math, "--data", f"odd={folder / 'code.jsonl'}", "--report", tmp_path, "--json"
    )
    assert shown.exit_code == 0, shown.stderr
    results = json.loads(shown.stdout)
    assert [system["name"] for system in results["systems"]] == ["averaged backbone", "expert named", "routed"]
    assert results["tasks"]["odd"]["expert"] is None
    assert list(results["systems"][1]["tasks"]) == ["math"]
    assert results["routing"]["confusion"]["math"]["math"] >= 18
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "answers.json", "results.png", "results.md"}
    assert "| routed |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    more = ["--baseline", "emr", "--baseline", "experts@router"]
    table = run("eval", folder / "out", "--data", math, "--only-routed", "--match", "contains", *more)
    assert "experts@router" in table.stdout
    assert "routing accuracy" in table.stdout
    assert "averaged backbone" not in table.stdout


def test_an_eval_that_was_stopped_goes_on_with_the_next_system(folder, tmp_path, monkeypatch):
    arguments = ["eval", folder / "out", "--data", f"math={folder / 'math.jsonl'}", "--report", tmp_path, "--json"]
    arguments += ["--baseline", f"base={folder / 'base'}"]
    scored = []

    def stop_before_routed(name, *rest, **options):
        if name == "routed" and len(scored) < 4:
            raise KeyboardInterrupt
        scored.append(name)
        return score_tasks(name, *rest, **options)

    monkeypatch.setattr("mediator_peft.evaluation.runner.score_tasks", stop_before_routed)
    assert run(*arguments).exit_code != 0
    assert scored == ["base", "averaged backbone", "expert named"]
    scored.append("stopped")
    found = json.loads(run(*arguments).stdout)
    assert scored[4:] == ["routed"]
    assert [system["name"] for system in found["systems"]] == ["base", "averaged backbone", "expert named", "routed"]
    assert not (tmp_path / ".mediator-eval.scores").exists()


def test_inspect_reads_headers_and_adds_up(folder):
    found = json.loads(run("inspect", folder / "out", "--json").stdout)
    path = folder / "out" / "mediator" / "adapter_model.safetensors"
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    parts = sum(sum(column.values()) for column in found["bytes"]["columns"].values())
    assert found["bytes"]["adapter"] == size
    assert header + parts + found["bytes"]["router"] == size
    assert found["columns"] == ["math", "code", "base"]
    assert found["has_router"]
    weights = sum(size for name, size in found["bytes"]["columns"]["math"].items())
    both = weights + sum(found["bytes"]["columns"]["code"].values())
    assert found["bytes_per_routed_parameter_and_expert"] == pytest.approx(both / 2 / found["routed_parameters"])
    table = run("inspect", folder / "out" / "mediator").stdout
    assert "delta of code" in table
    assert "fitted" in table


def test_inspect_builds_no_model(folder, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert run("inspect", folder / "out").exit_code == 0


@pytest.mark.parametrize("command", ["generate", "inspect", "eval"])
def test_a_truncated_adapter_is_bad_input(folder, tmp_path, command):
    shutil.copytree(folder / "out", tmp_path / "cut")
    path = tmp_path / "cut" / "mediator" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    more = {"generate": ["hello"], "inspect": [], "eval": ["--data", f"math={folder / 'math.jsonl'}"]}[command]
    shown = run(command, tmp_path / "cut", *more)
    assert shown.exit_code == 3
    assert "adapter_model.safetensors" in shown.stderr
    assert shown.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["build"],
        ["build", "--base", "b", "--expert", "math", "--output", "o"],
        ["build", "--base", "b", "--expert", "a=x", "--expert", "a=y", "--output", "o"],
        ["calibrate", "out", "--data", "=x"],
        ["generate", "out"],
        ["generate", "out", "a prompt", "--file", "too.txt"],
        ["generate", "out", "x", "--max-new-tokens", "0"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_usage(arguments):
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert shown.stdout == ""


def test_wrong_values_are_usage_or_bad_input_and_say_why(folder):
    out = folder / "out"
    for code, said, arguments in [
        (2, "dtype", ["generate", out, "x", "--dtype", "float31"]),
        (2, "device", ["generate", out, "x", "--device", "gpu"]),
        (
            3,
            "density must be in (0, 1]",
            ["build", "--base", "b", "--expert", "a=x", "--output", "o", "--density", "nan"],
        ),
        (3, "Did you mean 'math'?", ["generate", out, "x", "--expert", "maths"]),
        (3, "no file", ["calibrate", out, "--data", "math=missing.jsonl"]),
        (3, "'expt'", ["calibrate", out, "--data", f"math={folder / 'math.jsonl'}", "--text-column", "expt"]),
        (3, "exist", ["build", "--base", folder / "base", "--expert", f"a={folder / 'math'}", "--output", out]),
        (3, "no.where", ["build", "--base", "no.where", "--expert", f"a={folder / 'math'}", "--output", folder / "o"]),
    ]:
        shown = run(*arguments)
        assert shown.exit_code == code, (arguments, shown.stderr)
        assert said in shown.stderr
        assert "Traceback" not in shown.stderr
        assert shown.stdout == ""


def test_a_router_that_is_not_fitted_is_bad_input_unless_an_expert_is_named(folder):
    build(folder, "unfitted")
    refused = run("generate", folder / "unfitted", "x", "--max-new-tokens", 2)
    assert refused.exit_code == 3
    assert "mediator-peft fit-router" in refused.stderr
    assert run("generate", folder / "unfitted", "x", "--expert", "code", "--max-new-tokens", 2).exit_code == 0


def test_a_model_without_a_tokenizer_is_bad_input(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    shown = run("generate", tmp_path / "out", "x")
    assert shown.exit_code == 3
    assert "tokenizer" in shown.stderr


def test_lack_of_resources_has_its_own_exit_code():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert exit_code(full) == 4
    assert exit_code(MemoryError()) == 4
    assert exit_code(torch.OutOfMemoryError("CUDA out of memory")) == 4
    wrapped = ConfigError("writing failed")
    wrapped.__cause__ = full
    assert exit_code(wrapped) == 4
    assert "ran out" in explain(wrapped)
    assert exit_code(ConfigError("x")) == 3
    assert exit_code(PermissionError(errno.EACCES, "denied")) == 3
    assert exit_code(ZeroDivisionError()) is None


def test_a_full_disk_ends_with_code_four(folder, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mediator_peft.merge.offline.build_mediator", fail)
    shown = build(folder, "full")
    assert shown.exit_code == 4
    assert "Traceback" not in shown.stderr


def test_plan_lists_every_problem_and_predicts_the_rest(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, names=["base", "math", "code"])
    good = ["plan", "--base", str(paths["base"]), "--expert", f"math={paths['math']}", "--json"]
    planned = CliRunner().invoke(app, good)
    assert planned.exit_code == 0, planned.output
    found = json.loads(planned.stdout)
    assert found["problems"] == []
    assert len(found["blocks"]) == 3
    assert found["bytes"]["total"] > 0
    bad = ["plan", "--base", str(paths["base"]), "--expert", f"a={tmp_path / 'x'}", "--expert", f"b={tmp_path / 'y'}"]
    refused = CliRunner().invoke(app, bad)
    assert refused.exit_code == 3
    assert all(f"expert {name!r}" in refused.output for name in "ab")


def test_verify_tells_a_sound_output_from_a_damaged_one(tmp_path):
    paths = write_tiny_checkpoints(tmp_path, names=["base", "math", "code"])
    build = ["build", "--base", str(paths["base"]), "--output", str(tmp_path / "out")]
    for name in ("math", "code"):
        build += ["--expert", f"{name}={paths[name]}"]
    assert CliRunner().invoke(app, build).exit_code == 0
    verify = ["verify", str(tmp_path / "out"), "--against", f"math={paths['math']}", "--json"]
    sound = CliRunner().invoke(app, verify)
    assert sound.exit_code == 0, sound.output
    assert json.loads(sound.stdout)["differences"]["math"]["max_difference"] > 0
    weights = tmp_path / "out" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    assert CliRunner().invoke(app, verify).exit_code == 3
