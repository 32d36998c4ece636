"""What an output says of where it came from."""

from __future__ import annotations

import hashlib
import json

import pytest
import xxhash
import yaml
from safetensors.torch import load_file, save_file

from mediator_peft import plan_mediator
from mediator_peft.checkpoints.digests import FileDigests, RunningDigest, take_all
from mediator_peft.cli.pipeline_file import read_pipeline
from mediator_peft.errors import ConfigError
from mediator_peft.merge.provenance import _files
from tests.merge.helpers import build, digests, experts_of
from tests.tiny import write_tiny_checkpoints

WEIGHTS = ("model.safetensors", "mediator/adapter_model.safetensors", "mediator/adapter_config.json")


@pytest.fixture
def paths(tmp_path):
    return write_tiny_checkpoints(tmp_path / "in")


def test_every_input_file_is_named_with_its_checksum(paths, tmp_path):
    build(paths, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "mediator" / "provenance.json").read_text())
    assert list(found["inputs"]) == ["base", "math", "code"]
    for label, known in found["inputs"].items():
        assert known["source"] == str(paths[label])
        assert set(known["files"]) == {"model.safetensors", "config.json"}
        for name, entry in known["files"].items():
            data = (paths[label] / name).read_bytes()
            assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert found["packages"]["torch"]


def test_checksums_can_be_left_out(paths, tmp_path):
    build(paths, tmp_path / "out", hash_inputs=False)
    found = json.loads((tmp_path / "out" / "mediator" / "provenance.json").read_text())
    assert all("sha256" not in entry for known in found["inputs"].values() for entry in known["files"].values())


def test_a_checksum_may_be_taken_step_by_step(tmp_path):
    data = bytes(range(256)) * 3000
    (tmp_path / "file").write_bytes(data)
    digest = RunningDigest(tmp_path / "file")
    for stop in (0, 5, 3, 300_000, 300_001, 299_000):
        digest.advance(stop)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest() == digest.hexdigest()


def test_a_checksum_takes_what_others_read_and_reads_the_rest(tmp_path):
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    digest = RunningDigest(tmp_path / "file")
    # In order, over a gap, what is known already, and what lies far ahead.
    for start, stop in ((0, 700), (700, 900), (1000, 70_000), (500, 800), (60_000, 80_000), (2_000_000, 2_100_000)):
        take_all([(digest, start, memoryview(data)[start:stop])])
    assert digest._place == 70_000
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


def test_bytes_that_come_twice_are_taken_once(tmp_path):
    data = bytes(range(256)) * 10
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(data)
    one, other = (RunningDigest(tmp_path / name, with_quick=True) for name in ("one", "other"))
    first, second = memoryview(data)[:900], memoryview(data)[900:]
    take_all([(one, 0, first), (other, 0, first), (one, 0, first), (one, 900, second)])
    assert (one._place, other._place) == (900, 900)
    assert one.hexdigest() == other.hexdigest() == hashlib.sha256(data).hexdigest()
    assert one.quick() == other.quick() == xxhash.xxh3_128(data).hexdigest()


def test_a_base_in_another_order_than_the_outputs_gives_the_same_checksums(paths, tmp_path):
    """As shards have it: what lies between two tensors of the output may be written long after them."""
    tensors = load_file(paths["base"] / "model.safetensors")
    names = sorted(tensors, key=lambda name: (name.split(".")[-2] != "post_attention_layernorm", name))[::-1]
    parts = [names[:5], names[5:12], names[12:]]
    files = [f"model-{number + 1:05}-of-00003.safetensors" for number in range(3)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, paths["base"] / file, {"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (paths["base"] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (paths["base"] / "model.safetensors").unlink()
    build(paths, tmp_path / "out")
    known = json.loads((tmp_path / "out" / "mediator" / "checksums.json").read_text())
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() in json.dumps(known)
    assert xxhash.xxh3_128(data).hexdigest() in json.dumps(known)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_outputs_checksums_are_those_of_its_files(workers, paths, tmp_path):
    build(paths, tmp_path / "out", workers=workers)
    known = json.loads((tmp_path / "out" / "mediator" / "checksums.json").read_text())
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert known["backbone"]["model.safetensors"] == hashlib.sha256(data).hexdigest()
    assert known["quick"]["backbone"]["model.safetensors"] == xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_process_reads_on_in_the_inputs_as_it_merges(workers, paths, tmp_path, monkeypatch):
    left = []
    original = RunningDigest.hexdigest

    def hexdigest(digest):
        if digest.path.name == "model.safetensors" and digest.path.parent.parent == tmp_path / "in":
            left.append(digest.path.stat().st_size - digest._place)
        return original(digest)

    monkeypatch.setattr(RunningDigest, "hexdigest", hexdigest)
    build(paths, tmp_path / "out", workers=workers)
    assert len(left) == 3
    assert all(count == 0 if workers == 1 else count > 0 for count in left)


def test_the_hubs_cache_is_taken_at_its_word(tmp_path):
    class Cached:
        folder = tmp_path
        files = [tmp_path / "model.safetensors"]

    (tmp_path / ("ab" * 32)).write_bytes(b"x")
    Cached.files[0].symlink_to(tmp_path / ("ab" * 32))
    assert dict(_files(Cached(), FileDigests([], False))) == {"model.safetensors": {"bytes": 1, "sha256": "ab" * 32}}


@pytest.mark.parametrize("settings", [{}, {"density": 0.4, "routed_layers": [0, 2], "target_modules": ["q_proj"]}])
def test_the_kept_file_builds_the_same_again(settings, paths, tmp_path):
    build(paths, tmp_path / "one", settings)
    kept = tmp_path / "one" / "mediator" / "pipeline.yaml"
    with pytest.raises(ConfigError, match=r"build\.output is missing"):
        read_pipeline(kept)
    pipeline = read_pipeline(kept, {"build.output": str(tmp_path / "two")})
    section = pipeline.build
    assert section.experts == {name: str(path) for name, path in experts_of(paths).items()}
    build(paths, tmp_path / "two", section.config)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one == two


def test_a_plan_is_kept_with_it(paths, tmp_path):
    plan_mediator(paths["base"], experts_of(paths)).save(tmp_path / "plan.json")
    build(paths, tmp_path / "one", plan=tmp_path / "plan.json")
    adapter = tmp_path / "one" / "mediator"
    assert yaml.safe_load((adapter / "pipeline.yaml").read_text())["build"]["plan"] == "plan.json"
    build(paths, tmp_path / "two", plan=adapter / "plan.json")
    for name in WEIGHTS:
        assert digests(tmp_path / "one")[name] == digests(tmp_path / "two")[name]
