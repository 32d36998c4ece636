import pytest
import torch
from tiny import write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def topics():
    """Calibration texts of two experts, from separate halves of the vocabulary."""
    return {"math": topic_texts(5, 45, 40, seed=1), "code": topic_texts(50, 90, 40, seed=2)}


def build_and_fit(folder, topics, tokenizer, arch="llama", **settings):
    paths = write_tiny_checkpoints(folder / "checkpoints", arch=arch)
    experts = {name: path for name, path in paths.items() if name != "base"}
    build_mediator(paths["base"], experts, folder / "out", MediatorConfig(**{"density": 0.3, **settings}))
    model, _ = load_mediator(folder / "out", dtype=torch.float32)
    model.fit_router(topics, tokenizer)
    return model


@pytest.fixture
def model(tmp_path, topics, tokenizer):
    """A tiny routed model with two experts, its router fitted."""
    return build_and_fit(tmp_path, topics, tokenizer)
