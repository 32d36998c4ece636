"""Shared fixtures. Nothing here, nor in any test, reaches a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread():
    # Tests run side by side; threads of tiny matrices only get in each other's way.
    torch.set_num_threads(1)


@pytest.fixture
def checkpoints(tmp_path):
    """A tiny base and two experts on disk: name → folder."""
    from tiny import write_tiny_checkpoints

    return write_tiny_checkpoints(tmp_path / "checkpoints")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A folder of tiny checkpoints, to be copied and not to be changed."""
    from tiny import write_tiny_checkpoints

    folder = tmp_path_factory.mktemp("pristine")
    write_tiny_checkpoints(folder, ("base", "math", "code"), dtype=torch.bfloat16)
    return folder
