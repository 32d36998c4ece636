"""Shared fixtures. Nothing here, nor in any test, reaches a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: see _one_thread

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_PROGRAM = pytest.StashKey()


def pytest_configure(config):
    config.stash[_PROGRAM] = None
    if getattr(config.option, "numprocesses", None):
        return  # tests run in the workers, each of which comes here too: this process needs no imports
    gc.disable()  # until all is imported: see pytest_collection_finish
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if hasattr(os, "fork"):
        from program import Program

        # Before any test: the processes that it starts know nothing of those that ran here.
        config.stash[_PROGRAM] = Program()


def pytest_unconfigure(config):
    gc.unfreeze()
    if config.stash[_PROGRAM] is not None:
        config.stash[_PROGRAM].close()


def pytest_collection_finish():
    # What has been imported stays to the end: searches for garbage need not go through it again and again. And they
    # come after ten times as many new objects as by default, which are no more than a few tiny models.
    gc.freeze()
    gc.set_threshold(7000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def program(pytestconfig):
    """Starts processes of the program that need not import anything; see ``program.py``."""
    if pytestconfig.stash[_PROGRAM] is None:
        pytest.skip("needs to fork")
    return pytestconfig.stash[_PROGRAM]


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

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
    import torch
    from tiny import write_tiny_checkpoints

    folder = tmp_path_factory.mktemp("pristine")
    write_tiny_checkpoints(folder, ("base", "math", "code"), dtype=torch.bfloat16)
    return folder
