"""However the work is done, the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mediator_peft import MediatorConfig, build_mediator, get_mediator_model
from mediator_peft.checkpoints import backbone_files as shards
from mediator_peft.checkpoints.output_folder import partial_name
from mediator_peft.errors import OutputExistsError
from mediator_peft.merge import offline, tiles
from tests.merge.helpers import EXPERTS, build, digests, experts_of
from tests.tiny import write_tiny_checkpoints


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tiny_checkpoints(tmp_path_factory.mktemp("in"), ("base", *EXPERTS), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    build(paths, out)
    return digests(out)


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(paths, expected, tmp_path, workers):
    build(paths, tmp_path / "out", workers=workers)
    assert digests(tmp_path / "out") == expected


def test_the_number_of_threads_changes_nothing(paths, expected, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        build(paths, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "out") == expected


def test_the_caller_keeps_its_threads(paths, tmp_path):
    before = torch.get_num_threads()
    build(paths, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_the_order_of_experts_changes_the_columns_only(paths, expected, tmp_path):
    turned = dict(reversed(experts_of(paths).items()))
    build_mediator(paths["base"], turned, tmp_path / "out", MediatorConfig())
    found = digests(tmp_path / "out")
    for name in ("model.safetensors", "mediator/adapter_model.safetensors"):
        assert found[name] == expected[name]


def test_small_tiles_keep_the_same_entries(paths, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 64)
    build(paths, tmp_path / "out")
    found = digests(tmp_path / "out")
    for name in ("model.safetensors", "mediator/adapter_model.safetensors"):
        assert found[name] == expected[name]


def test_input_shards_change_nothing(paths, expected, tmp_path):
    for name, folder in paths.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    build({name: tmp_path / name for name in paths}, tmp_path / "out")
    found = digests(tmp_path / "out")
    for name in ("model.safetensors", "mediator/adapter_model.safetensors"):
        assert found[name] == expected[name]


def test_output_shards_hold_the_same_tensors(paths, expected, tmp_path, monkeypatch):
    build(paths, tmp_path / "one")
    monkeypatch.setattr(shards.BackboneFiles.__init__, "__defaults__", (20_000,))
    build(paths, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=0, atol=0)


def test_the_adapter_file_is_laid_out_as_the_library_would(paths, tmp_path):
    build(paths, tmp_path / "out")
    path = tmp_path / "out" / "mediator" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is not a mapping
    save_file(tensors, tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"encoding": "float"}, {"merge_method": "base"}, {"routed_layers": [1]}])
def test_in_memory_and_offline_give_the_same_model(paths, tmp_path, settings):
    build(paths, tmp_path / "out", settings)
    names = {name: str(path) for name, path in experts_of(paths).items()}
    model = get_mediator_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]), MediatorConfig(experts=names, **settings)
    )
    model.save_pretrained(tmp_path / "adapter")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "out" / "mediator", tmp_path / "adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if settings.get("merge_method") == "base":
        # The backbone is the base, which lies in its folder already.
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(paths["base"])
        assert not (tmp_path / "adapter" / "backbone").exists()
        return
    backbones = [tmp_path / "out" / "model.safetensors", tmp_path / "adapter" / "backbone" / "model.safetensors"]
    assert backbones[0].read_bytes() == backbones[1].read_bytes()


SLOW_BUILD = """
import sys, time
from mediator_peft import build_mediator
from mediator_peft.merge import journal as pieces
put = pieces.JournalStore.put
def slow(*arguments):
    time.sleep(0.01)
    put(*arguments)
pieces.JournalStore.put = slow
print("go", flush=True)
experts = dict(pair.split("=") for pair in sys.argv[4:])
build_mediator(sys.argv[1], experts, sys.argv[2], None, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(paths, expected, tmp_path, workers):
    out = tmp_path / "out"
    pairs = [f"{name}={path}" for name, path in experts_of(paths).items()]
    command = [sys.executable, "-c", SLOW_BUILD, str(paths["base"]), str(out), str(workers), *pairs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        journal = partial_name(out) / ".journal"
        while process.poll() is None and len(list(journal.glob("*.safetensors"))) < 5:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    time.sleep(0.2)  # workers die with their parent
    pieces = {path.name: path.stat().st_ino for path in journal.glob("*.safetensors")}
    assert len(pieces) >= 5
    build(paths, out)
    assert digests(out) == expected
    assert not partial_name(out).exists()


def test_a_build_killed_at_random_places_goes_on(paths, expected, tmp_path, monkeypatch):
    """Every write may be the last one: the run is cut off there, as by a kill, and taken up again."""

    class Killed(BaseException):
        pass

    places = random.Random(0)
    original = os.pwritev
    left = 0

    def failing(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return original(*arguments)

    num_kills = 0
    for _ in range(20):
        left = places.randint(0, 12)
        monkeypatch.setattr(os, "pwritev", failing)
        try:
            build(paths, tmp_path / "out")
        except Killed:
            num_kills += 1
            assert not (tmp_path / "out").exists()
        else:
            break
    monkeypatch.setattr(os, "pwritev", original)
    assert num_kills >= 2
    if not (tmp_path / "out").exists():
        build(paths, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_finished_tensors_are_not_done_again(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.Build, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(paths, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(offline.TensorWork, "__call__", lambda *_: pytest.fail("a tensor was merged again"))
    build(paths, tmp_path / "out")


def test_other_work_does_not_use_the_leftovers(paths, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.Build, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(paths, tmp_path / "out", {"density": 0.5})
    monkeypatch.undo()
    build(paths, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_two_builds_of_one_output_do_not_meet(paths, tmp_path, monkeypatch):
    finish = offline.Build.finish

    def meanwhile(*arguments):
        with pytest.raises(OutputExistsError, match="another process"):
            build(paths, tmp_path / "out")
        return finish(*arguments)

    monkeypatch.setattr(offline.Build, "finish", meanwhile)
    build(paths, tmp_path / "out")


RANKS = """
import sys
import torch.distributed as dist
from mediator_peft import build_mediator
dist.init_process_group("gloo")
experts = dict(pair.split("=") for pair in sys.argv[3:])
try:
    build_mediator(sys.argv[1], experts, sys.argv[2])
finally:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes(paths, expected, tmp_path, program):
    pairs = [f"{name}={path}" for name, path in experts_of(paths).items()]
    done = program.run_ranks(2, paths["base"], tmp_path / "out", *pairs, code=RANKS)
    assert [each.returncode for each in done] == [0, 0], done
    assert digests(tmp_path / "out") == expected


@pytest.mark.slow
def test_the_command_line_shares_its_work_out_under_torchrun(paths, expected, tmp_path):
    pairs = [f"--expert={name}={path}" for name, path in experts_of(paths).items()]
    port = str(random.randint(20000, 40000))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "mediator_peft", "build", "--base", str(paths["base"]), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *pairs], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_fault_ends_all_ranks(paths, tmp_path, program):
    (tmp_path / "out").mkdir()
    done = program.run_ranks(2, paths["base"], tmp_path / "out", f"math={paths['math']}", code=RANKS)
    assert all(each.returncode for each in done)
    assert all(b"exists" in each.stderr for each in done)


def test_paths_in_another_form_are_the_same(paths, tmp_path):
    build({name: Path(os.path.relpath(path)) for name, path in paths.items()}, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
