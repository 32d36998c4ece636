"""A short, seeded form of ``fuzz_cli.py``."""

from __future__ import annotations

import pytest

from tests.fuzz.fuzz_cli import BAD, fuzz, prepare


@pytest.mark.slow
def test_mutated_inputs_end_in_our_errors_or_work(tmp_path, monkeypatch):
    prepare(tmp_path)
    said = []
    found = fuzz(tmp_path, 60, seed=0, say=said.append)
    assert not said
    assert sum(sum(classes.values()) for classes in found.values()) == 60
    assert all(not classes[name] for classes in found.values() for name in BAD)
