"""YAML of bounded size."""

from __future__ import annotations

import tracemalloc

import pytest
import yaml

from mediator_peft.cli.bounded_yaml import MalformedYamlError, parse_yaml
from tests.cli.test_bad_inputs import BOMB, MERGE_BOMB

GOOD = """
shared: &data {math: math.jsonl, code: code.jsonl}
calibrate: {data: *data, raw: false}
eval:
  <<: {batch_size: 4}
  data: *data
"""


def test_aliases_and_merge_keys_are_read_as_yaml_reads_them():
    assert parse_yaml(GOOD) == yaml.safe_load(GOOD)
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", [BOMB, MERGE_BOMB, "a: &a {b: *a}", "[" * 60 + "]" * 60])
def test_what_explodes_is_refused_in_little_memory(text):
    tracemalloc.start()
    with pytest.raises(MalformedYamlError):
        parse_yaml(text)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
