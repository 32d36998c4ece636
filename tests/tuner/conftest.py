import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from fitting import fit_once
from tiny import write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def two_topics():
    """Calibration texts of two experts, from separate halves of the vocabulary."""
    return {"math": topic_texts(5, 45, 40, seed=1), "code": topic_texts(50, 90, 40, seed=2)}


@pytest.fixture
def topics():
    return two_topics()


_built: dict[str, tempfile.TemporaryDirectory[str]] = {}


def build(folder, arch, settings):
    """Checkpoints in ``folder/checkpoints`` and what is built of them in ``folder/out``, once in a process."""
    key = repr((arch, sorted(settings.items())))
    if key not in _built:
        _built[key] = made = tempfile.TemporaryDirectory(prefix="tiny-built-")
        paths = write_tiny_checkpoints(Path(made.name) / "checkpoints", arch=arch)
        experts = {name: path for name, path in paths.items() if name != "base"}
        build_mediator(paths["base"], experts, Path(made.name) / "out", MediatorConfig(**settings))
    shutil.copytree(Path(_built[key].name) / "out", folder / "out", copy_function=shutil.copy)
    return write_tiny_checkpoints(folder / "checkpoints", arch=arch)


def build_and_fit(folder, topics, tokenizer, arch="llama", **settings):
    build(folder, arch, {"density": 0.3, **settings})
    model, _ = load_mediator(folder / "out", dtype=torch.float32)
    fit_once(model, topics, tokenizer)
    return model


@pytest.fixture
def model(tmp_path, topics, tokenizer):
    """A tiny routed model with two experts, its router fitted."""
    return build_and_fit(tmp_path, topics, tokenizer)
