"""The merge method that the document shows works as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mediator_peft.config import MediatorSettings
from mediator_peft.errors import ConfigError
from mediator_peft.methods.merging import MERGE_METHODS
from mediator_peft.methods.merging.row import EMBEDDING
from tests.methods.merging_helpers import merged
from tests.methods.test_merging_rows import vectors_of


@pytest.fixture
def shown():
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    block = next(
        part for part in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "clipped_average" in part
    )
    exec(compile(block, "extending.md", "exec"), {})
    yield "clipped_average"
    del MERGE_METHODS["clipped_average"]


def test_the_method_of_the_document(shown):
    base, vectors = vectors_of(3)
    mean = vectors.double().mean(dim=0)
    found = merged(shown, base, vectors, parameters={"largest": 0.005})
    torch.testing.assert_close(found, mean.clamp(-0.005, 0.005), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(merged(shown, base, vectors, kind=EMBEDDING), mean, rtol=1e-3, atol=1e-6)
    assert MediatorSettings(merge_method=shown, merge_parameters={"largest": 1}).merge_parameters == {"largest": 1}
    with pytest.raises(ConfigError, match=r"'largest'.*\(0, inf\)"):
        MediatorSettings(merge_method=shown, merge_parameters={"largest": 0.0})
