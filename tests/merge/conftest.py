import pytest
import torch

from tests.tiny import write_tiny_checkpoints


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A folder of tiny checkpoints, to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("pristine")
    write_tiny_checkpoints(folder, ("base", "math", "code"), dtype=torch.bfloat16)
    return folder
