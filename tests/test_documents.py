"""What the documents show runs."""

import os
import re
import runpy
from pathlib import Path

import pytest
from tiny import write_tiny_checkpoints
from tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    runpy.run_path(str(path), run_name="__main__")


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    write_tiny_checkpoints(tmp_path, names=["base", "maths", "code"])
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_every_path_named_in_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert os.path.exists(ROOT / target), target
