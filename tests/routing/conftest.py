import pytest
import torch
from tiny import write_tiny_checkpoints
from tokenizer import tiny_tokenizer, topic_texts

from mediator_peft import MediatorConfig, build_mediator, load_mediator

TEMPLATE = (
    "{% for m in messages %}{{ 'w90 w91 ' if m.role == 'user' else 'w92 w93 ' }}{{ m.content }} w94 {% endfor %}"
    "{% if add_generation_prompt %}w92 w93 {% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def topics():
    """Texts of three experts, from separate parts of the vocabulary."""
    return {
        "math": topic_texts(5, 30, 40, seed=1),
        "code": topic_texts(35, 60, 40, seed=2),
        "law": topic_texts(62, 85, 40, seed=3),
    }


@pytest.fixture
def checkpoints(tmp_path):
    return write_tiny_checkpoints(tmp_path / "checkpoints", names=["base", "math", "code", "law"])


@pytest.fixture
def build(tmp_path, checkpoints):
    """Build and load a model of some of the experts."""

    def build(names=("math", "code"), folder="out", is_trainable=False, **settings):
        config = MediatorConfig(**{"density": 0.3, **settings})
        build_mediator(checkpoints["base"], {name: checkpoints[name] for name in names}, tmp_path / folder, config)
        model, _ = load_mediator(tmp_path / folder, is_trainable=is_trainable, dtype=torch.float32)
        return model

    return build
